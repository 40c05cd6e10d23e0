import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_fast.prime import (
    area_under_curve,
    keep_groups,
    length_correlation,
    pair_accuracy,
    pair_loss,
    policy_loss,
    prm_intercept,
    prm_loss,
)
from prime_kernels.reference import policy_token_loss

VECTORS = json.loads((Path(__file__).parent / "vectors" / "prime_vectors.json").read_text())
CASES = {case["name"]: case for case in VECTORS["cases"]}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def packed(case):
    inputs = case["inputs"]
    mask = torch.tensor(inputs["response_mask"]).bool()
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    prm = tensor(inputs["prm_logprobs"])[mask].requires_grad_()
    return prm, tensor(inputs["ref_logprobs"])[mask], tensor(inputs["acc"]), cu_seqlens, mask


@pytest.mark.parametrize("name", CASES)
def test_prm_loss_vectors(name):
    case = CASES[name]
    beta, k = case["inputs"]["beta"], case["inputs"]["K"]
    prm, ref, outcome, cu_seqlens, mask = packed(case)
    loss = prm_loss(prm, ref, outcome, cu_seqlens, beta=beta)
    loss.backward()
    assert loss.item() == pytest.approx(case["prime_repo"]["ce_loss"], abs=1e-9)
    want = tensor(case["verl_recipe"]["ce_loss_grad_wrt_prm_logprobs"])[mask]
    torch.testing.assert_close(prm.grad, want, rtol=0, atol=1e-9)
    dpo = prm_loss(prm, ref, outcome, cu_seqlens, beta=beta, kind="dpo", group=torch.arange(len(outcome)) // k)
    assert dpo.item() == pytest.approx(case["verl_recipe"]["detached_dpo_loss"]["none"], abs=1e-9)


@pytest.mark.parametrize("case", VECTORS["ppo_clip_cases"], ids=["first", "second"])
def test_policy_loss_vectors(case):
    mask = torch.tensor(case["mask"]).bool()
    logprob = tensor(case["logprobs"])[mask].requires_grad_()
    old, advantage = tensor(case["old_logprobs"])[mask], tensor(case["advantages"])[mask]
    clip = case["clip_ratio"]
    token_mean = torch.full_like(old, 1 / len(old))
    loss = policy_loss(logprob, old, advantage, token_mean, clip_low=clip, clip_high=clip)
    loss.backward()
    assert loss.item() == pytest.approx(case["pg_loss"], abs=1e-9)
    torch.testing.assert_close(logprob.grad, tensor(case["grad_wrt_logprobs"])[mask], rtol=0, atol=1e-9)
    assert (old - logprob).mean().item() == pytest.approx(case["ppo_kl"], abs=1e-9)
    clipped = policy_token_loss(logprob, old, advantage, clip, clip)[1]
    assert clipped.double().mean().item() == pytest.approx(case["pg_clipfrac"], abs=1e-7)  # recorded in float32


@pytest.mark.parametrize("case", VECTORS["filter_cases"], ids=["truncated", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filter_vectors(case, dtype):
    outcome = torch.tensor(case["acc"], dtype=dtype).flatten()
    group = torch.arange(len(outcome)) // case["K"]
    lengths, longest = torch.tensor(case["response_lengths"]).flatten(), case["max_response_length"]
    for code, limit in (("prime_repo_keep_group", longest), ("verl_recipe_keep_group", longest - 1)):
        truncated = lengths >= limit if case["filter_truncated"] else None
        keep = keep_groups(outcome, group, low=case["lower"], high=case["upper"], truncated=truncated)
        assert torch.equal(keep, torch.tensor(case[code]).repeat_interleave(case["K"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", range(2, 17))
def test_filter_bounds_are_inclusive(dtype, k):
    groups = [[1.0] * correct + [0.0] * (k - correct) for correct in range(k + 1)]
    outcome = torch.tensor(groups, dtype=dtype).flatten()
    group = torch.arange(k + 1).repeat_interleave(k) * 11 - 5
    want = torch.tensor([k <= 5 * correct <= 4 * k for correct in range(k + 1)]).repeat_interleave(k)
    order = torch.randperm(len(group))
    assert torch.equal(keep_groups(outcome[order], group[order]), want[order])
    if k in (4, 5):
        assert want.sum() == k * (k - 1)


def test_filter_takes_fractions_at_the_bound():
    assert keep_groups(torch.full((10,), 0.2), torch.zeros(10).long()).all()
    assert keep_groups(torch.full((10,), 0.8), torch.zeros(10).long()).all()
    assert not keep_groups(torch.full((10,), 0.81), torch.zeros(10).long()).any()


@st.composite
def batches(draw):
    lengths = torch.tensor(draw(st.lists(st.integers(1, 6), min_size=1, max_size=12)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    prm, ref = -torch.rand(2, int(cu_seqlens[-1]), generator=generator, dtype=torch.float64) * 40
    outcome = torch.randint(0, 5, lengths.shape, generator=generator) / 4
    group = torch.randint(-2, 2, lengths.shape, generator=generator)
    return prm.requires_grad_(), ref, outcome.double(), cu_seqlens, group


@given(batches(), st.floats(0.01, 1))
@settings(max_examples=30, deadline=None)
def test_prm_gradient(batch, beta):
    prm, ref, outcome, cu_seqlens, _ = batch
    score = beta * torch.stack([q.sum() for q in (prm - ref).split(cu_seqlens.diff().tolist())])
    prm_loss(prm, ref, outcome, cu_seqlens, beta=beta).backward()
    want = beta * (score.sigmoid() - outcome) / len(outcome)
    torch.testing.assert_close(prm.grad, want.repeat_interleave(cu_seqlens.diff()), rtol=0, atol=1e-12)


@given(batches())
@settings(max_examples=30, deadline=None)
def test_prm_equal_to_ref_has_loss_ln_2(batch):
    prm, _, outcome, cu_seqlens, _ = batch
    loss = prm_loss(prm, prm.detach().clone(), outcome, cu_seqlens)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    want = 0.05 * (0.5 - outcome) / len(outcome)
    torch.testing.assert_close(prm.grad, want.repeat_interleave(cu_seqlens.diff()), rtol=0, atol=1e-15)


def test_large_scores_keep_their_gradient():
    prm = torch.full((1,), 2000.0, requires_grad=True)
    prm_loss(prm, torch.zeros(1), torch.zeros(1), torch.tensor([0, 1]), beta=1.0).backward()
    assert prm.grad.item() == 1.0


@given(batches())
@settings(max_examples=30, deadline=None)
def test_dpo(batch):
    prm, ref, outcome, cu_seqlens, group = batch
    got = prm_loss(prm, ref, outcome, cu_seqlens, kind="dpo", group=group)
    score = 0.05 * torch.stack([q.sum() for q in (prm - ref).split(cu_seqlens.diff().tolist())])
    loss = 0
    for i, o in enumerate(outcome):
        opposite = (group == group[i]) & ((outcome < o) if o > 0 else (outcome > o))
        other = score[opposite].detach().mean() if opposite.any() else 0
        loss = loss - torch.nn.functional.logsigmoid((1 if o > 0 else -1) * (score[i] - other)) / len(outcome)
    torch.testing.assert_close(got, loss)
    torch.testing.assert_close(torch.autograd.grad(got, prm), torch.autograd.grad(loss, prm))


@given(batches())
@settings(max_examples=30, deadline=None)
def test_prefix(batch):
    prm, ref, outcome, cu_seqlens, group = batch
    intercept = prm_intercept(outcome, group)
    for i, g in enumerate(group):
        others = outcome[group == g]
        share = (others.sum() + 0.5) / (len(others) + 1)
        torch.testing.assert_close(intercept[i].sigmoid(), share, rtol=0, atol=1e-12)
    got = prm_loss(prm, ref, outcome, cu_seqlens, beta=0.3, kind="prefix", intercept=intercept)
    want = torch.autograd.grad(got, prm)[0].split(cu_seqlens.diff().tolist())
    rows = (prm - ref).detach().split(cu_seqlens.diff().tolist())
    for q, o, a, gradient in zip(rows, outcome, intercept, want, strict=True):
        error = (a + 0.3 * q.cumsum(0)).sigmoid() - o
        expected = 0.3 * error.flip(0).cumsum(0).flip(0) / len(q) / len(outcome)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_the_prefix_loss_of_single_tokens_with_even_odds_is_the_plain_one():
    q, outcome = tensor([3.0, -2.0, 0.1]), tensor([1.0, 0.0, 0.3])
    args = q, torch.zeros_like(q), outcome, torch.tensor([0, 1, 2, 3])
    for kind in ("centered", "prefix"):
        torch.testing.assert_close(prm_loss(*args, kind=kind, intercept=torch.zeros(3)), prm_loss(*args))


def test_dpo_without_an_opposite_is_a_plain_log_sigmoid():
    q = tensor([3.0, -2.0])
    args = q, torch.zeros_like(q), torch.ones(2), torch.tensor([0, 1, 2])
    got = prm_loss(*args, beta=0.1, kind="dpo", group=torch.tensor([0, 0]))
    torch.testing.assert_close(got, -torch.nn.functional.logsigmoid(0.1 * q).mean())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "nca"}, "kind is 'nca', needs 'ce', 'dpo', 'centered' or 'prefix'"),
        ({"kind": "dpo"}, "pass group"),
        ({"kind": "prefix"}, "pass intercept"),
        ({"kind": "centered"}, "pass intercept"),
    ],
)
def test_prm_loss_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        prm_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.tensor([0, 1]), **kwargs)


@given(batches())
@settings(max_examples=30, deadline=None)
def test_pair_accuracy(batch):
    _, _, outcome, _, group = batch
    score = (outcome * 7).sin().round(decimals=1)
    correct, pairs = pair_accuracy(score, outcome, group)
    rows = range(len(group))
    ordered = [(i, j) for i in rows for j in rows if group[i] == group[j] and outcome[i] > outcome[j]]
    want = [1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0 for i, j in ordered]
    assert (correct, pairs) == (sum(want), len(want))


def test_length_correlation():
    """That within groups, whatever lies between them; as NumPy has it for one group."""
    random = torch.Generator().manual_seed(0)
    length, outcome = torch.randint(1, 99, (40,), generator=random), torch.rand(40, generator=random)
    one = torch.zeros(40).long()
    wanted = float(torch.corrcoef(torch.stack([length.double(), outcome.double()]))[0, 1])
    assert length_correlation(length, outcome, one) == pytest.approx(wanted)
    group = torch.arange(40) % 4
    assert length_correlation(length + 1000 * group, 0.001 * length + group, group) == pytest.approx(1)
    assert length_correlation(length, -2.0 * length, group) == pytest.approx(-1)
    assert length_correlation(7 * group, outcome, group) is None  # lengths differ between groups alone
    assert length_correlation(length, group / 3, group) is None


def test_pair_accuracy_without_pairs():
    assert pair_accuracy(torch.rand(3), torch.ones(3), torch.zeros(3).long()) == (0.0, 0)


@pytest.mark.parametrize("levels", [3, 1000])
def test_area_under_curve_counts_pairs(levels):
    generator = torch.Generator().manual_seed(levels)
    right = torch.randint(0, levels, (40,), generator=generator).float() + 1
    wrong = torch.randint(0, levels, (25,), generator=generator).float()
    pairs = right[:, None] - wrong[None, :]
    expected = ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean()
    assert area_under_curve(right, wrong) == pytest.approx(float(expected), abs=1e-12)


def test_importing_prime_needs_no_trainer():
    import subprocess
    import sys

    code = "import sys, prime_fast.prime; assert not {'deepspeed', 'vllm', 'transformers', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pair_loss_is_the_mean_over_pairs_of_a_group():
    draw = torch.Generator().manual_seed(0)
    score = torch.randn(12, generator=draw, dtype=torch.float64, requires_grad=True)
    outcome = torch.tensor([0.0, 1.0, 0.5, 0.5] * 3)
    group = torch.tensor([4, 7, 4, 7, 4, 9, 7, 7, 4, 4, 9, 1])
    pairs = [(i, j) for i in range(12) for j in range(12) if group[i] == group[j] and outcome[i] > outcome[j]]
    expected = sum(-(score[i] - score[j]).sigmoid().log() for i, j in pairs) / len(pairs)
    loss = pair_loss(score, outcome, group)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, score, retain_graph=True)[0] for x in (loss, expected)))
    with pytest.raises(ValueError, match="no pair"):
        pair_loss(score, torch.ones(12), group)
