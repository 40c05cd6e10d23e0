import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_kernels import prime_advantage
from prime_kernels.reference import segment_sum

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "prime_vectors.json").read_text())
CASES = {case["name"]: case for case in VECTORS["cases"]}
RAW = {"whiten": False, "normalize": "none", "beta": 1.0}


def packed(case):
    """The arguments of prime_advantage, and what packs a padded (B, T) field of the case."""
    inputs = case["inputs"]
    mask = torch.tensor(inputs["response_mask"]).bool()
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    group = torch.arange(len(mask)) // inputs["K"]

    def pack(field):
        return torch.tensor(field, dtype=torch.float64)[mask]

    outcome = torch.tensor(inputs["acc"], dtype=torch.float64)
    return (pack(inputs["prm_logprobs"]), pack(inputs["ref_logprobs"]), outcome, cu_seqlens, group), pack


def options(inputs):
    """[P] adds raw q, this library beta * q, when there is no norm."""
    normed = inputs["prime_norm"] == "batch_norm"
    return {
        "beta": inputs["beta"],
        "gamma": inputs["reward_model_gamma"],
        "outcome_gamma": inputs["verifier_gamma"],
        "normalize": "batch" if normed else "none",
        "process_weight": 1.0 if normed else 1 / inputs["beta"],
    }


