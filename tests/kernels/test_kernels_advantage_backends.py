"""prime_advantage on every back-end against the float64 reference. How: advantage_backends.py."""

import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from advantage_backends import (
    BACKENDS,
    BAD_OFFSETS,
    DEVICE,
    EXAMPLES,
    INTERPRETING,
    LONG,
    LONG_GROUP,
    check,
    emulator,
    group_of_one,
    margins,
    prime_advantage,
    ragged,
    run_again,
    single,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_advantage import CASES, batches, options, packed, permute, repack

from prime_kernels import advantage, advantage_cuda

__all__ = ["emulator", "group_of_one", "margins"]  # fixtures
KINDS = [("rloo", "run"), ("rloo", "paper"), ("grpo", "run"), ("reinforce", "run")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_vectors(name, backend):
    case = CASES[name]
    args, pack = packed(case)
    args, kwargs = single(args), options(case["inputs"])
    got = prime_advantage(*args, whiten=False, backend=backend, **kwargs).advantage
    torch.testing.assert_close(got.double(), pack(case["prime_repo"]["returns"]), rtol=0, atol=2e-6)
    got = prime_advantage(*args, backend=backend, **kwargs).advantage
    torch.testing.assert_close(got.double(), pack(case["prime_repo"]["advantages"]), rtol=0, atol=5e-6)
    kwargs |= {"outcome_gamma": 1.0, "form": "paper", "whiten": False}
    got = prime_advantage(*args, backend=backend, **kwargs).advantage
    torch.testing.assert_close(got.double(), pack(case["paper_readme_returns"]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    batches(longest=40),
    st.sampled_from([0.0, 0.5, 0.97, 1 - 1e-9, 1.0]),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.sampled_from(KINDS),
    st.sampled_from(["batch", "none"]),
    st.booleans(),
    st.sampled_from([(1.0, 1.0), (5.0, 0.5), (1.0, 0.0), (0.0, 1.0)]),
)
def test_equals_the_reference(backend, batch, gamma, outcome_gamma, kind, normalize, whiten, weights):
    check(
        single(batch), backend, gamma=gamma, outcome_gamma=outcome_gamma, estimator=kind[0], form=kind[1],
        normalize=normalize, whiten=whiten, process_weight=weights[0], outcome_weight=weights[1],
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.999, 1.0])
def test_rows_longer_than_a_tile(backend, kind, gamma):
    kwargs = {"estimator": kind[0], "form": kind[1], "gamma": gamma, "outcome_gamma": 0.998}
    check(ragged(LONG, LONG_GROUP), backend, **kwargs)
    check(ragged(LONG, LONG_GROUP), backend, normalize="none", whiten=False, beta=2.0, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whitening_small_differences_on_a_large_constant(backend):
    """Moments of all tokens without a second look at them: the squares lose seven digits and still need five."""
    batch = ragged([20, 30, 10, 25], [1, 2, 1, 2])
    batch[2] = torch.full((4,), 1000.0)
    check(batch, backend, estimator="reinforce", normalize="none", beta=0.01, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_any_size(backend):
    """One of 70 rows, more than a warp's list holds, among groups of 2 and 3; ids in any order."""
    group = torch.cat([torch.full((70,), 2**40), torch.tensor([-1, -1, 0, 0, 0])])
    group = group[torch.randperm(75, generator=torch.Generator().manual_seed(1))].tolist()
    batch = ragged([1 + i % 4 for i in range(75)], group)
    for kind in KINDS:
        check(batch, backend, estimator=kind[0], form=kind[1])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(batches(longest=60), st.randoms(), st.sampled_from(KINDS), st.sampled_from([0.9, 1.0]))
def test_packing_order_leaves_no_trace(backend, batch, random, kind, gamma):
    batch, order = single(batch), list(range(len(batch[4])))
    random.shuffle(order)
    kwargs = {"estimator": kind[0], "form": kind[1], "gamma": gamma, "backend": backend}
    straight, shuffled = prime_advantage(*batch, **kwargs), prime_advantage(*repack(batch, order), **kwargs)
    lengths = batch[3].diff().tolist()
    assert torch.equal(permute(straight.advantage, lengths, order), shuffled.advantage)
    assert torch.equal(permute(straight.token_reward, lengths, order), shuffled.token_reward)
    assert torch.equal(straight.score[order], shuffled.score)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_order_of_long_rows_leaves_no_trace(backend):
    batch, order = ragged(LONG, LONG_GROUP), [3, 0, 5, 1, 4, 2]
    straight = prime_advantage(*batch, backend=backend, gamma=0.99)
    shuffled = prime_advantage(*repack(batch, order), backend=backend, gamma=0.99)
    assert torch.equal(permute(straight.advantage, batch[3].diff().tolist(), order), shuffled.advantage)


@pytest.mark.skipif(INTERPRETING or bool(DEVICE), reason="of the emulated CUDA kernel")
@pytest.mark.parametrize("kind", KINDS)
def test_order_of_threads_and_number_of_blocks_leave_no_trace(emulator, kind):
    batch, results = ragged(LONG + [7, 9, 11], [5, -9, 5, -9, 5, -9, 8, 8, 8]), []
    for emulator.blocks, emulator.seed in [(1, 0), (2, 1), (3, 5), (9, 7)]:
        launches = emulator.launches
        results.append(prime_advantage(*batch, backend="cuda", estimator=kind[0], form=kind[1], gamma=0.99))
        assert emulator.launches == launches + 1
    emulator.blocks, emulator.seed = 2, 0
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(INTERPRETING, reason="the interpreter computes bfloat16 wrongly")
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_the_float32_of_its_values(backend):
    half = ragged(LONG, LONG_GROUP, dtype=torch.bfloat16)
    whole = prime_advantage(*single(half), backend=backend, gamma=0.99)
    for got in (
        prime_advantage(*half, backend=backend, gamma=0.99),
        prime_advantage(half[0], half[1].float(), *half[2:], backend=backend, gamma=0.99),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_prm_equal_to_ref_gives_exactly_no_process_reward(backend):
    _, ref, *rest = ragged([5, 3, 9, 1], [1, 2, 1, 2])
    got = prime_advantage(ref, ref, *rest, whiten=False, backend=backend)
    alone = prime_advantage(None, None, *rest, process_weight=0, whiten=False, backend=backend)
    assert not got.token_reward.any() and not got.score.any()
    assert torch.equal(got.advantage, alone.advantage)
    assert not alone.token_reward.any() and not alone.score.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [2, 3, 7])
def test_equal_values_in_a_group_give_exactly_zero(backend, k):
    value = torch.rand(3, generator=torch.Generator().manual_seed(0)).repeat_interleave(k)
    args = 0 * value, 0 * value, value, torch.arange(3 * k + 1), torch.arange(3).repeat_interleave(k)
    for kind in KINDS[:3]:
        got = prime_advantage(*args, estimator=kind[0], form=kind[1], whiten=False, backend=backend)
        assert not got.advantage.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_disabled_process_ignores_nan(backend):
    nan, rest = (
        torch.full((4,), float("nan")),
        (torch.tensor([1.0, 0.0]), torch.tensor([0, 2, 4]), torch.tensor([5, 5])),
    )
    got = prime_advantage(nan, nan, *rest, process_weight=0, backend=backend)
    assert torch.equal(got.advantage, prime_advantage(None, None, *rest, process_weight=0, backend=backend).advantage)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    batch = ragged([5, 3, 9, 1], [1, 2, 1, 2])
    want = prime_advantage(*batch, backend=backend)
    spread = torch.stack([batch[0], batch[1]], 1)
    got = prime_advantage(spread[:, 0], spread[:, 1], batch[2], batch[3].long(), batch[4], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def bad(field, index, value):
    batch = ragged([2, 3, 1, 4], [4, 4, 9, 9])
    batch[field][index] = value
    return batch


BAD = [
    (bad(3, 2, 2), {}, "row 1 has no token: drop"),
    (bad(3, 2, 1), {}, "cu_seqlens falls after row 1"),
    (bad(3, 0, 1), {}, "cu_seqlens runs from 1 to 10"),
    (bad(3, 4, 8), {}, "cu_seqlens runs from 0 to 8"),
    (bad(3, 4, 2**31 - 1), {}, "cu_seqlens runs from 0 to 2147483647"),
    (bad(4, 3, 5), {}, "group 5 has one row, row 3: rloo"),
    (bad(4, 3, 5), {"estimator": "grpo"}, "group 5 has one row, row 3: grpo"),
    (bad(2, 2, float("inf")), {}, "outcome is inf in row 2"),
    (bad(2, 2, float("nan")), {"process_weight": 0.0}, "outcome is nan in row 2"),
    (bad(0, 5, float("nan")), {}, "prm_logprob is nan in row 2"),
    (bad(1, 9, float("-inf")), {}, "ref_logprob is -inf in row 3"),
    (bad(1, 9, 3.4e38), {"beta": 2.0}, "leaves the range of float32"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "kwargs", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_bad_value_is_an_error_that_names_the_row(backend, batch, kwargs, message):
    with pytest.raises(ValueError, match=message):
        prime_advantage(*batch, backend=backend, **kwargs)
    check(ragged([2, 3, 1, 4], [4, 4, 9, 9]), backend)  # and leaves nothing behind


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("several_ranks", [False, True])
@pytest.mark.parametrize("offsets", BAD_OFFSETS)
def test_bad_offsets_are_an_error_and_nothing_is_written_outside(
    backend, several_ranks, offsets, margins, group_of_one
):
    process_group = group_of_one if several_ranks else None
    for dtype in (torch.int32, torch.int64):
        if dtype == torch.int32 and max(BAD_OFFSETS[offsets]) >= 2**31:
            continue
        cu_seqlens = torch.tensor(BAD_OFFSETS[offsets], dtype=dtype)
        for process_weight, with_prm in ((1.0, True), (0.0, True), (0.0, False)):
            if not with_prm and offsets in ("short", "long"):
                continue  # as many tokens as they say
            prm, ref, outcome, _, group = ragged([2, 3, 1, 4], [4, 4, 9, 9])
            given = (prm, ref) if with_prm else (None, None)
            with pytest.raises(ValueError, match="cu_seqlens|no token"):
                prime_advantage(
                    *given, outcome, cu_seqlens, group, process_weight=process_weight, process_group=process_group,
                    backend=backend,
                )  # fmt: skip
    assert margins()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_and_one_row(backend):
    check(ragged([1], [3]), backend, estimator="reinforce", outcome_gamma=0.5)
    check(ragged([1, 1], [3, 3]), backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_what_must_read_from_the_gpu_is_refused_under_graph_capture(monkeypatch, backend, group_of_one):
    monkeypatch.setattr(advantage, "capturing", lambda: True)
    prm, ref, *rest = ragged([2, 3, 1, 4], [4, 4, 9, 9])
    calls = [(None, None, {"process_weight": 0.0}), (prm, ref, {"process_group": group_of_one})]
    for *logprobs, more in calls if backend != "torch" else [*calls, (prm, ref, {})]:
        with pytest.raises(ValueError, match="a CUDA graph cannot capture: pass prm_logprob, no process_group, and"):
            prime_advantage(*logprobs, *rest, backend=backend, **more)
    if backend != "torch":
        assert prime_advantage(prm, ref, *rest, backend=backend).advantage.isfinite().all()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cpu"])
@pytest.mark.parametrize(("batch", "kwargs", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_bad_value_under_graph_capture_leaves_no_number_to_use(monkeypatch, backend, batch, kwargs, message):
    module = advantage_cuda if backend == "cuda" else sys.modules["prime_kernels.advantage_triton"]
    monkeypatch.setattr(module, "capturing", lambda: True)
    assert prime_advantage(*batch, backend=backend, **kwargs).advantage.isnan().all()


def _distributed(rank, path, halves, backend, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=len(halves))
    results = [
        prime_advantage(*halves[rank], gamma=0.9, estimator=e, process_group=dist.group.WORLD, backend=backend)
        for e in ("rloo", "grpo")
    ]
    queue.put((rank, [result.advantage.tolist() for result in results]))
    dist.destroy_process_group()


@pytest.mark.skipif(INTERPRETING or bool(DEVICE), reason="the process group of one covers it")
def test_two_ranks_equal_one(tmp_path):
    lengths, group = [30, 20, 25, 15, 9, 40], [1, 2, 1, 2, 7, 7]
    batch = ragged(lengths, group)
    cut = sum(lengths[:4])
    halves = [
        [batch[0][:cut], batch[1][:cut], batch[2][:4], batch[3][:5], batch[4][:4]],
        [batch[0][cut:], batch[1][cut:], batch[2][4:], batch[3][4:] - cut, batch[4][4:]],
    ]
    backend = "cpu"
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    arguments = (tmp_path / "store", halves, backend, queue)
    ranks = [context.Process(target=_distributed, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(90)
        assert process.exitcode == 0
    parts = dict(queue.get() for _ in ranks)
    for i, estimator in enumerate(("rloo", "grpo")):
        want = prime_advantage(*batch, gamma=0.9, estimator=estimator, backend=backend).advantage
        got = torch.tensor(parts[0][i] + parts[1][i])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_process_group_of_one_changes_nothing(backend, group_of_one, emulator):
    launches = emulator and emulator.launches
    for kind in KINDS:
        kwargs = {"estimator": kind[0], "form": kind[1], "gamma": 0.9, "backend": backend}
        batch = ragged(LONG, LONG_GROUP)
        got = prime_advantage(*batch, process_group=group_of_one, **kwargs)
        torch.testing.assert_close(tuple(got), tuple(prime_advantage(*batch, **kwargs)), rtol=0, atol=1e-6)
    if emulator and backend == "cuda":
        assert emulator.launches == launches + 3 * len(KINDS)  # two with a group, one without
    for batch, kwargs, message in BAD:
        with pytest.raises(ValueError, match=message):
            prime_advantage(*batch, backend=backend, process_group=group_of_one, **kwargs)


@pytest.mark.parametrize("backend", ["triton"] if INTERPRETING else [None, "cpu", "torch"])
@pytest.mark.parametrize("with_prm", [True, False])
@pytest.mark.parametrize("credit", ["published", "td"])
def test_opcheck(backend, with_prm, credit):
    prm, ref, *rest = ragged([3, 2, 4, 1], [1, 1, 2, 2])
    given = (prm, ref, *rest) if with_prm else (None, None, *rest)
    weight = 1.0 if with_prm else 0.0
    torch.library.opcheck(
        torch.ops.prime_kernels.prime_advantage,
        (
            *given,
            0.05,
            0.9,
            1.0,
            weight,
            1.0,
            "rloo",
            "run",
            "batch",
            True,
            "published",
            None,
            0.0,
            0.5,
            0.0,
            0.0,
            None,
            backend,
        ),
    )


@pytest.mark.skipif(INTERPRETING or bool(DEVICE), reason="the graph holds the op, whatever the back-end")
@pytest.mark.parametrize("backend", [None, "torch"])
def test_compiles_to_one_graph(backend):
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")  # the graph is what is tested, not its code
    def step(prm, ref, outcome, cu_seqlens, group):
        result = prime_advantage(prm * 2, ref * 2, outcome, cu_seqlens, group, gamma=0.9, backend=backend)
        return result.advantage * 3, result.score

    for lengths, group in ([3, 2, 4, 1], [1, 1, 2, 2]), ([6, 5], [3, 3]):
        prm, ref, *rest = ragged(lengths, group)
        want = prime_advantage(2 * prm, 2 * ref, *rest, gamma=0.9, backend=backend)
        got = step(prm, ref, *rest)
        torch.testing.assert_close(got, (want.advantage * 3, want.score))
    with pytest.raises(ValueError, match="prm_logprob is nan in row 1"):
        step(torch.tensor([0.0, float("nan")]), torch.zeros(2), torch.ones(2), torch.arange(3), torch.ones(2).long())


@pytest.mark.skipif(INTERPRETING or bool(DEVICE), reason="this is what runs it")
def test_triton_in_the_interpreter():
    pytest.importorskip("triton", reason="pip install triton==3.7.1")
    run_again(__file__, 50, TRITON_INTERPRET="1")


@pytest.mark.skipif(INTERPRETING or bool(DEVICE), reason="this is what runs it")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_this_gpu():
    run_again(__file__, 50, PRIME_KERNELS_TEST_DEVICE="cuda")
