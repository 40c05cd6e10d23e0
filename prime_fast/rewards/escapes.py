"""Tries to escape from the sandbox in every known way: the attacks, and the world outside that they are after."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from prime_fast.rewards.attacks import ATTACKS
from prime_fast.rewards.isolate import NOBODY, has_nobody
from prime_fast.rewards.pool import RewardPool

SECONDS = 2.0  # a program's time; endless ones are stopped at 0.4 of it
SLACK_SECONDS = 30.0  # on top, for a machine that is busy: what is looked for are hangs
VARIABLE = "PRIME_FAST_DOCTOR_SECRET"
HONEST = {"inputs": ["20 1"], "outputs": ["21"]}, "print(sum(map(int, input().split())))"


def attempts() -> Iterator[tuple[str, str | None]]:
    """(name, what it broke or None) of every attack of `rewards.attacks`, tried one after another.

    Last comes "honest program", which must score. Raises ValueError, RuntimeError or OSError where no sandbox starts.
    """
    with outside() as world, RewardPool("code", workers=1, timeout=SECONDS) as pool:
        for name in ATTACKS:
            yield name, attack(name, world, pool)
        truth, program = HONEST
        (score,) = pool.score([program], [{"reward_model": {"ground_truth": truth}}])
        yield "honest program", None if score == 1.0 else f"it scores {score}"


def attack(name: str, world: World, pool: RewardPool) -> str | None:
    """Runs the named attack; what it broke, or None."""
    kind, program = ATTACKS[name]
    before, start = world.state(), time.monotonic()
    (score,) = pool.score([program], [_row(kind, world.described(), [world.secret, world.win])])
    seconds = time.monotonic() - start
    if score:
        return f"it scored {score}"
    if seconds > SECONDS + SLACK_SECONDS:
        return f"it took {seconds:.1f} s"
    if (after := world.state()) != before:
        return f"it changed {[key for key in before if before[key] != after[key]]}"
    deadline = time.monotonic() + SLACK_SECONDS
    while len(left := [pid for worker in pool.processes() for pid in descendants(worker)]) > pool.workers:
        if time.monotonic() > deadline:  # what was killed may take a moment to go; those that score stay
            return f"some of the processes {left} are left"
        time.sleep(0.05)
    return None


class World:
    """What lies outside the sandbox, for attackers to find: made by `outside`."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.secret, self.win = secrets.token_hex(16), secrets.token_hex(16)
        self.file, self.folder, self.unix = folder / "secret.txt", folder / "folder", folder / "socket"
        self.file.write_text(self.secret)
        self.folder.mkdir()
        (self.folder / "kept").write_text("kept")
        self.shm = Path(f"/dev/shm/prime-fast-{self.win}")
        self.shm.write_text(self.secret)
        stack.callback(self.shm.unlink, missing_ok=True)
        self.abstract = f"prime-fast-{self.win}"
        self.listeners = [socket.create_server(("127.0.0.1", 0))]
        self.port = self.listeners[0].getsockname()[1]
        for kind, address in (
            (socket.SOCK_STREAM, str(self.unix)),
            (socket.SOCK_STREAM, f"\0{self.abstract}"),
            (socket.SOCK_DGRAM, f"{self.unix}-datagrams"),
        ):
            listener = socket.socket(socket.AF_UNIX, kind)
            listener.bind(address)
            if not address.startswith("\0"):
                os.chmod(address, 0o777)
            self.listeners.append(listener)
        for listener in self.listeners:
            stack.callback(listener.close)
            if listener.type == socket.SOCK_STREAM:
                listener.listen()
            listener.setblocking(False)
        for path in (folder, self.file, self.folder, self.shm):
            path.chmod(0o777)  # what stops an attack must be the sandbox, not a mode
        before = os.environ.get(VARIABLE, "")
        os.environ[VARIABLE] = self.secret
        stack.callback(os.environ.__setitem__, VARIABLE, before)
        # it changes its user itself: with `user=`, Popen copies this process, which fails where memory is short
        becomes = f"os.setuid({NOBODY}); " if has_nobody() else ""
        command = [sys.executable, "-c", f"import os; {becomes}os.execvp('sleep', ['sleep', '3600'])"]
        self.neighbour = subprocess.Popen(command, start_new_session=True)
        stack.callback(self.neighbour.wait)
        stack.callback(self.neighbour.kill)
        libc = ctypes.CDLL(None)
        self.key = secrets.randbelow(1 << 30) + 1
        segment = libc.shmget(self.key, 4096, 0o1666)
        stack.callback(libc.shmctl, segment, 0, None)

    def described(self) -> dict:
        names = {"file": self.file, "folder": self.folder, "unix": self.unix, "shm": self.shm.name}
        return {name: str(value) for name, value in names.items()} | {
            "name": VARIABLE,
            "win": self.win,
            "port": self.port,
            "abstract": self.abstract,
            "pid": self.neighbour.pid,
            "key": self.key,
        }

    def state(self) -> dict:
        """What an attack must not change; a connection that arrived is consumed."""
        return {
            "the secret": self.file.read_text() if self.file.exists() else None,
            "the folder": sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else None,
            "the neighbour": self.neighbour.poll(),
            "the listeners": [_arrived(listener) for listener in self.listeners],
            "the host name": socket.gethostname(),
        }


@contextmanager
def outside() -> Iterator[World]:
    with ExitStack() as stack:
        yield World(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prime-fast-doctor-"))), stack)


def descendants(pid: int) -> list[int]:
    parents = {int(name): _parent(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    found = [pid]
    for ancestor in found:
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found[1:]


def _parent(pid: int) -> int | None:
    with suppress(OSError):
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        return int(parent)
    return None


def _arrived(listener: socket.socket) -> bool:
    with suppress(BlockingIOError):
        if listener.type == socket.SOCK_STREAM:
            listener.accept()[0].close()
        else:
            listener.recv(1)
        return True
    return False


def _row(kind: str | dict, world: dict, wins: list[str]) -> dict:
    if isinstance(kind, dict):
        truth = kind
    elif kind == "stdin":
        truth = {"inputs": [json.dumps(world)] * len(wins), "outputs": wins}
    elif kind == "call":
        truth = {"inputs": [[world]] * len(wins), "outputs": wins, "fn_name": "attack"}
    else:
        truth = {"asserts": "\n".join(f"assert attack({world!r}) == {win!r}" for win in wins)}
    return {"reward_model": {"ground_truth": json.dumps(truth)}}
