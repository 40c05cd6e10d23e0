"""Credit forms of prime_advantage on every back-end against the float64 reference. How: advantage_backends.py."""

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
    double,
    emulator,
    group_of_one,
    margins,
    prime_advantage,
    ragged,
    run_again,
    single,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_advantage import batches, permute, repack
from test_kernels_credit import steps_of

from prime_kernels import advantage_credit
from prime_kernels.reference_credit import CREDITS

__all__ = ["emulator", "group_of_one", "margins"]  # fixtures
RICH = {"beta": 0.2, "slope": 0.3, "drift": 0.02, "shrink": 1.5, "prior": 0.4, "gamma": 0.95, "outcome_gamma": 0.999}
QUIET = RICH | {"drift": 0.0}
SMALL = [2, 3, 1, 4], [4, 4, 9, 9]
SLOW = ("lookahead", "odds", "td")  # whose code holds that of the others, for simulators and interpreters
PAIRS = [(b, c) for b in BACKENDS for c in CREDITS if b == "cpu" or DEVICE or c in SLOW]


@pytest.mark.parametrize(("backend", "credit"), PAIRS)
@settings(max_examples=EXAMPLES // 4, deadline=None)
@given(data=st.data())
def test_equals_the_reference(backend, credit, data):
    batch = data.draw(batches(longest=40))
    step = steps_of(batch[3], data.draw(st.integers(0, 1000))) if data.draw(st.booleans()) else None
    draw = lambda low, high: data.draw(st.floats(low, high))  # noqa: E731
    check(
        single(batch), backend, credit=credit, step=step, whiten=data.draw(st.booleans()), beta=draw(0.01, 2),
        slope=draw(0, 3), drift=draw(-1, 1), shrink=draw(0, 3), prior=draw(0.05, 0.95),
        gamma=data.draw(st.sampled_from([0.0, 0.9, 1.0])), outcome_gamma=data.draw(st.sampled_from([0.0, 0.9, 1.0])),
        process_weight=draw(0.1, 2), outcome_weight=draw(0, 2),
    )  # fmt: skip


@pytest.mark.parametrize(("backend", "credit"), PAIRS)
@pytest.mark.parametrize("segment", [False, True])
def test_rows_longer_than_a_tile(backend, credit, segment):
    batch = ragged(LONG, LONG_GROUP)
    step = steps_of(batch[3], 1) if segment else None
    order = [3, 0, 5, 1, 4, 2]
    lengths = batch[3].diff().tolist()
    straight = check(batch, backend, credit=credit, step=step, **RICH)
    shuffled = prime_advantage(
        *repack(batch, order), credit=credit, step=permute(step, lengths, order) if segment else None,
        backend=backend, **RICH,
    )  # fmt: skip
    assert torch.equal(permute(straight.advantage, lengths, order), shuffled.advantage)
    assert torch.equal(permute(straight.token_reward, lengths, order), shuffled.token_reward)
    assert torch.equal(straight.score[order], shuffled.score)


@pytest.mark.parametrize(("backend", "credit"), PAIRS)
@settings(max_examples=EXAMPLES // 8, deadline=None)
@given(batches(longest=60), st.randoms(), st.integers(0, 1000))
def test_packing_order_leaves_no_trace(backend, credit, batch, random, seed):
    batch, order = single(batch), list(range(len(batch[4])))
    random.shuffle(order)
    step, lengths = steps_of(batch[3], seed), batch[3].diff().tolist()
    straight = prime_advantage(*batch, credit=credit, step=step, backend=backend, **RICH)
    shuffled = prime_advantage(
        *repack(batch, order), credit=credit, step=permute(step, lengths, order), backend=backend, **RICH
    )
    assert torch.equal(permute(straight.advantage, lengths, order), shuffled.advantage)
    assert torch.equal(straight.score[order], shuffled.score)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("credit", [name for name in CREDITS if name != "odds"])
def test_neighbours_leave_no_trace(backend, credit):
    """Without whitening nothing but its group reaches a row."""
    batch = ragged(LONG, LONG_GROUP)
    rest = [i for i, group in enumerate(LONG_GROUP) if group == 5]
    all_rows = prime_advantage(*batch, credit=credit, whiten=False, backend=backend, **RICH).advantage
    alone = prime_advantage(*repack(batch, rest), credit=credit, whiten=False, backend=backend, **RICH).advantage
    assert torch.equal(permute(all_rows, batch[3].diff().tolist(), rest), alone)


@pytest.mark.skipif(INTERPRETING or bool(DEVICE), reason="of the emulated CUDA kernel")
@pytest.mark.parametrize("credit", SLOW)
def test_order_of_threads_and_number_of_blocks_leave_no_trace(emulator, credit):
    batch, results = ragged(LONG + [7, 9, 11], [5, -9, 5, -9, 5, -9, 8, 8, 8]), []
    step = steps_of(batch[3], 2)
    for emulator.blocks, emulator.seed in [(1, 0), (2, 1), (5, 7)]:
        launches = emulator.launches
        results.append(prime_advantage(*batch, backend="cuda", credit=credit, step=step, **RICH))
        assert emulator.launches == launches + 1
    emulator.blocks, emulator.seed = 2, 0
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("credit", ["pav", "odds"])
def test_groups_of_any_size(backend, credit):
    group = torch.cat([torch.full((70,), 2**40), torch.tensor([-1, -1, 0, 0, 0])])
    group = group[torch.randperm(75, generator=torch.Generator().manual_seed(1))].tolist()
    check(ragged([1 + i % 4 for i in range(75)], group), backend, credit=credit, **RICH)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter computes bfloat16 wrongly")
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_the_float32_of_its_values(backend):
    half = ragged(LONG, LONG_GROUP, dtype=torch.bfloat16)
    whole = prime_advantage(*single(half), credit="pav", backend=backend, **RICH)
    for prm, ref in ((half[0], half[1]), (half[0], half[1].float())):
        got = prime_advantage(prm, ref, *half[2:], credit="pav", backend=backend, **RICH)
        assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("credit", [name for name in CREDITS if name != "td"])
def test_a_prm_that_says_nothing_is_exactly_no_process_term(backend, credit):
    prm, ref, *rest = ragged(LONG, LONG_GROUP)
    kwargs = {"credit": credit, "whiten": False, "backend": backend}
    alone = prime_advantage(None, None, *rest, **kwargs | QUIET, process_weight=0.0)
    assert not alone.token_reward.any() and not alone.score.any()
    assert torch.equal(prime_advantage(ref, ref, *rest, **kwargs | QUIET).advantage, alone.advantage)
    weightless = prime_advantage(prm, ref, *rest, **kwargs | QUIET, process_weight=0.0)
    assert torch.equal(weightless.advantage, alone.advantage)
    if credit != "odds":
        flat = prime_advantage(prm, ref, *rest, **kwargs | RICH | {"slope": 0.0})
        assert torch.equal(flat.advantage, alone.advantage)


@pytest.mark.parametrize(("backend", "credit"), PAIRS)
def test_values_at_their_limits(backend, credit):
    """A log-ratio that overflows e^x beside a group that always succeeds, or never."""
    batch = ragged([5, 3, 4, 6], [1, 1, 2, 2])
    batch[2] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    batch[0][2], batch[1][9] = -9e4, -9e4
    check(batch, backend, credit=credit, slope=20.0, prior=1e-6, whiten=False)
    check(batch, backend, credit=credit, slope=20.0, prior=1 - 1e-6, whiten=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    batch = ragged([5, 3, 9, 1], [1, 2, 1, 2])
    step = steps_of(batch[3], 0)
    want = prime_advantage(*batch, credit="td", step=step, backend=backend, **RICH)
    logprobs, steps = torch.stack([batch[0], batch[1]], 1), step.long().repeat_interleave(2)[::2]
    got = prime_advantage(
        logprobs[:, 0], logprobs[:, 1], batch[2], batch[3].long(), batch[4], credit="td", step=steps, backend=backend,
        **RICH,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def bad(field, index, value):
    batch = [*ragged(*SMALL), torch.tensor([0, 0, 0, 1, 2, 0, 0, 1, 1, 2])]
    batch[field][index] = value
    return batch


BAD = [
    (bad(2, 2, 1.5), {}, "outcome is 1.5 in row 2"),
    (bad(2, 2, -0.5), {"process_weight": 0.0}, "outcome is -0.5 in row 2"),
    (bad(2, 2, float("nan")), {}, "outcome is nan in row 2"),
    (bad(4, 3, 5), {}, "group 5 has one row, row 3"),
    (bad(0, 5, float("nan")), {}, "prm_logprob is nan in row 2"),
    (bad(1, 9, 3.4e38), {"beta": 2.0}, "leaves the range of float32"),
    (bad(5, 4, 3), {}, r"step\[4\] is 3 in row 1"),
    (bad(5, 4, 3), {"process_weight": 0.0}, r"step\[4\] is 3 in row 1"),
    (bad(5, 4, 0), {}, r"step\[4\] is 0 in row 1"),
    (bad(5, 2, 1), {}, r"step\[2\] is 1 in row 1"),
    (bad(5, 5, -1), {}, r"step\[5\] is -1 in row 2"),
    (bad(5, 9, 2**40), {}, r"step\[9\] is 1099511627776 in row 3"),
    (bad(5, 9, -(2**31)), {}, r"step\[9\] is -2147483648 in row 3"),
]


def call(batch, backend, **kwargs):
    *batch, step = batch
    return prime_advantage(*batch, step=step, backend=backend, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "kwargs", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_bad_value_is_an_error_that_names_the_row(backend, batch, kwargs, message, margins, group_of_one):
    for credit, process_group in (("td", None), ("odds", None), ("odds", group_of_one)):
        with pytest.raises(ValueError, match=message):
            call(batch, backend, credit=credit, process_group=process_group, **kwargs)
    assert margins()
    check(ragged(*SMALL), backend, credit="odds")  # and leaves nothing behind


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cpu"])
@pytest.mark.parametrize(("batch", "kwargs", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_bad_value_under_graph_capture_leaves_no_number_to_use(monkeypatch, backend, batch, kwargs, message):
    monkeypatch.setattr(advantage_credit, "capturing", lambda: True)
    assert call(batch, backend, credit="odds", **kwargs).advantage.isnan().all()
    assert call(bad(5, 0, 0), backend, credit="odds").advantage.isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("several_ranks", [False, True])
@pytest.mark.parametrize("offsets", BAD_OFFSETS)
def test_bad_offsets_are_an_error_and_nothing_is_written_outside(
    backend, several_ranks, offsets, margins, group_of_one
):
    cu_seqlens = torch.tensor(BAD_OFFSETS[offsets])
    prm, ref, outcome, cuts, group = ragged(*SMALL)
    for credit, weight, step in (("pav", 1.0, None), ("odds", 1.0, steps_of(cuts, 0)), ("td", 0.0, steps_of(cuts, 0))):
        with pytest.raises(ValueError, match="cu_seqlens|no token"):
            prime_advantage(
                prm, ref, outcome, cu_seqlens, group, credit=credit, step=step, process_weight=weight,
                process_group=group_of_one if several_ranks else None, backend=backend,
            )  # fmt: skip
    assert margins()


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_as_many_steps_as_tokens_without_log_probs(backend):
    with pytest.raises(ValueError, match=r"step has shape \(7\), needs \(10\)"):
        prime_advantage(
            None, None, *ragged(*SMALL)[2:], credit="pav", step=torch.zeros(7).int(), process_weight=0.0,
            backend=backend,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("credit", CREDITS)
def test_a_process_group_of_one_changes_nothing(backend, credit, group_of_one, emulator):
    launches, batch = emulator and emulator.launches, ragged(LONG, LONG_GROUP)
    step = steps_of(batch[3], 3)
    kwargs = {"credit": credit, "step": step, "backend": backend, **RICH}
    got = prime_advantage(*batch, process_group=group_of_one, **kwargs)
    torch.testing.assert_close(tuple(got), tuple(prime_advantage(*batch, **kwargs)), rtol=0, atol=1e-6)
    if emulator and backend == "cuda":
        assert emulator.launches == launches + 1 + (5 if credit == "odds" else 2)


def _distributed(rank, path, halves, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=len(halves))
    results = [
        prime_advantage(*batch, step=step, credit=credit, process_group=dist.group.WORLD, backend="cpu", **RICH)
        for credit in CREDITS
        for *batch, step in [halves[rank]]
    ]
    queue.put((rank, [result.advantage.tolist() for result in results]))
    dist.destroy_process_group()


@pytest.mark.skipif(INTERPRETING or bool(DEVICE), reason="the process group of one covers it")
def test_two_ranks_equal_one(tmp_path):
    """The first rank's rows are shorter than all of the other's."""
    lengths = [3, 2, 5, 1, 90, 400]
    batch = ragged(lengths, [1, 2, 1, 2, 7, 7])
    step, cut = steps_of(batch[3], 5), sum(lengths[:4])
    halves = [
        [batch[0][:cut], batch[1][:cut], batch[2][:4], batch[3][:5], batch[4][:4], step[:cut]],
        [batch[0][cut:], batch[1][cut:], batch[2][4:], batch[3][4:] - cut, batch[4][4:], step[cut:]],
    ]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_distributed, args=(rank, tmp_path / "store", halves, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(90)
        assert process.exitcode == 0
    parts = dict(queue.get() for _ in ranks)
    for i, credit in enumerate(CREDITS):
        got = torch.tensor(parts[0][i] + parts[1][i])
        want = prime_advantage(*batch, step=step, credit=credit, backend="cpu", **RICH).advantage
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        want = prime_advantage(*double(batch), step=step, credit=credit, **RICH).advantage
        torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-6)


@pytest.mark.skipif(INTERPRETING or bool(DEVICE), reason="the graph holds the op, whatever the back-end")
def test_compiles_to_one_graph():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(step, *batch):
        return prime_advantage(*batch, credit="odds", step=step, **RICH).advantage * 3

    batch = ragged(*SMALL)
    step = steps_of(batch[3], 0)
    want = 3 * prime_advantage(*batch, credit="odds", step=step, **RICH).advantage
    torch.testing.assert_close(compiled(step, *batch), want)
    with pytest.raises(ValueError, match=r"step\[1\] is 5 in row 0"):
        compiled(torch.full((10,), 5).index_fill(0, torch.tensor([0]), 0), *batch)


@pytest.mark.skipif(INTERPRETING or bool(DEVICE), reason="this is what runs it")
def test_triton_in_the_interpreter():
    pytest.importorskip("triton", reason="pip install triton==3.7.1")
    run_again(__file__, 50, TRITON_INTERPRET="1")


@pytest.mark.skipif(INTERPRETING or bool(DEVICE), reason="this is what runs it")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_this_gpu():
    run_again(__file__, 50, PRIME_KERNELS_TEST_DEVICE="cuda")
