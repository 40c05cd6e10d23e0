"""The reference's log-probs of all rows, computed once and kept: RUN_DIR/reference.

logprobs.f32   float32, native byte order: of every response token, row after row
about.json     of which rows, model and dtype they are, and of how many rows they are there; a run that is killed while
               they are made goes on with the rest
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prime_fast import durable, passes
from prime_fast.config import Config
from prime_fast.data.labelled import Labelled
from prime_fast.engine import distributed
from prime_fast.engine.batch import Batch
from prime_fast.engine.model import training_dtype
from prime_fast.engine.zero import Engine
from prime_fast.progress import progress
from prime_fast.rollout import release_cached
from prime_fast.stages.loop import packs

MICRO_BATCHES = 64  # of every rank, between two notes of how far it is
FLOAT = np.dtype(np.float32)


def reference_logprobs(
    config: Config, path: str, model: str, parts: Sequence[Labelled], device: torch.device
) -> list[np.ndarray]:
    """Of each part, (T,) of all response tokens, mapped from the file. model: the identity of the one at `path`.

    Every rank calls it; RUN_DIR is on a file system that all of them see.
    """
    place = Path(config.run_dir, "reference")
    file, note = place / "logprobs.f32", place / "about.json"
    dtype = str(training_dtype(config.model, device)).removeprefix("torch.")
    about = {"rows": [part.digest() for part in parts], "model": model, "dtype": dtype}
    rows = [(part, i) for part in parts for i in range(len(part))]
    offsets = np.cumsum([0, *(part.tokens[i] for part, i in rows)])
    done = distributed.gather_lists([_done(file, note, about, offsets)])[0]
    if done < len(rows):
        engine = Engine("reference", path, config.model, config.engine, None, device)
        with progress("reference", len(rows), "responses") as tick:
            while done < len(rows):
                end = _chunk(config, rows, done)
                values = _score(engine, rows[done:end], config)
                if distributed.rank() == 0:
                    _append(file, note, values, offsets[done], about | {"done": end})
                tick(end - done)
                done = end
        del engine
        gc.collect()
        release_cached()
    distributed.barrier()
    flat = np.memmap(file, FLOAT, "r", shape=(int(offsets[-1]),))
    return np.split(flat, np.cumsum([int(part.tokens.sum()) for part in parts])[:-1])


def batch_of(rows: Sequence[tuple[Labelled, int]]) -> Batch:
    """Some responses as what a step trains on; their outcomes are their labels."""
    found = [part.rows[i] for part, i in rows]
    lengths = [len(row["response_ids"]) for row in found]
    return Batch(
        prompts=[torch.tensor(row["prompt_ids"]) for row in found],
        responses=[torch.tensor(row["response_ids"]) for row in found],
        engine_logprob=torch.zeros(sum(lengths)),
        outcome=torch.tensor([part.label[i] for part, i in rows], dtype=torch.float32),
        group=torch.tensor([part.group[i] for part, i in rows]),
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        age=torch.zeros(sum(lengths), dtype=torch.int32),
    )


def _score(engine: Engine, rows: list[tuple[Labelled, int]], config: Config) -> np.ndarray:
    batch = batch_of(rows)
    return passes.score(engine, batch, [packs(engine, batch.lengths, config.engine.micro_tokens)]).cpu().numpy()


def _chunk(config: Config, rows: list[tuple[Labelled, int]], start: int) -> int:
    """The row behind the last of a chunk; the response tokens of a row say about how long it is."""
    room = MICRO_BATCHES * config.engine.micro_tokens * distributed.world_size()
    end = start
    while end < len(rows) and (room > 0 or end == start):
        part, i = rows[end]
        room -= int(part.tokens[i])
        end += 1
    return end


def _done(file: Path, note: Path, about: dict[str, Any], offsets: np.ndarray) -> int:
    """The rows that are there already."""
    known = json.loads(note.read_text()) if note.is_file() and file.is_file() else {}
    done = known.pop("done", 0)
    whole = known == about and file.stat().st_size >= offsets[done] * FLOAT.itemsize
    return done if whole else 0


def _append(file: Path, note: Path, values: np.ndarray, start: int, about: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with durable.naming(file), open(file, "ab") as out:
        out.truncate(int(start) * FLOAT.itemsize)
        out.write(values.astype(FLOAT).tobytes())
        out.flush()
        os.fsync(out.fileno())
    durable.replace(note, json.dumps(about, indent=1) + "\n")
