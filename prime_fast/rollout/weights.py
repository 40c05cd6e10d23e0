"""Weights on their way to an engine: packed into buckets, each tensor with a checksum to be reproduced there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from prime_fast.rollout import EngineError

BUCKET_BYTES = 512 << 20
ALIGNMENT = 64  # bytes; where a tensor may start in a bucket
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PERIOD = (1 << 20) + 7  # prime: word i of a tensor weighs i modulo this
CHUNK = 2 * PERIOD  # words summed at a time, so that the int64 copies stay small

Checksum = tuple[int, int]


class Entry(NamedTuple):
    """Where one tensor lies in a bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes
    size: int


class Report(NamedTuple):
    """What an engine says about the weights it took."""

    received: dict[str, Checksum]
    missing: list[str]  # parameters of its own that got nothing
    # its parameter -> (sum of its words now, None where it cannot be read back; the names that it was made of)
    resident: dict[str, tuple[int | None, list[str]]]


def checksum(tensor: Tensor) -> Checksum:
    """(sum of the words, sum of position-weighted words) modulo 2**64: the first survives concatenation."""
    words = tensor.detach().contiguous().view(-1).view(WORDS[tensor.element_size()])
    plain = weighted = torch.zeros((), dtype=torch.int64, device=words.device)
    for part in words.split(CHUNK):
        plain, weighted = plain + part.sum(), weighted + (part * _positions(words.device)[: len(part)]).sum()
    return int(plain), int(weighted)


@cache
def _positions(device: torch.device) -> Tensor:
    """The weights of a chunk's words."""
    return torch.arange(CHUNK, device=device) % PERIOD


def buckets(
    weights: Iterable[tuple[str, Tensor]], flats: Iterable[Tensor], sent: dict[str, Checksum]
) -> Iterator[tuple[list[Entry], Tensor]]:
    """Copy tensors into the flat uint8 buffers that `flats` hands out, and yield each with what is in it when full.

    A tensor larger than a buffer gets one of its own. `sent` receives the checksums of the tensors as they came.
    """
    flats = iter(flats)
    flat, entries, end = next(flats), [], 0
    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if entries and end + size > len(flat):
            yield entries, flat
            flat, entries, end = next(flats), [], 0
        target = flat if end + size <= len(flat) else torch.empty(size, dtype=torch.uint8, device=flat.device)
        entry = Entry(name, tensor.dtype, tuple(tensor.shape), end, size)
        sent[name] = checksum(tensor)
        view(target, entry).copy_(tensor)
        if target is not flat:
            yield [entry], target
            continue
        entries.append(entry)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    if entries:
        yield entries, flat


def view(flat: Tensor, entry: Entry) -> Tensor:
    return flat[entry.start : entry.start + entry.size].view(entry.dtype).view(entry.shape)


def transfer(
    weights: Iterable[tuple[str, Tensor]],
    flats: Iterable[Tensor],
    load: Callable[[list[Entry], Tensor], None],
    finish: Callable[[], Report],
) -> None:
    """Hand all weights over, bucket by bucket, and prove that they are there."""
    sent: dict[str, Checksum] = {}
    for entries, flat in buckets(weights, flats, sent):
        load(entries, flat)
    verify(sent, finish())


def verify(sent: dict[str, Checksum], report: Report) -> None:
    """Raises EngineError naming the first tensor that did not arrive as it was sent."""
    for name, value in sent.items():
        if name not in report.received:
            raise EngineError(f"weight sync: {name} was sent and did not reach the rollout engine")
        if report.received[name] != value:
            raise EngineError(f"weight sync: {name} reached the rollout engine with other bytes than it was sent with")
    if report.missing:
        raise EngineError(
            f"weight sync: {len(report.missing)} parameters of the rollout engine got no weights, among them "
            f"{min(report.missing)}; its model and the trainer's differ"
        )
    for name, (total, parts) in report.resident.items():
        if absent := [part for part in parts if part not in sent]:
            raise EngineError(f"weight sync: {absent[0]}, a part of {name} of the rollout engine, was not sent")
        if total is not None and (total - sum(sent[part][0] for part in parts)) % (1 << 64):
            raise EngineError(
                f"weight sync: {name} of the rollout engine does not hold {' and '.join(parts)} as they were sent"
            )
