"""Buckets and checksums of a weight sync, without an engine."""

from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_fast.rollout import EngineError
from prime_fast.rollout.weights import CHUNK, Report, buckets, checksum, transfer, verify, view

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]


def random_tensor(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-128, 128, (size * dtype.itemsize,), dtype=torch.int8, generator=generator)
    return words.view(dtype)


def plain(tensor: torch.Tensor) -> tuple[int, int]:
    """The definition, in Python's integers."""
    words = tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    words = words.flatten().tolist()
    wrap = lambda total: (total + 2**63) % 2**64 - 2**63  # noqa: E731
    return wrap(sum(words)), wrap(sum(i % ((1 << 20) + 7) * word for i, word in enumerate(words)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checksum(dtype):
    tensor = random_tensor(1001, dtype, 0)
    assert checksum(tensor) == plain(tensor)
    assert checksum(tensor.view(7, 143).T) == checksum(tensor.view(7, 143).T.contiguous())
    assert checksum(tensor[:0]) == (0, 0)


def test_checksum_of_several_chunks():
    tensor = random_tensor(2 * CHUNK + 12345, torch.int8, 1)
    assert checksum(tensor) == plain(tensor)


@given(st.integers(0, 10**6), st.integers(0, 399), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_a_changed_moved_or_flipped_word_shows(seed, place, shift):
    tensor = random_tensor(400, torch.float32, seed)
    other = tensor.clone()
    other.view(torch.int8)[4 * place] ^= 1
    rolled = tensor.roll(shift)
    assert checksum(other) != checksum(tensor)
    assert checksum(rolled) != checksum(tensor) and checksum(rolled)[0] == checksum(tensor)[0]


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(DTYPES)), max_size=12), st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_what_goes_into_buckets_comes_out(shapes, size):
    weights = {f"w{i}": random_tensor(count, dtype, i) for i, (count, dtype) in enumerate(shapes)}
    flats, sent, got = [torch.empty(size, dtype=torch.uint8) for _ in range(2)], {}, {}
    for entries, flat in buckets(weights.items(), cycle(flats), sent):
        assert any(flat is own for own in flats) or len(entries) == 1
        got |= {entry.name: view(flat, entry).clone() for entry in entries}
    assert list(got) == list(weights) and sent == {name: checksum(tensor) for name, tensor in weights.items()}
    for name, tensor in weights.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name].view(torch.int8), tensor.view(torch.int8))


PARTS = {"a": (1, 5), "b": (2, 7)}


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (Report({"a": (1, 5)}, [], {}), "b was sent and did not reach"),
        (Report(PARTS | {"b": (2, 8)}, [], {}), "b reached the rollout engine with other bytes"),
        (Report(PARTS, ["norm", "head"], {}), "2 parameters of the rollout engine got no weights, among them head"),
        (Report(PARTS, [], {"ab": (4, ["a", "b"])}), "ab of the rollout engine does not hold a and b as they were"),
        (Report(PARTS, [], {"ac": (3, ["a", "c"])}), "c, a part of ac of the rollout engine, was not sent"),
    ],
)
def test_a_sync_that_went_wrong_names_the_tensor(report, message):
    with pytest.raises(EngineError, match=message):
        verify(PARTS, report)


def test_a_sync_that_went_well():
    verify(PARTS, Report(PARTS, [], {"ab": (3, ["a", "b"]), "packed": (None, ["a"])}))
    loaded = {}

    def load(entries, flat):
        loaded.update({entry.name: checksum(view(flat, entry)) for entry in entries})

    weights = [("x", torch.rand(3, 5)), ("y", torch.rand(70))]
    transfer(weights, cycle([torch.empty(64, dtype=torch.uint8)]), load, lambda: Report(loaded, [], {}))
    assert set(loaded) == {"x", "y"}
