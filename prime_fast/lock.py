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
    """Make run_dir, and have it until the end of the block; the kernel lets go of it where the process is killed. A
    run_dir that was made here and got nothing else is gone afterwards.

    Raises ValueError, which names the process that has it, or what else is in the way.
    """
    made = not run_dir.exists()
    with _wait_for(run_dir) as file:
        with suppress(OSError):  # on a full disk it is held without saying by whom
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            with suppress(FileNotFoundError):  # somebody has removed it meanwhile
                if made and os.listdir(run_dir) == [LOCK]:
                    (run_dir / LOCK).unlink()
                    run_dir.rmdir()


def _wait_for(run_dir: Path) -> IO:
    """The lock's file, which is held as long as it is open."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = (run_dir / LOCK).open("a+")
        except OSError as error:
            raise ValueError(f"run_dir={run_dir} cannot be written to ({error.strerror}); choose another one") from None
        if _take(file) and os.fstat(file.fileno()).st_nlink:  # else who had it has removed it
            return file
        with file:
            file.seek(0)
            holder = file.read()
        if time.monotonic() > deadline:
            raise ValueError(
                f"{run_dir} is being trained by {holder}; wait for its end, end it, or choose another run_dir"
            )
        time.sleep(0.1)


def _take(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems
        say(f"{file.name} cannot be locked ({error.strerror}): see that no second run is started with this run_dir")
    return True
