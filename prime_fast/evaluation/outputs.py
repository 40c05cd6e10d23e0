"""The records of an evaluation on disk, a line a problem: written by all ranks at once, and whole after a kill.

Rank 0 appends to NAME.jsonl, rank r to NAME.r.jsonl, whose lines rank 0 takes over when all are through, or at the next
start, whatever the number of ranks then. All ranks must see the directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from prime_fast import durable
from prime_fast.engine import distributed


def read(path: Path) -> dict[int, dict]:
    """The records by problem, on every rank. To be called by all ranks together."""
    distributed.barrier()
    if distributed.rank() == 0:
        known = {record["problem"] for record in _lines(path)}
        for part in sorted(path.parent.glob(f"{path.stem}.*.jsonl")):
            records = {record["problem"]: record for record in _lines(part) if record["problem"] not in known}
            append(path, records.values())
            known |= records.keys()
            part.unlink()
    distributed.barrier()
    return {record["problem"]: record for record in _lines(path)}


def write(path: Path, batches: Iterable[list[dict]]) -> dict[int, dict]:
    """Appends this rank's records as they come, then returns those of all ranks. To be called by all ranks together."""
    mine = path if distributed.rank() == 0 else path.with_suffix(f".{distributed.rank()}.jsonl")
    for records in batches:
        append(mine, records)
    return read(path)


def append(path: Path, records: Iterable[dict]) -> None:
    durable.append(path, lines(records))


def lines(records: Iterable[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _lines(path: Path) -> Iterator[dict]:
    """The whole lines of a file; what a kill left half-written at its end is cut off."""
    if not path.is_file():
        return
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(path, whole)
    yield from map(json.loads, text[:whole].splitlines())
