"""Runs model-written Python where it can reach nothing, and talks with it.

"namespaces": user, mount, pid, network, ipc, uts and cgroup namespaces of its own, by clone(2) or, where only that is
    allowed to, by bubblewrap: a read-only root that holds Python and the system's libraries, a small private /tmp, no
    /proc, an empty environment, an unprivileged user.
"rlimits-only": an empty environment and an empty folder, for machines that forbid the rest. It can read and write what
    this user can (what "nobody" can, when this user is root).
Both: a cgroup where there is one to be had (`rewards.cgroup`), limits on memory, CPU, threads and file size, and a
system-call filter that leaves it one process, no program to start, no signal to send and no socket (`rewards.guest`).
"""

import json
import platform
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from prime_fast.rewards import cgroup, isolate
from prime_fast.rewards.guest import AUDIT_ARCH, HEADER
from prime_fast.rewards.isolate import Refused

MEMORY_BYTES = 1 << 30
OUTPUT_BYTES = 4 << 20  # of one test's standard output, and of any file
REPLY_BYTES = 1 << 20  # of a call's value, as JSON
LIMITS = {"memory": MEMORY_BYTES, "output": OUTPUT_BYTES, "reply": REPLY_BYTES, "fsize": OUTPUT_BYTES}
LIMITS |= {"nofile": 64, "nproc": 256, "sigpending": 64}  # the last also limits timers
FRAME_BYTES = 8 * OUTPUT_BYTES  # of the guest's own process; JSON may need six characters for one
START_SECONDS = 30.0
LAST_RESORT = 'or, at the risk of all this user can reach, set the sandbox to "rlimits-only"'
SWITCHES = {  # file: (value that forbids user namespaces, value that allows them)
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": ("1", "0"),
    "/proc/sys/kernel/unprivileged_userns_clone": ("0", "1"),
    "/proc/sys/user/max_user_namespaces": ("0", "10000"),
}


class Sandbox:
    """The sandbox of one program, for use with `with`, in a process of a single thread.

    test_seconds, total_seconds: CPU time of one test, and of one process.
    """

    def __init__(self, mode: str, test_seconds: int, total_seconds: int):
        self._open(isolation(mode), test_seconds, total_seconds)

    def _open(self, start: Callable, test_seconds: int, total_seconds: int) -> None:
        self.took: dict = {}  # once it has ended, see `Cgroup.end`
        self.said: str | None = None  # likewise: why it did not start
        self.group = cgroup.make()
        self.channel, theirs = socket.socketpair()
        try:
            enter = self.group.add if self.group else lambda pid: None
            self.stop = start(theirs, _command(test_seconds, total_seconds), enter)
        except BaseException:
            self.channel.close()
            if self.group:
                self.group.end()
            raise
        finally:
            theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.channel.close()
        self.said = self.stop()
        if self.group:
            self.took = self.group.end()

    def ask(self, request: dict, deadline: float) -> dict:
        """The guest's reply. TimeoutError past `deadline` (monotonic), EOFError if it ended, ValueError if nonsense."""
        body = json.dumps(request).encode()
        self._hurry(deadline)
        with suppress(BrokenPipeError, ConnectionResetError):
            self.channel.sendall(HEADER.pack(len(body)) + body)
        (size,) = HEADER.unpack(self._receive(HEADER.size, deadline))
        if size > FRAME_BYTES:
            raise ValueError(f"a reply of {size} bytes")
        reply = json.loads(self._receive(size, deadline))
        if not isinstance(reply, dict):
            raise ValueError("a reply that is no object")
        if "refused" in reply:
            raise Refused(reply["refused"])
        return reply

    def _receive(self, size: int, deadline: float) -> bytes:
        body = bytearray()
        while len(body) < size:
            self._hurry(deadline)
            chunk = b""
            with suppress(ConnectionResetError):
                chunk = self.channel.recv(min(size - len(body), 1 << 16))
            if not chunk:
                raise EOFError
            body += chunk
        return bytes(body)

    def _hurry(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.channel.settimeout(left)


@cache
def isolation(mode: str) -> Callable:
    """The way to start a guest here in this mode, "namespaces" or "rlimits-only", tried; Refused, and why, if none."""
    if platform.machine() not in AUDIT_ARCH:
        raise Refused(f"cannot confine model-written code: no system-call filter is known for {platform.machine()}")
    reasons = []
    for start in (isolate.limits_alone,) if mode == "rlimits-only" else (isolate.namespaces, isolate.bubblewrap):
        try:
            _try(start)
            return start
        except Refused as error:
            reasons.append(f"{start.__name__}: {error}")
    raise Refused(
        f"cannot isolate model-written code on this machine ({'; '.join(reasons)}). {_advice()}; {LAST_RESORT}"
    )


def _try(start: Callable) -> None:
    box = Sandbox.__new__(Sandbox)
    box._open(start, 1, 1)
    try:
        with box:
            reply = box.ask({"code": "", "function": None, "calls": False}, time.monotonic() + START_SECONDS)
    except (EOFError, ValueError, TimeoutError) as error:
        why = ": ".join(filter(None, (type(error).__name__, box.said)))
        raise Refused(f"its first process did not answer ({why})") from error
    if "loaded" not in reply:
        raise Refused(str(reply))


def _advice() -> str:
    for path, (forbids, allows) in SWITCHES.items():
        with suppress(OSError):
            if Path(path).read_text().strip() == forbids:
                key = path.removeprefix("/proc/sys/").replace("/", ".")
                return f"An administrator can allow it with `sysctl {key}={allows}`"
    return "In a container, allow user namespaces (Docker: --security-opt seccomp=unconfined)"


def _command(test_seconds: int, total_seconds: int) -> list[str]:
    source = Path(__file__).with_name("guest.py").read_text()
    limits = LIMITS | {"cpu": test_seconds, "total": total_seconds, "packages": isolate.packages()}
    return [isolate.python(), "-S", "-s", "-P", "-B", "-c", source, json.dumps(limits)]
