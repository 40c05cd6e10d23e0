"""One run at a time writes into a run_dir: a job that is started twice must not mix its lines and checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from prime_fast.progress import say

LOCK = ".lock"
PATIENCE = 30.0  # seconds: a process that was killed takes a while to give its memory back, and lets go only then


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Make run_dir, and have it until the end of the block; the kernel lets go of it where the process is killed.

    Raises ValueError, which names the process that has it, or what else is in the way.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("a+")
    except OSError as error:
        raise ValueError(f"run_dir={run_dir} cannot be written to ({error.strerror}); choose another one") from None
    with file:
        deadline = time.monotonic() + PATIENCE
        while not _take(file):
            if time.monotonic() > deadline:
                file.seek(0)
                raise ValueError(
                    f"{run_dir} is being trained by {file.read()}; wait for its end, end it, or choose another run_dir"
                )
            time.sleep(0.1)
        with suppress(OSError):  # on a full disk it is held without saying by whom
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _take(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems
        say(f"{file.name} cannot be locked ({error.strerror}): see that no second run is started with this run_dir")
    return True