@pytest.mark.parametrize("name", CASES)
def test_vectors(name):
    case = CASES[name]
    args, pack = packed(case)
    run = case["prime_repo"]
    kwargs = options(case["inputs"])
    result = prime_advantage(*args, whiten=False, **kwargs)
    torch.testing.assert_close(result.advantage, pack(run["returns"]), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        result.token_reward / case["inputs"]["beta"], pack(run["token_level_scores_raw"]), rtol=0, atol=1e-9
    )
    whitened = prime_advantage(*args, **kwargs).advantage
    torch.testing.assert_close(whitened, pack(run["advantages"]), rtol=0, atol=1e-9)
    paper = prime_advantage(*args, whiten=False, form="paper", **kwargs | {"outcome_gamma": 1.0}).advantage
    torch.testing.assert_close(paper, pack(case["paper_readme_returns"]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_vectors_float32(name):
    args, pack = packed(CASES[name])
    single = [x.float() if x.is_floating_point() else x for x in args]
    result = prime_advantage(*single, whiten=False, **options(CASES[name]["inputs"]))
    assert {x.dtype for x in result} == {torch.float32}
    torch.testing.assert_close(result.advantage.double(), pack(CASES[name]["prime_repo"]["returns"]), rtol=0, atol=2e-6)


def naive(q, outcome, lengths, group, gamma, outcome_gamma, estimator, form):
    """The docstring, token by token."""
    rows = [row.tolist() for row in q.split(lengths)]
    means = [sum(row) / len(row) for row in rows]
    result = []
    for i, row in enumerate(rows):
        peers = [j for j in range(len(rows)) if group[j] == group[i]]
        k, o = len(peers), [outcome[j].item() for j in peers]
        m = [means[j] for j in peers]
        if estimator == "rloo":
            b = outcome[i].item() * k / (k - 1) - sum(o) / (k - 1)
            if form == "run":
                a = [r * k / (k - 1) - sum(m) / (k - 1) for r in row]
            else:
                a = [r - (sum(m) - means[i]) / (k - 1) for r in row]
        elif estimator == "grpo":
            spread = [math.sqrt(sum((x - sum(v) / k) ** 2 for x in v) / (k - 1)) + 1e-6 for v in (m, o)]
            a = [(r - sum(m) / k) / spread[0] for r in row]
            b = (outcome[i].item() - sum(o) / k) / spread[1]
        else:
            a, b = row, outcome[i].item()
        for t in range(len(row)):
            process = sum(gamma ** (s - t) * a[s] for s in range(t, len(row)))
            result.append(process + outcome_gamma ** (len(row) - 1 - t) * b)
    return torch.tensor(result, dtype=torch.float64)


@st.composite
def batches(draw, longest=9):
    """prm, ref, outcome, cu_seqlens, group: ragged groups with arbitrary ids, rows shuffled."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    group = torch.tensor([7 * i - 3 for i, k in enumerate(sizes) for _ in range(k)])
    group = group[torch.randperm(len(group), generator=generator)]
    lengths = torch.randint(1, draw(st.integers(1, longest)) + 1, group.shape, generator=generator)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    prm, ref = -torch.rand(2, int(cu_seqlens[-1]), generator=generator, dtype=torch.float64) * 3
    outcome = torch.randint(0, 3, group.shape, generator=generator).double() / 2
    return prm, ref, outcome, cu_seqlens, group


def repack(batch, order):
    prm, ref, outcome, cu_seqlens, group = batch
    lengths = cu_seqlens.diff().tolist()
    cu = torch.nn.functional.pad(cu_seqlens.diff()[order].cumsum(0), (1, 0)).int()
    return permute(prm, lengths, order), permute(ref, lengths, order), outcome[order], cu, group[order]


def permute(tokens, lengths, order):
    rows = tokens.split(lengths)
    return torch.cat([rows[i] for i in order])


@settings(max_examples=60, deadline=None)
@given(
    batches(),
    st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.sampled_from([("rloo", "run"), ("rloo", "paper"), ("grpo", "run"), ("reinforce", "run")]),
)
def test_equals_the_naive_loops(batch, gamma, outcome_gamma, kind):
    prm, ref, outcome, cu_seqlens, group = batch
    got = prime_advantage(
        *batch, gamma=gamma, outcome_gamma=outcome_gamma, estimator=kind[0], form=kind[1], **RAW
    ).advantage
    want = naive(prm - ref, outcome, cu_seqlens.diff().tolist(), group, gamma, outcome_gamma, *kind)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@given(batches())
@settings(max_examples=25, deadline=None)
def test_prm_equal_to_ref_gives_no_process_reward(batch):
    ref = batch[1]
    result = prime_advantage(ref, ref, *batch[2:], whiten=False)
    assert not result.token_reward.any() and not result.score.any()
    outcome_only = prime_advantage(None, None, *batch[2:], process_weight=0, whiten=False)
    assert torch.equal(result.advantage, outcome_only.advantage)
    assert not outcome_only.token_reward.any() and not outcome_only.score.any()


@given(batches(), st.sampled_from([0.05, 1.0]))
@settings(max_examples=25, deadline=None)
def test_token_rewards_telescope_to_the_score(batch, beta):
    result = prime_advantage(*batch, beta=beta)
    torch.testing.assert_close(segment_sum(result.token_reward, batch[3]), result.score, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.token_reward, beta * (batch[0] - batch[1]), rtol=0, atol=1e-12)


@given(batches(), st.floats(1e-3, 10))
@settings(max_examples=25, deadline=None)
def test_batch_norm_bounds_the_return_to_go_and_cancels_beta(batch, beta):
    kwargs = {"estimator": "reinforce", "outcome_weight": 0.0, "whiten": False}
    returns = prime_advantage(*batch, beta=beta, **kwargs).advantage
    raw = prime_advantage(*batch, beta=1.0, normalize="none", **kwargs).advantage
    largest = raw.abs().max()
    torch.testing.assert_close(returns.abs().max(), largest / (largest + 1e-6))
    assert torch.equal(returns, prime_advantage(*batch, **kwargs).advantage)


@given(batches())
@settings(max_examples=25, deadline=None)
def test_outcome_returns(batch):
    _, _, outcome, cu_seqlens, group = batch
    got = prime_advantage(*batch, process_weight=0, whiten=False).advantage
    for i, row in enumerate(got.split(cu_seqlens.diff().tolist())):
        peers = (group == group[i]) & (torch.arange(len(group)) != i)
        torch.testing.assert_close(row, (outcome[i] - outcome[peers].mean()).expand(len(row)), rtol=0, atol=1e-12)
    first = got[cu_seqlens[:-1]]
    for g in group.unique():
        assert abs(first[group == g].sum()) < 1e-12
        if len(outcome[group == g].unique()) == 1:
            assert not first[group == g].any()


@given(batches())
@settings(max_examples=25, deadline=None)
def test_process_returns(batch):
    prm, ref, _, cu_seqlens, group = batch
    lengths = cu_seqlens.diff()
    returns = prime_advantage(*batch, outcome_weight=0, **RAW).advantage
    means = segment_sum(prm - ref, cu_seqlens) / lengths
    for i in range(len(group)):
        peers = (group == group[i]) & (torch.arange(len(group)) != i)
        want = lengths[i] * (means[i] - means[peers].mean())
        torch.testing.assert_close(returns[cu_seqlens[i]], want, rtol=0, atol=1e-10)
    row_mean = returns[cu_seqlens[:-1]] / lengths
    for g in group.unique():
        assert abs(row_mean[group == g].sum()) < 1e-10


@given(batches(), st.floats(-2, 2))
@settings(max_examples=25, deadline=None)
def test_a_constant_added_to_a_group_changes_nothing(batch, constant):
    prm, _, _, cu_seqlens, group = batch
    shift = constant * (group == group[0]).double().repeat_interleave(cu_seqlens.diff())
    before = prime_advantage(*batch, **RAW).advantage
    after = prime_advantage(prm + shift, *batch[1:], **RAW).advantage
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)


@given(batches())
@settings(max_examples=25, deadline=None)
def test_run_form_minus_paper_form(batch):
    prm, ref, _, cu_seqlens, group = batch
    difference = prime_advantage(*batch, **RAW).advantage - prime_advantage(*batch, form="paper", **RAW).advantage
    for i, (q, got) in enumerate(
        zip((prm - ref).split(cu_seqlens.diff().tolist()), difference.split(cu_seqlens.diff().tolist()), strict=True)
    ):
        centered = (q - q.mean()).flip(0).cumsum(0).flip(0) / ((group == group[i]).sum() - 1)
        torch.testing.assert_close(got, centered, rtol=0, atol=1e-10)
        assert abs(got[0]) < 1e-10


@given(batches(), st.floats(0.5, 20))
@settings(max_examples=25, deadline=None)
def test_whitening(batch, scale):
    result = prime_advantage(*batch).advantage
    raw = prime_advantage(*batch, whiten=False).advantage
    assert abs(result.mean()) < 1e-8
    if raw.var() > 0.05:
        assert abs(result.var() - 1) < 1e-6
        scaled = prime_advantage(*batch, process_weight=scale, outcome_weight=scale).advantage
        torch.testing.assert_close(scaled, result, rtol=0, atol=1e-5)


@given(batches(), st.randoms(), st.sampled_from(["rloo", "grpo", "reinforce"]))
@settings(max_examples=40, deadline=None)
def test_packing_order_leaves_no_trace(batch, random, estimator):
    order = list(range(len(batch[4])))
    random.shuffle(order)
    kwargs = {"estimator": estimator, "gamma": 0.9}
    straight, shuffled = prime_advantage(*batch, **kwargs), prime_advantage(*repack(batch, order), **kwargs)
    lengths = batch[3].diff().tolist()
    assert torch.equal(permute(straight.advantage, lengths, order), shuffled.advantage)
    assert torch.equal(permute(straight.token_reward, lengths, order), shuffled.token_reward)
    assert torch.equal(straight.score[order], shuffled.score)


@given(batches(longest=1))
@settings(max_examples=15, deadline=None)
def test_rows_of_one_token(batch):
    result = prime_advantage(*batch)
    assert all(x.isfinite().all() for x in result)
    torch.testing.assert_close(result.token_reward, result.score)


def test_long_rows():
    torch.manual_seed(0)
    lengths = torch.tensor([3000, 1, 1025, 17])
    q = torch.randn(int(lengths.sum()), dtype=torch.float64)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    kwargs = {"outcome_weight": 0.0, "estimator": "reinforce"} | RAW
    got = prime_advantage(q, torch.zeros_like(q), torch.zeros(4), cu_seqlens, torch.zeros(4).long(), **kwargs)
    want = torch.cat([row.flip(0).cumsum(0).flip(0) for row in q.split(lengths.tolist())])
    torch.testing.assert_close(got.advantage, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_grpo_group_of_equal_values_gives_exactly_zero(k):
    value = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).repeat_interleave(k)
    q = torch.stack([value + 1, value - 1], 1).flatten()  # rows differ inside, their means do not
    cu_seqlens, group = torch.arange(0, len(q) + 1, 2), torch.arange(50).repeat_interleave(k)
    got = prime_advantage(0 * q, 0 * q, value, cu_seqlens, group, estimator="grpo", **RAW)
    assert not got.advantage.any()
    got = prime_advantage(q.round(), 0 * q, 0 * value, cu_seqlens, group, estimator="grpo", **RAW)
    assert not got.advantage.any()


def test_disabled_process_ignores_what_the_prm_says():
    nan = torch.full((4,), float("nan"))
    rest = torch.tensor([1.0, 0.0]), torch.tensor([0, 2, 4]), torch.tensor([5, 5])
    with_nan = prime_advantage(nan, nan, *rest, process_weight=0)
    assert torch.equal(with_nan.advantage, prime_advantage(None, None, *rest, process_weight=0).advantage)


def test_reinforce_accepts_a_single_row_and_a_single_token():
    one = torch.ones(1)
    result = prime_advantage(one, one * 2, one, torch.tensor([0, 1]), torch.tensor([3]), estimator="reinforce")
    assert all(x.isfinite().all() for x in result)


def _rank(rank, path, halves, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    result = prime_advantage(*halves[rank], gamma=0.9, process_group=dist.group.WORLD)
    queue.put((rank, result.advantage.tolist()))
    dist.barrier()  # a rank that leaves early aborts the other
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    args, _ = packed(CASES["c04_K8"])
    prm, ref, outcome, cu_seqlens, group = args
    cut = int(cu_seqlens[8])
    halves = [
        (prm[:cut], ref[:cut], outcome[:8], cu_seqlens[:9], group[:8]),
        (prm[cut:], ref[cut:], outcome[8:], cu_seqlens[8:] - cut, group[8:]),
    ]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(r, tmp_path / "store", halves, queue)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)  # not its exit code: gloo may abort a process that tears its group down under load
    parts = {}
    while not queue.empty():
        rank, values = queue.get()
        parts[rank] = values
    assert set(parts) == {0, 1}
    got = torch.tensor(parts[0] + parts[1], dtype=torch.float64)
    torch.testing.assert_close(got, prime_advantage(*args, gamma=0.9).advantage, rtol=0, atol=1e-12)


def _valid():
    return {
        "prm_logprob": torch.zeros(6),
        "ref_logprob": torch.zeros(6),
        "outcome": torch.tensor([0.0, 1.0, 1.0]),
        "cu_seqlens": torch.tensor([0, 2, 3, 6], dtype=torch.int32),
        "group": torch.tensor([4, 4, 4]),
    }


NAN = torch.tensor([0.0, 0.0, float("nan"), 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 2, 2, 6])}, "row 1 has no token: drop"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 6])}, "cu_seqlens falls after row 1: pass the running sum"),
        ({"cu_seqlens": torch.tensor([1, 2, 3, 6])}, "cu_seqlens runs from 1 to 6, needs 0 to 6"),
        ({"cu_seqlens": torch.tensor([0, 2, 3, 5])}, "cu_seqlens runs from 0 to 5, needs 0 to 6"),
        ({"cu_seqlens": torch.tensor([0, 2, 6])}, r"cu_seqlens has shape \(3\), needs \(4\): one entry more than"),
        ({"cu_seqlens": torch.tensor([0.0, 2, 3, 6])}, "cu_seqlens is torch.float32, needs torch.int32 or"),
        ({"group": torch.tensor([4, 4, 9])}, "group 9 has one row, row 2: rloo compares"),
        ({"group": torch.tensor([4, 9, 4]), "estimator": "grpo"}, "group 9 has one row, row 1: grpo compares"),
        ({"group": torch.tensor([4, 4])}, r"group has shape \(2\), needs \(3\)"),
        ({"group": torch.tensor([4, 4, 4]).int()}, "group is torch.int32, needs torch.int64"),
        ({"outcome": torch.tensor([0.0, float("inf"), 1.0])}, "outcome is inf in row 1"),
        ({"outcome": torch.tensor([False, True, True])}, r"outcome is torch.bool.* pass outcome.to\(torch.float32\)"),
        ({"prm_logprob": NAN}, "prm_logprob is nan in row 1: drop the row"),
        ({"ref_logprob": NAN.roll(1)}, "ref_logprob is nan in row 2"),
        ({"ref_logprob": torch.zeros(5)}, r"ref_logprob has shape \(5\), needs \(6\)"),
        ({"prm_logprob": torch.zeros(6).half()}, "prm_logprob is torch.float16, needs torch.float32 or"),
        ({"prm_logprob": None, "ref_logprob": None}, "pass both, or neither with process_weight=0"),
        ({"ref_logprob": None, "process_weight": 0}, "pass both, or neither with process_weight=0"),
        ({"estimator": "ppo"}, "estimator is 'ppo', needs one of rloo, grpo, reinforce"),
        ({"form": "code"}, "form is 'code'"),
        ({"normalize": True}, "normalize is True"),
        ({"gamma": 1.5}, "gamma is 1.5, needs 0 <= gamma <= 1"),
        ({"outcome_gamma": -0.1}, "outcome_gamma is -0.1"),
        ({"beta": 0.0}, "beta is 0.0, needs a number above 0"),
        ({"outcome": torch.zeros(0), "cu_seqlens": torch.zeros(1).int(), "group": torch.zeros(0).long()}, "no rows"),
        ({"outcome": [0.0, 1.0, 1.0]}, "outcome is a list, needs a torch.Tensor"),
        ({"outcome": torch.zeros(3, device="meta")}, "is on cpu, the other arguments on meta"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        prime_advantage(**_valid() | change)
