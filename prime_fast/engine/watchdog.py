"""A thread beside each rank: it hears signals, tells where the rank is, and ends a run in which no rank gets on.

run_dir/ranks/0.json    where rank 0 is: step, phase, since when; and when it last moved and gave a sign of life
run_dir/ranks/0.stack   what its threads were doing when the run was ended because it hung
run_dir/ranks/leave-ID  there once a rank of run ID was asked to leave

These files need no collective operation, no network and no rank 0, the very things that may hang.
"""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from prime_fast.engine import checkpoint, distributed, interrupt
from prime_fast.progress import at, duration, here, say

BEAT_SECONDS = 5.0  # between two signs of life, or a tenth of the limit if that is less
DEAD_BEATS = 4  # without a sign of life for so many
SAME_SECONDS = 2.0  # signals this close together are one: a scheduler and a launcher both send it to every process


class Watchdog:
    """`with Watchdog(run_dir, grace, hang, kill):` around a run, in the main thread, on every rank.

    grace: seconds from the signal that asks the run to leave to its end. hang: seconds after which a run is ended in
    which no rank has moved; 0 = never. kill: ends at once what this rank runs in other processes; from any thread.
    """

    def __init__(self, run_dir: Path, grace: float, hang: float, kill: Callable[[], None]) -> None:
        self.run_dir, self.hang, self.kill = run_dir, hang, kill
        self.directory = run_dir / "ranks"
        self.rank, self.ranks = distributed.rank(), distributed.world_size()
        self.beat = min(BEAT_SECONDS, hang / 10) if hang else BEAT_SECONDS
        self.moves, self.idle, self.moved, self.failed = -1, 0.0, time.time(), False
        self.main, self.ended = threading.current_thread(), False
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        interrupt.begin(grace)

    def __enter__(self) -> Watchdog:
        self.directory.mkdir(parents=True, exist_ok=True)
        at(0, "start")
        if self.rank == 0:
            for old in self.directory.glob("leave-*"):
                old.unlink()
        self._publish()
        # from here on every rank's file is of this run; the name is new, for a network's file system may remember more
        self.leaving = self.directory / f"leave-{distributed.gather_lists([time.time_ns()])[0]:x}"
        self.ear, self.mouth = os.pipe()
        os.set_blocking(self.mouth, False)
        # the thread reads what the C handler writes, for a main thread that waits in C++ runs no handler of Python's
        self.before = signal.set_wakeup_fd(self.mouth), [signal.signal(number, _heard) for number in interrupt.SIGNALS]
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True
        wakeup, handlers = self.before
        for number, handler in zip(interrupt.SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(self.mouth)  # which the thread hears
        self.thread.join()
        os.close(self.ear)
        interrupt.begin(0.0)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self.ended:
            left = interrupt.left()
            if select.select([self.ear], [], [], min(self.beat, left) if left > 0 else self.beat)[0]:
                for number in os.read(self.ear, 64):
                    self._hear(number)
            now = time.monotonic()
            # a process that was stopped itself has not waited all that time
            self.idle += min(now - last, 2 * self.beat)
            last = now
            if self.moves != here.moves:
                self.moves, self.idle, self.moved = here.moves, 0.0, time.time()
            self._look()

    def _hear(self, number: int) -> None:
        if number not in interrupt.SIGNALS:
            return
        if not interrupt.asked():
            interrupt.ask()
            with suppress(OSError):  # then the other ranks hear of it where they meet
                self.leaving.touch()
        elif interrupt.since() > SAME_SECONDS:
            self._leave(interrupt.Preempted.code, "asked to leave a second time")

    def _look(self) -> None:
        self._publish()
        if not interrupt.asked() and self.leaving.exists():
            interrupt.ask()
        if interrupt.left() <= 0 and here.phase != "checkpoint":  # which is worth a try: schedulers may be generous
            grace = f"log.grace={interrupt.grace():g} seconds were too few to end {_where(here.step, here.phase)}"
            self._leave(interrupt.Preempted.code, f"asked to leave, but {grace}")
        if self.hang and self.idle >= self.hang:
            self._judge()

    def _publish(self) -> None:
        position = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "step": here.step}
        position |= {"phase": here.phase, "since": here.since, "moved": self.moved, "beat": time.time()}
        new = self.directory / f".{self.rank}.json"
        try:
            new.write_text(json.dumps(position) + "\n")
            new.replace(self.directory / f"{self.rank}.json")
            self.failed = False
        except OSError as error:
            new.unlink(missing_ok=True)
            if not self.failed:
                say(f"prime-fast: rank {self.rank} cannot tell the others where it is: {error}", sys.stderr)
            self.failed = True

    def _judge(self) -> None:
        """This rank has not moved for too long: end the run, unless another one has."""
        positions, now = [self._read(rank) for rank in range(self.ranks)], time.time()
        if any(position and now - position["moved"] < self.hang for position in positions):
            return
        with suppress(OSError), open(self.directory / f"{self.rank}.stack", "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        time.sleep(2 * self.beat)  # until every rank has come so far: a launcher kills them all when one ends
        if here.moves != self.moves:
            self.idle = 0.0
            return
        alive = [rank for rank, position in enumerate(positions) if position and self._lives(position, now)]
        if self.rank != min(alive, default=self.rank):
            time.sleep(2 * self.beat)
            self._end(distributed.Stop.code)
        told = [f"no rank has moved for {duration(self.hang)} (log.hang={self.hang:g}), so the run ends"]
        told += [f"  rank {rank}: {self._told(position, now)}" for rank, position in enumerate(positions)]
        stack = "".join(traceback.format_stack(sys._current_frames()[self.main.ident]))
        told += [f"rank {self.rank} is here (all threads of all ranks: {self.directory}/*.stack):", stack.rstrip()]
        self._leave(distributed.Stop.code, "\n".join(told), speaker=self.rank)

    def _read(self, rank: int) -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            return json.loads((self.directory / f"{rank}.json").read_text())
        return None

    def _lives(self, position: dict[str, Any], now: float) -> bool:
        return now - position["beat"] < DEAD_BEATS * self.beat

    def _told(self, position: dict[str, Any] | None, now: float) -> str:
        if position is None:
            return f"unknown, for it wrote nothing to {self.directory}"
        text = f"{_where(position['step'], position['phase'])}, for {duration(now - position['since'])}"
        if not self._lives(position, now):
            text += f", without a sign of life for {duration(now - position['beat'])}"
        return f"{text} (process {position['pid']} on {position['host']})"

    def _leave(self, code: int, why: str, speaker: int = 0) -> None:
        if self.rank == speaker:
            say(f"prime-fast: {why}; {way_on(self.run_dir)}", sys.stderr)
        self._end(code)

    def _end(self, code: int) -> None:
        self.kill()
        sys.stdout.flush()
        os._exit(code)


def way_on(run_dir: Path) -> str:
    """What is told where a run ends before its time."""
    newest = checkpoint.latest(run_dir)
    return f"continue from {newest} with --resume" if newest else "no checkpoint was written yet"


def _heard(number: int, frame: object) -> None:
    """The thread hears it."""


def _where(step: int, phase: str) -> str:
    return f"step {step}, phase {phase}"
