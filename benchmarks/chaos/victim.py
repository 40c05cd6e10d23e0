"""A run that harms itself, or what it depends on, at a given moment: `run` in a process of its own.

The moment is a phase of the trainer, a file that is opened, or one of the things that happen to files while a
checkpoint is written. What was hit is written down first; then comes the real thing: SIGKILL, SIGSTOP, a full disk.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from prime_fast.progress import here

CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree")  # audit events of a checkpoint's writing
PAUSE_SECONDS = 2.0  # from SIGSTOP to SIGCONT
FILLER = "filler"
WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of the process group its parent may be in


@dataclass(frozen=True)
class Plan:
    """What to do, and when: at the `nth` time that its moment comes, counted from 1."""

    harm: str
    phase: str = ""  # that begins
    fraction: float = 0.0  # of `seconds`, how long the phase usually takes, to wait then
    seconds: float = 0.0
    opens: str = ""  # or: a file for writing whose path matches this
    change: bool = False  # or: anything that happens to a file while a checkpoint is written
    keep_bytes: int = 0  # with "tear": what of the next write reaches the file
    nth: int = 1
    rank: int = 0
    seed: int = 0
    told: str = ""  # the file that gets what was hit


class Victim:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.left, self.done = plan, plan.nth, False
        self.trainer = None
        self.lock = threading.Lock()

    def arm(self) -> None:
        from prime_fast.stages.sft import Sft
        from prime_fast.trainer import Trainer

        begins, start, step = Trainer._begins, Trainer.__init__, Sft.step

        def begin(trainer, phase: str) -> None:
            begins(trainer, phase)
            if phase == self.plan.phase:
                self.comes()

        def remember(trainer, *arguments) -> None:
            start(trainer, *arguments)
            self.trainer = trainer

        def train(sft, number: int) -> dict:
            if self.plan.phase == "train":
                self.comes()
            return step(sft, number)

        Trainer._begins, Trainer.__init__, Sft.step = begin, remember, train
        if self.plan.opens or self.plan.change:
            sys.addaudithook(self.hears)
            torch.save = self.saves(torch.save)  # which opens its files in C++

    def saves(self, save: Callable) -> Callable:
        def heard(what: object, path: object, *arguments, **options) -> None:
            self.hears("open", (path, "w", os.O_WRONLY))
            save(what, path, *arguments, **options)

        return heard

    def hears(self, event: str, arguments: tuple) -> None:
        if self.done or event not in CHANGES:
            return
        path = str(arguments[0])
        if event == "open":
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR) if isinstance(arguments[2], int) else False
            if not writes:
                return
        if self.plan.change and here.phase == "checkpoint" and "checkpoints" in path:
            self.comes(f"{event} {Path(path).name}")
        elif self.plan.opens and event == "open" and re.search(self.plan.opens, path):
            self.comes(path)

    def comes(self, what: str = "") -> None:
        """The moment: once, whatever thread it comes to."""
        with self.lock:
            self.left -= 1
            if self.left or self.done:
                return
            self.done = True
        if self.plan.fraction:
            threading.Timer(self.plan.fraction * self.plan.seconds, self.strike, [what]).start()
        else:
            self.strike(what)

    def strike(self, what: str) -> None:
        hit = {"step": here.step, "phase": here.phase} | ({"file": what} if what else {})
        with open(self.plan.told, "w") as file:
            json.dump(hit, file)
            file.flush()
            os.fsync(file.fileno())
        HARMS[self.plan.harm](self, what)


def kill(victim: Victim, what: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ask(victim: Victim, what: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop(victim: Victim, what: str) -> None:
    """Whoever started this process lets it go on, or does not."""
    os.kill(os.getpid(), signal.SIGSTOP)


def tear(victim: Victim, what: str) -> None:
    """The next write to the file ends in its middle, and the process with it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    size = os.path.getsize(what) if os.path.exists(what) else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + victim.plan.keep_bytes, resource.RLIM_INFINITY))


def fill(victim: Victim, what: str) -> None:
    """The file system is full from now on."""
    place = next(path for path in Path(what).absolute().parents if path.is_mount())
    descriptor = os.open(place / FILLER, os.O_WRONLY | os.O_CREAT)
    block = bytes(1 << 20)
    while block:
        with suppress(OSError):
            while os.write(descriptor, block):
                pass
        block = block[: len(block) // 2]


def kill_engine(victim: Victim, what: str) -> None:
    os.kill(victim.trainer.rollout.engine.process.pid, signal.SIGKILL)


def pause_engine(victim: Victim, what: str) -> None:
    pause(victim.trainer.rollout.engine.process.pid)


def _worker(victim: Victim) -> int:
    return random.Random(victim.plan.seed).choice(victim.trainer.pool.processes())


def kill_worker(victim: Victim, what: str) -> None:
    os.killpg(_worker(victim), signal.SIGKILL)


def pause_worker(victim: Victim, what: str) -> None:
    pause(_worker(victim))


def pause(group: int) -> None:
    os.killpg(group, signal.SIGSTOP)
    threading.Timer(PAUSE_SECONDS, os.killpg, [group, signal.SIGCONT]).start()


HARMS: dict[str, Callable[[Victim, str], None]] = {
    "kill": kill,
    "ask": ask,
    "stop": stop,
    "tear": tear,
    "fill": fill,
    "kill engine": kill_engine,
    "pause engine": pause_engine,
    "kill worker": kill_worker,
    "pause worker": pause_worker,
}


def run(arguments: list[str], log: str, environment: dict[str, str], plan: dict | None) -> None:
    """prime-fast with these arguments, and what it says in `log`; ends this process with its exit code."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name in WORLD:
        os.environ.pop(name, None)
    os.environ.update(environment)
    from prime_fast.cli import main

    if plan is not None and int(environment.get("RANK", "0")) == plan["rank"]:
        Victim(Plan(**plan)).arm()
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def as_dict(plan: Plan | None) -> dict | None:
    return None if plan is None else asdict(plan)


def is_stopped(pid: int) -> bool:
    """Whether the process waits for SIGCONT."""
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] in "Tt"
    return False


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
