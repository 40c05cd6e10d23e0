"""Checkpoints of the whole loop: what is in them, which there are, and how one is taken up (`writing` makes them).

checkpoints/step-000050/policy, prm    Hugging Face directories for from_pretrained, vLLM, or a later run; with
                                       policy.lora and prm.lora merged, and in adapter/ the adapter for peft
checkpoints/step-000050/state          a folder an engine with a file a rank (`shards`), trainer.pt (sampler, surplus
                                       groups, counters), identity.json: what it was made with (`identity`)
checkpoints/step-000050/manifest.json  size and checksum of every file (`manifest`), and how good these very weights are
                                       on held-out rows, if that is known
checkpoints/latest                     the name of the newest
checkpoints/best                       the name of the one with the highest score, which is never deleted
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

from prime_fast.engine import distributed, manifest
from prime_fast.engine.zero import Engine
from prime_fast.progress import say

FORMAT = 3  # of what lies in `state`, raised when it becomes another
LATEST, BEST, IDENTITY = "latest", "best", "identity.json"
NAME = re.compile(r"step-\d+")


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint, or None. Where a kill or a copy left no pointer, it is the last: all were whole."""
    root = run_dir / "checkpoints"
    return named_by(root / LATEST) or next(reversed(listed(root)), None)


def best(run_dir: Path) -> Path | None:
    """The checkpoint with the highest score, or None if none was evaluated."""
    return named_by(run_dir / "checkpoints" / BEST)


def intact(run_dir: Path) -> Path:
    """The newest checkpoint, up to the one that `latest` names, whose files are all as they were written; every rank
    checks its share of their bytes, and all come to the same. What is damaged is told.

    Raises ValueError if none is intact, or if another version has written the newest.
    """
    root, damaged = run_dir / "checkpoints", []
    named, ranks = named_by(root / LATEST), distributed.world_size()
    if named is None and (root / LATEST).is_file():
        _tell(f"{root / LATEST} is damaged: it names no checkpoint that is there")
    for directory in reversed([path for path in listed(root) if named is None or step_of(path) <= step_of(named)]):
        _check_age(directory)
        found = distributed.gather_lists([manifest.problem(directory, worker=distributed.rank(), workers=ranks)])
        problem = next(filter(None, found), None)
        if problem is None:
            if directory != listed(root)[-1]:
                _tell(f"continuing from {directory}, though {listed(root)[-1].name} is newer")
            return directory
        damaged.append(f"{directory.name}: {problem}")
        _tell(f"{directory} is damaged: {problem}")
    raise ValueError(
        f"no checkpoint in {root} is intact ({'; '.join(damaged)}); bring one back from a copy, or start a new run_dir"
    )


def forget_scores(run_dir: Path) -> None:
    """The held-out rows are others from now on: no score of before can be compared with those to come."""
    if distributed.rank() == 0:
        root = run_dir / "checkpoints"
        (root / BEST).unlink(missing_ok=True)
        for directory in listed(root):
            manifest.forget_score(directory)


def find(path: Path, part: str) -> Path | None:
    """The folder `part` of the checkpoint that a path is, or that RUN_DIR (its newest), RUN_DIR/checkpoints/best or
    .../latest means; None for other paths. Raises ValueError if it is damaged."""
    pointer = path.name in (BEST, LATEST) and path.is_file()
    found = named_by(path) if pointer else path if (path / manifest.MANIFEST).is_file() else latest(path)
    if found is None and pointer:
        raise ValueError(f"{path} is damaged: it names no checkpoint that is there; name one of {path.parent}")
    if found is not None and not (found / manifest.MANIFEST).is_file():
        _tell(f"{found} has no {manifest.MANIFEST}, like those of older versions, so its files are not checked")
    elif found is not None and (problem := manifest.problem(found, f"{part}/")):
        raise ValueError(f"{found} is damaged: {problem}; name another checkpoint of {found.parent}")
    return None if found is None else found / part


def load(directory: Path, engines: dict[str, Engine], stage: str = "train") -> dict[str, Any]:
    """Restore the engines from an intact checkpoint and return the trainer's state, which `read` checks."""
    state = read(directory, stage)
    for name, engine in engines.items():
        engine.load_states(directory / "state" / name)
    return state


def read(directory: Path, stage: str = "train") -> dict[str, Any]:
    """The trainer's state alone. Raises ValueError if another version of this trainer or another stage of training
    (`stage` in the state) wrote it."""
    state = _loaded(directory)
    _check_format(directory, state)
    if (other := state.get("stage", "train")) != stage:
        raise ValueError(
            f"{directory} is of a run of `prime-fast {other}`; continue it with that command, or choose another run_dir"
        )
    return state


def _check_format(directory: Path, state: dict[str, Any]) -> None:
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{directory} was written by another version of prime-fast; continue it with that one, or start a new run "
            f"with model.policy={directory / 'policy'}"
        )


def _check_age(directory: Path) -> None:
    """Of a version that wrote no manifest nothing can be checked, and nothing is continued."""
    if not (directory / manifest.MANIFEST).is_file():
        try:
            state = _loaded(directory)
        except Exception:  # of many kinds: it is damaged, whoever wrote it, as the missing manifest will say
            return
        _check_format(directory, state)


def _loaded(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "state" / "trainer.pt", weights_only=True)


def named_by(pointer: Path) -> Path | None:
    """What a pointer names, if that is there."""
    if not pointer.is_file():
        return None
    name = pointer.read_bytes().decode(errors="replace").strip()
    directory = pointer.parent / name
    return directory if NAME.fullmatch(name) and directory.is_dir() else None


def listed(root: Path) -> list[Path]:
    """Oldest first; not what somebody put beside them under a name of his own, such as step-000050-good."""
    return sorted((path for path in root.glob("step-*") if NAME.fullmatch(path.name)), key=step_of)


def step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def _tell(sentence: str) -> None:
    if distributed.rank() == 0:
        say(f"prime-fast: {sentence}", sys.stderr)
