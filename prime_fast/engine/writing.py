"""Checkpoints are copied while training waits and written while it goes on.

Every rank copies what is its own to host memory and goes on. A thread of each writes its copy into
.partial-step-000050, syncs it, and leaves there what it wrote as .written-<rank>. The thread of rank 0 waits for all of
these, then writes the manifest, renames the folder, points to it and deletes what is not kept. No thread calls a
collective operation: these stay in the order in which training makes them. `poll` before each step tells all ranks of a
failure on any. Whatever is killed when, a folder called step-* is whole, and `latest` names one that is there.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from prime_fast import durable
from prime_fast.durable import Written
from prime_fast.engine import distributed, interrupt, manifest, shards, tensors
from prime_fast.engine.checkpoint import BEST, FORMAT, IDENTITY, LATEST, listed, named_by, step_of
from prime_fast.engine.zero import Content, Engine
from prime_fast.progress import progress, say

PARTIAL = ".partial-"  # begins the name of what is being written, or deleted
LOOK_SECONDS = 0.05  # between two looks at whether all have written
LEAVE_SECONDS = 60.0  # that a run which ends by accident waits for the other ranks' parts


class Checkpoints:
    """Of a run that writes them, one at a time. Every rank makes the same calls."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        """keep: how many of the newest stay, the one just written included; the best one stays besides."""
        self.root, self.keep = run_dir / "checkpoints", keep
        self.writing: _Writing | None = None

    def save(
        self, step: int, engines: dict[str, Engine], tokenizer: Any, state: dict[str, Any], score: float | None = None
    ) -> None:
        """Copy all of it to the host and begin to write checkpoint `step`, when the one before is written.

        state: tensors and plain Python values. score: of an evaluation of exactly these weights, the higher the better.
        """
        self.finish()
        files: dict[str, Content] = {}
        with progress("checkpoint", total=2 * len(engines)) as tick:
            for name, engine in engines.items():
                files |= {f"{name}/{file}": content for file, content in engine.exported(tokenizer).items()}
                tick()
                if states := engine.states():
                    files[f"state/{name}/{shards.file_name(distributed.rank())}"] = states
                tick()
        if distributed.rank() == 0:
            about = {"format": FORMAT, "step": step}
            saved = io.BytesIO()
            torch.save(state | about, saved)
            files["state/trainer.pt"] = saved.getvalue()
            if state.get("identity"):
                files[f"state/{IDENTITY}"] = (json.dumps(state["identity"], indent=1) + "\n").encode()
        final = self.root / f"step-{step:06d}"
        partial = self._clear(final)

        def commit(written: dict[str, Written]) -> None:
            _put_in_place(partial, final, written, score)
            _keep(self.root, step, self.keep)

        self.writing = _Writing(partial, files, commit)
        self.writing.start()

    def poll(self) -> None:
        """Raises Stop on every rank if the checkpoint that is being written has failed on one."""
        if self.writing is None:
            return
        states = distributed.gather_lists([(self.writing.done, self.writing.failure)])
        failed = next((failure for _, failure in states if failure), None)
        if failed:
            self.writing.leave(patience=0)
            distributed.barrier()
            self._give_up()
            raise distributed.Stop(failed)
        if all(done for done, _ in states):
            interrupt.took(self.writing.seconds)
            self.writing = None

    def finish(self) -> None:
        """Wait until what was begun is in its place."""
        while self.writing is not None:
            self.writing.join(LOOK_SECONDS)
            self.poll()

    def close(self) -> None:
        """On the way out, where other ranks may be gone: see that what this one has begun gets written."""
        if self.writing is not None:
            self.writing.leave(patience=LEAVE_SECONDS)
            if self.writing.failure:
                say(f"prime-fast: {self.writing.failure}", sys.stderr)
            self._give_up()

    def _give_up(self) -> None:
        if distributed.rank() == 0:
            shutil.rmtree(self.writing.partial, ignore_errors=True)  # not there any more if it was committed
        self.writing = None

    def _clear(self, final: Path) -> Path:
        """The folder to write into, empty on every rank; what a kill has left behind is gone."""
        partial, failure = final.with_name(PARTIAL + final.name), None
        if distributed.rank() == 0:
            try:
                for left in self.root.glob(f"{PARTIAL}*"):
                    shutil.rmtree(left)
                partial.mkdir(parents=True)
            except OSError as error:
                failure = _told(partial, error)
        if failure := distributed.gather_lists([failure])[0]:
            raise distributed.Stop(failure)
        return partial


class _Writing(Thread):
    """A rank's part of a checkpoint on its way to the disk; on rank 0 also what follows when all have written."""

    def __init__(self, partial: Path, files: dict[str, Content], commit: Callable[[dict[str, Written]], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.partial, self.files, self.commit = partial, files, commit
        self.rank, self.ranks = distributed.rank(), distributed.world_size()
        self.begun, self.seconds = time.perf_counter(), 0.0
        self.patience = math.inf  # seconds that the other ranks' parts are waited for
        self.done, self.failure = False, None

    def run(self) -> None:
        try:
            written = write(self.partial, self.files)
            mark = self._mark(self.rank)
            durable.write(mark.with_suffix(".new"), [json.dumps(written).encode()])
            mark.with_suffix(".new").rename(mark)
            if self.rank == 0 and (everything := self._of_all()) is not None:
                self.commit(everything)
        except Exception as error:  # whatever it is, the trainer raises it
            self.failure = _told(self.partial, error)
        self.seconds = time.perf_counter() - self.begun
        self.done = True

    def leave(self, patience: float) -> None:
        """Wait for what this rank has to write, and so many seconds for the others'."""
        self.patience = patience
        self.join()

    def _of_all(self) -> dict[str, Written] | None:
        """What all ranks have written, when they have; None where they are waited for no longer."""
        marks, start = [self._mark(rank) for rank in range(self.ranks)], time.monotonic()
        while not all(mark.is_file() for mark in marks):
            if time.monotonic() - start > self.patience:
                return None
            time.sleep(LOOK_SECONDS)
        everything = {}
        for mark in marks:
            everything |= {name: Written(*made) for name, made in json.loads(mark.read_bytes()).items()}
            mark.unlink()
        return everything

    def _mark(self, rank: int) -> Path:
        return self.partial / f".written-{rank}"


def export(engine: Engine, tokenizer: Any, directory: Path) -> None:
    """Write the model alone, and wait for it. Every rank calls it."""
    files = engine.exported(tokenizer)
    if distributed.rank() == 0:
        partial = directory.with_name(PARTIAL + directory.name)
        shutil.rmtree(partial, ignore_errors=True)
        write(partial, files)
        _rename(partial, directory)
    distributed.barrier()


def write(folder: Path, files: dict[str, Content]) -> dict[str, Written]:
    blocks = {name: [made] if isinstance(made, bytes) else tensors.blocks(made) for name, made in files.items()}
    written = {name: durable.write(folder / name, parts) for name, parts in blocks.items()}
    durable.sync(*(folder / name for name in files))
    return written


def _put_in_place(partial: Path, final: Path, written: dict[str, Written], score: float | None) -> None:
    manifest.seal(partial, written, score)
    _rename(partial, final)
    durable.replace(final.parent / LATEST, final.name)


def _rename(partial: Path, final: Path) -> None:
    durable.sync(*(path for path in partial.rglob("*") if path.is_dir()), partial)
    _delete(final)
    partial.rename(final)
    durable.sync(final.parent)


def _delete(directory: Path) -> None:
    """Nothing that is half there keeps the name."""
    if directory.exists():
        shutil.rmtree(directory.rename(directory.with_name(f"{PARTIAL}old-{directory.name}")))


def _keep(root: Path, step: int, count: int) -> None:
    """Name the best; delete what is neither among the newest up to `step` nor the best."""
    every = listed(root)
    known = {directory: manifest.score(directory) for directory in every}
    scores = {directory: score for directory, score in known.items() if score is not None}
    # of equal scores the newest is the best: it takes no room of its own
    top = max(scores, key=lambda directory: (scores[directory], step_of(directory)), default=None)
    if top and top != named_by(root / BEST):
        durable.replace(root / BEST, top.name)
    until_now = [directory for directory in every if step_of(directory) <= step]  # who went back has later ones too
    for old in until_now[:-count]:
        if old != top:
            _delete(old)


def _told(partial: Path, error: Exception) -> str:
    why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return f"checkpoint {partial.name.removeprefix(PARTIAL)} could not be written ({why})"
