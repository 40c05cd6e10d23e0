"""Checkpoints of the whole loop: written beside the old ones, put in place by one rename, pointed to last.

checkpoints/step-000050/policy, prm   Hugging Face directories for from_pretrained, vLLM, or a later run
checkpoints/step-000050/state         DeepSpeed shards of the engines, trainer.pt (sampler, surplus groups, counters),
                                      identity.json: what it was made with (`identity`)
                                      score: how good these very weights are on held-out rows, if that is known
checkpoints/latest                    the name of the newest intact one
checkpoints/best                      the name of the one with the highest score, which is never deleted
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from prime_fast.engine import distributed
from prime_fast.engine.zero import Engine
from prime_fast.progress import progress

FORMAT = 2  # of trainer.pt, raised when what a trainer writes there becomes another
LATEST, BEST, SCORE, IDENTITY = "latest", "best", "score", "identity.json"
NAME = re.compile(r"step-\d+")


def save(
    run_dir: Path,
    step: int,
    engines: dict[str, Engine],
    tokenizer: Any,
    state: dict[str, Any],
    *,
    keep: int,
    score: float | None = None,
) -> None:
    """Write checkpoint `step`; every rank calls it. `state` holds tensors and plain Python values.

    keep: how many of the newest stay, this one included; the best one stays besides.
    score: of an evaluation of exactly these weights, the higher the better; None if there was none.
    """
    root = run_dir / "checkpoints"
    final = root / f"step-{step:06d}"
    partial = root / f".partial-{final.name}"
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    with progress("checkpoint", total=2 * len(engines)) as tick:
        for name, engine in engines.items():
            engine.save_hf(partial / name, tokenizer)
            tick()
            engine.save_state(partial / "state" / name)
            tick()
    distributed.barrier()
    if distributed.rank() == 0:
        about = {"format": FORMAT, "step": step, "world_size": distributed.world_size()}
        torch.save(state | about, partial / "state" / "trainer.pt")
        if state.get("identity"):
            (partial / "state" / IDENTITY).write_text(json.dumps(state["identity"], indent=1) + "\n")
        if score is not None and math.isfinite(score):
            (partial / "state" / SCORE).write_text(repr(float(score)))
        _sync_to_disk(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _point(root / LATEST, final)
        every = _all(root)
        known = {directory: directory / "state" / SCORE for directory in every}
        scores = {directory: float(path.read_text()) for directory, path in known.items() if path.is_file()}
        # of equal scores the newest is the best: it takes no room of its own
        top = max(scores, key=lambda directory: (scores[directory], _step(directory)), default=None)
        if top:
            _point(root / BEST, top)
        until_now = [directory for directory in every if _step(directory) <= step]  # who went back has later ones too
        for old in until_now[:-keep]:
            if old != top:
                shutil.rmtree(old)
    distributed.barrier()


def latest(run_dir: Path) -> Path | None:
    """The newest intact checkpoint, or None. Where a kill or a copy left no pointer, it is the last: all are whole."""
    root = run_dir / "checkpoints"
    return _named_by(root / LATEST) or next(reversed(_all(root)), None)


def best(run_dir: Path) -> Path | None:
    """The checkpoint with the highest score, or None if none was evaluated."""
    return _named_by(run_dir / "checkpoints" / BEST)


def forget_scores(run_dir: Path) -> None:
    """The held-out rows are others from now on: no score of before can be compared with those to come."""
    if distributed.rank() == 0:
        root = run_dir / "checkpoints"
        for path in (root / BEST, *root.glob(f"step-*/state/{SCORE}")):
            path.unlink(missing_ok=True)


def find(path: Path) -> Path | None:
    """The checkpoint that RUN_DIR (its newest), RUN_DIR/checkpoints/best or .../latest means; None for other paths."""
    return _named_by(path) if path.name in (BEST, LATEST) else latest(path)


def load(directory: Path, engines: dict[str, Engine], stage: str = "train") -> dict[str, Any]:
    """Restore the engines and return the trainer's state, which `read` checks."""
    state = read(directory, stage)
    for name, engine in engines.items():
        engine.load_state(directory / "state" / name)
    return state


def read(directory: Path, stage: str = "train") -> dict[str, Any]:
    """The trainer's state alone. Raises ValueError at another world size, or if another version of this trainer or
    another stage of training (`stage` in the state) wrote it."""
    path = directory / "state" / "trainer.pt"
    if not path.is_file():
        raise ValueError(f"{directory} is not a checkpoint of this trainer: {path.name} is missing")
    try:
        state = torch.load(path, weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged; to continue from an older checkpoint write its name into {directory.parent / LATEST}"
        ) from error
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{directory} was written by another version of prime-fast; continue it with that one, or start a new run "
            f"with model.policy={directory / 'policy'}"
        )
    if (other := state.get("stage", "train")) != stage:
        raise ValueError(
            f"{directory} is of a run of `prime-fast {other}`; continue it with that command, or choose another run_dir"
        )
    if state["world_size"] != distributed.world_size():
        raise ValueError(
            f"{directory} was written by {state['world_size']} ranks and this is a run of {distributed.world_size()}; "
            f"launch as many, or start a new run with model.policy={directory / 'policy'}"
        )
    return state


def _point(pointer: Path, directory: Path) -> None:
    new = pointer.with_name(f".{pointer.name}")
    new.write_text(directory.name)
    _sync_to_disk(new)
    new.rename(pointer)


def _named_by(pointer: Path) -> Path | None:
    return pointer.parent / pointer.read_text().strip() if pointer.is_file() else None


def _all(root: Path) -> list[Path]:
    """Oldest first; not what somebody put beside them under a name of his own, such as step-000050-good."""
    return sorted((path for path in root.glob("step-*") if NAME.fullmatch(path.name)), key=_step)


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def _sync_to_disk(path: Path) -> None:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
