"""Checkpoints of the whole loop: written beside the old ones, put in place by one rename, pointed to last.

checkpoints/step-000050/policy, prm   Hugging Face directories for from_pretrained, vLLM, or a later run
checkpoints/step-000050/state         DeepSpeed shards of the engines, trainer.pt (sampler, surplus groups, counters),
                                      identity.json: what it was made with (`identity`)
checkpoints/latest                    the name of the newest intact one
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from prime_fast.engine import distributed
from prime_fast.engine.zero import Engine

KEEP, IDENTITY = 2, "identity.json"


def save(run_dir: Path, step: int, engines: dict[str, Engine], tokenizer: Any, state: dict[str, Any]) -> None:
    """Write checkpoint `step`; every rank calls it. `state` holds tensors and plain Python values."""
    root = run_dir / "checkpoints"
    final = root / f"step-{step:06d}"
    partial = root / f".partial-{final.name}"
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    for name, engine in engines.items():
        engine.save_hf(partial / name, tokenizer)
        engine.save_state(partial / "state" / name)
    distributed.barrier()
    if distributed.rank() == 0:
        torch.save(state | {"step": step, "world_size": distributed.world_size()}, partial / "state" / "trainer.pt")
        if state.get("identity"):
            (partial / "state" / IDENTITY).write_text(json.dumps(state["identity"], indent=1) + "\n")
        _sync_to_disk(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        pointer = root / ".latest"
        pointer.write_text(final.name)
        _sync_to_disk(pointer)
        pointer.rename(root / "latest")
        for old in sorted(root.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old)
    distributed.barrier()


def latest(run_dir: Path) -> Path | None:
    """The newest intact checkpoint, or None."""
    pointer = run_dir / "checkpoints" / "latest"
    return pointer.parent / pointer.read_text().strip() if pointer.is_file() else None


def load(directory: Path, engines: dict[str, Engine]) -> dict[str, Any]:
    """Restore the engines and return the trainer's state. Raises ValueError at another world size."""
    path = directory / "state" / "trainer.pt"
    if not path.is_file():
        raise ValueError(f"{directory} is not a checkpoint of this trainer: {path.name} is missing")
    state = torch.load(path, weights_only=True)
    if state["world_size"] != distributed.world_size():
        raise ValueError(
            f"{directory} was written by {state['world_size']} ranks and this is a run of {distributed.world_size()}; "
            f"launch as many, or start a new run with model.policy={directory / 'policy'}"
        )
    for name, engine in engines.items():
        engine.load_state(directory / "state" / name)
    return state


def _sync_to_disk(path: Path) -> None:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
