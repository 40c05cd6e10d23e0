from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_fast.engine.packing import efficiency, pack, plan, share, work

lengths_strategy = st.lists(st.integers(1, 60), min_size=0, max_size=80)


@given(lengths_strategy, st.integers(60, 300), st.integers(1, 5), st.sampled_from([0.0, 1e-3, 1.0]), st.integers(1, 4))
@settings(deadline=None)
def test_plan_places_every_row_once_within_the_budget(lengths, budget, ranks, attention, together):
    micros = plan(lengths, -(-budget // together), ranks * together, attention, together)
    budget = -(-budget // together) * together
    rows = [row for micro in micros for share in micro for row in share]
    assert sorted(rows) == list(range(len(lengths)))
    assert all(len(micro) == ranks for micro in micros)
    assert all(sum(lengths[row] for row in share) <= budget for micro in micros for share in micro)


def test_plan_is_balanced_on_long_tailed_lengths():
    generator = torch.Generator().manual_seed(1)
    lengths = (torch.rand(1024, generator=generator) ** 3 * 3900 + 100).int().tolist()
    micros = plan(lengths, 16384, 8)
    assert efficiency(micros, lengths) >= 0.97
    assert len(micros) == -(-sum(lengths) // (16384 * 8))


@pytest.mark.parametrize(("longest", "gain"), [(16384, 1.02), (32768, 1.03), (65536, 1.08)])
def test_long_rows_are_balanced_by_their_work(longest, gain):
    """Qwen2.5-7B on 8 ranks: a step's time is the sum of the busiest ranks' work."""
    attention = 3584 * 28 / 6.5e9
    draw = torch.randn(512, generator=torch.Generator().manual_seed(2))
    lengths = ((0.9 * draw).exp() * longest / 4).clamp(64, longest).int().tolist()
    budget = max(16384, longest)

    def time(micros):
        return sum(max(sum(work(lengths[row], attention) for row in rows) for rows in ranks) for ranks in micros)

    by_tokens, by_work = plan(lengths, budget, 8), plan(lengths, budget, 8, attention)
    assert efficiency(by_work, lengths, attention) >= 0.97
    assert time(by_tokens) / time(by_work) > gain


def test_a_rank_without_rows_gets_an_empty_share():
    assert sorted(map(len, plan([5, 4], 10, 4)[0])) == [0, 0, 1, 1]


def test_a_row_over_the_budget_is_named():
    with pytest.raises(
        ValueError, match=r"row 1 has 11 tokens.*engine\.micro_tokens \* engine\.sequence_parallel = 10"
    ):
        plan([3, 11], 10, 2)
    assert plan([3, 11], 6, 2, sequence_parallel=2) == [[[1]], [[0]]]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12), st.randoms())
@settings(deadline=None)
def test_pack_lays_rows_end_to_end_and_back(shapes, random):
    tokens = iter(range(1, 10_000))
    prompts = [torch.tensor([next(tokens) for _ in range(p)]) for p, _ in shapes]
    responses = [torch.tensor([next(tokens) for _ in range(r)]) for _, r in shapes]
    offsets = [0]
    for response in responses:
        offsets.append(offsets[-1] + len(response))
    chosen = random.sample(range(len(shapes)), random.randint(1, len(shapes)))
    packed = pack(chosen, prompts, responses, offsets)

    assert sorted(packed.rows) == sorted(chosen)
    boundaries = packed.layout.cu_seqlens.tolist()
    for i, row in enumerate(packed.rows):
        fed = torch.cat([prompts[row], responses[row]])[:-1]
        part = slice(boundaries[i], boundaries[i + 1])
        assert torch.equal(packed.input_ids[part], fed)
        assert packed.position_ids[part].tolist() == list(range(len(fed)))
        answers = slice(packed.cu_response[i], packed.cu_response[i + 1])
        assert torch.equal(packed.targets[answers], responses[row])
        # the token at a predicting position is the one before its target
        before = torch.cat([prompts[row][-1:], responses[row][:-1]])
        assert torch.equal(packed.input_ids[packed.predict[answers]], before)
    assert [(n, length) for _, n, length in packed.layout.runs] == [
        (sum(len(prompts[r]) + len(responses[r]) - 1 == length for r in chosen), length)
        for length in sorted({len(prompts[r]) + len(responses[r]) - 1 for r in chosen})
    ]
    flat = torch.arange(offsets[-1], dtype=torch.float32)
    copy = torch.full_like(flat, -1)
    packed.put(copy, packed.select(flat))
    covered = torch.zeros(offsets[-1], dtype=torch.bool)
    for row in chosen:
        covered[offsets[row] : offsets[row + 1]] = True
    assert torch.equal(copy[covered], flat[covered])
    assert (copy[~covered] == -1).all()


def test_a_filler_weighs_nothing():
    filler = pack([], [], [], [0])
    assert filler.select(torch.ones(5)).tolist() == [0.0]
    assert filler.select_rows(torch.ones(5)).tolist() == [0.0]
    flat = torch.ones(5)
    filler.put(flat, torch.zeros(1))
    assert flat.tolist() == [1.0] * 5


def rows(draw, shapes):
    prompts, responses = (
        [torch.randint(1, 99, (n,), generator=draw) for n in part] for part in zip(*shapes, strict=True)
    )
    return prompts, responses, [0, *torch.tensor([r for _, r in shapes]).cumsum(0).tolist()]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(1, 8),
    st.integers(0, 1 << 32),
)
@settings(deadline=None)
def test_the_shares_of_a_pack_are_the_pack(shapes, size, seed):
    """Every token on one rank, with its position, target and place in the batch; a row's response tokens counted."""
    whole = pack(range(len(shapes)), *rows(torch.Generator().manual_seed(seed), shapes))
    shares = [share(whole, SimpleNamespace(size=size, index=index)) for index in range(size)]
    tokens, length = len(whole.input_ids), len(shares[0].input_ids)
    missing = size * length - tokens
    assert {len(part.input_ids) for part in shares} == {length} and 0 <= missing < size
    for name, rest in (("input_ids", [0] * missing), ("position_ids", list(range(missing)))):
        assert sum([getattr(part, name).tolist() for part in shares], []) == getattr(whole, name).tolist() + rest
    layout = shares[0].layout
    assert layout.cu_seqlens.tolist() == whole.layout.cu_seqlens.tolist() + [size * length] * (missing > 0)
    assert sum(n * rows for _, rows, n in layout.runs) == size * length
    assert layout.max_length == int(layout.cu_seqlens.diff().max())
    real = [(index, part) for index, part in enumerate(shares) if part.answers]
    for name, first in (("predict", length), ("targets", 0), ("token_index", 0)):
        assert sum([(getattr(p, name) + i * first).tolist() for i, p in real], []) == getattr(whole, name).tolist()
    assert sum(part.cu_response.diff() for part in shares).tolist() == whole.cu_response.diff().tolist()
    values = torch.arange(1.0, 1 + len(whole.targets))
    for part in shares:
        assert len(part.select(values)) == len(part.predict) == len(part.targets) == max(1, part.answers)
        assert part.cu_response[-1] == part.answers
    scores = [torch.zeros(len(shapes)) for _ in shares]
    for part, found in zip(shares, scores, strict=True):
        part.put_rows(found, torch.ones(len(part.rows)))
    assert sum(scores).tolist() == [1.0] * len(shapes)


def test_the_shares_of_a_filler_weigh_nothing():
    shares = [share(pack([], [], [], [0]), SimpleNamespace(size=3, index=index)) for index in range(3)]
    for part in shares:
        assert part.select(torch.ones(5)).tolist() == part.select_rows(torch.ones(5)).tolist() == [0.0]
        assert len(part.input_ids) == len(part.predict) == 1 and part.layout.cu_seqlens[-1] == 3
        flat = torch.ones(5)
        part.put(flat, torch.zeros(1))
        part.put_rows(flat, torch.zeros(1))
        assert flat.tolist() == [1.0] * 5
