"""A reward worker, `python -m prime_fast.rewards.worker REWARD SOCKET LIFE TIMEOUT SANDBOX [FOLDER]`: made by the pool.

SOCKET and LIFE are inherited file descriptors. Frames on the socket: requests [response, row]; replies {"ready": true}
with "sources" once, then {"score": x} (of a program with its "usage", and "timeout": true if it was stopped) or
{"error": text} for each request, or {"fatal": text} if no row can be scored.

It is two processes: the one that scores, and its parent that watches LIFE. When the pool closes LIFE or dies, however
it dies, or when the scoring process ends, the watcher ends every descendant, in whatever session it is.
"""

import ctypes
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import suppress

from prime_fast.rewards import cgroup, sources
from prime_fast.rewards.code import Score
from prime_fast.rewards.functions import BUILT_IN, BadReward, load_reward
from prime_fast.rewards.process import HEADER

BUILT_IN_MEMORY_BYTES = 4 << 30  # a huge power must fail here, not through the machine's out-of-memory killer
ERROR_CHARS = 1_000
REAP_SECONDS = 0.2  # how long an orphan may stay a zombie
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main(reward: str, socket_fd: int, life_fd: int, timeout: float, sandbox: str, folder: str = "") -> None:
    for fd in (socket_fd, life_fd):
        os.set_inheritable(fd, False)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # before the fork: orphaned descendants become our children
    scorer = os.fork()
    if scorer:
        os.close(socket_fd)
        status = _watch(scorer, life_fd)
        cgroup.sweep()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)  # the pool does, too, but may have been killed
        sys.exit(status)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.close(life_fd)
    tempfile.tempdir = folder or None
    if reward in BUILT_IN:
        resource.setrlimit(resource.RLIMIT_AS, (BUILT_IN_MEMORY_BYTES, BUILT_IN_MEMORY_BYTES))
    stream = socket.socket(fileno=socket_fd).makefile("rwb")
    try:
        known = set(sys.modules)
        function = load_reward(reward, timeout, sandbox)
        _write(stream, {"ready": True, "sources": sources.of(reward, known)})
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # chatter; up to here a traceback was worth seeing
        me = os.getpid()
        while header := stream.read(HEADER.size):
            response, row = json.loads(stream.read(*HEADER.unpack(header)))
            reply = _run(function, response, row)
            if os.getpid() != me:
                os._exit(0)  # a child that the function forked and let return: its parent answers
            _write(stream, reply)
    except BadReward as error:
        _write(stream, {"fatal": str(error)})


def _run(function, response: str, row: dict) -> dict:
    try:
        score = function(response, row)
        reply = {"score": float(score)}
        if isinstance(score, Score):
            reply |= {"usage": score.usage, "timeout": score.stopped}
        return reply
    except BadReward:
        raise
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:ERROR_CHARS]}  # on one line


def _write(stream, message: dict) -> None:
    body = json.dumps(message).encode()
    stream.write(HEADER.pack(len(body)) + body)
    stream.flush()


def _watch(scorer: int, life_fd: int) -> int:
    """Waits for the end of the scoring process or of LIFE, then ends all that is left; the scorer's exit status."""
    status = None
    while status is None and not select.select([life_fd], [], [], REAP_SECONDS)[0]:
        status = _reap(os.WNOHANG).get(scorer)
    while True:
        for child in _children():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            pid, ended = os.waitpid(-1, 0)
        except ChildProcessError:
            return os.waitstatus_to_exitcode(status or 0) % 256
        if pid == scorer:
            status = ended


def _reap(options: int) -> dict[int, int]:
    ended = {}
    with suppress(ChildProcessError):
        while (result := os.waitpid(-1, options))[0]:
            ended[result[0]] = result[1]
    return ended


def _children() -> list[int]:
    children = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{pid}/stat") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                children.append(int(pid))
    return children


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0)))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4]), *sys.argv[5:])
