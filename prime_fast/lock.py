"""One run at a time writes into a run_dir: a job that is started twice must not mix its lines and checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prime_fast.progress import say

LOCK = ".lock"


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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{run_dir} is being trained by {file.read()}; wait for its end, end it, or choose another run_dir"
            ) from None
        except OSError as error:  # some network file systems
            say(f"{run_dir} cannot be locked ({error.strerror}): see that no second run is started with it")
        with suppress(OSError):  # on a full disk it is held without saying by whom
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
