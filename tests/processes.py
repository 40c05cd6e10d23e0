"""Other programs, run by tests: nothing they start can outlive its time or keep a test waiting."""

import os
import signal
import subprocess
from contextlib import suppress

GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a process group this one may be in


def environment(**changes: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in GROUP} | changes


def start(command: list[str], **options) -> subprocess.Popen:
    """In a session of its own, so that `end` reaches its children."""
    return subprocess.Popen(command, text=True, start_new_session=True, **{"env": environment()} | options)


def end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def run(
    command: list[str], *, input: str | None = None, timeout: float = 240, **options
) -> subprocess.CompletedProcess:
    """Like subprocess.run with its output captured, but past `timeout` seconds all it started is killed.

    subprocess.run kills the command alone, then waits for as long as any child of it holds the pipes.
    """
    process = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        out, err = process.communicate(input, timeout)
    except BaseException:
        end(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)
