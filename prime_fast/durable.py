"""Files that are whole or not there: written, hashed and synced under a name that nobody reads, then renamed.

An OSError of any of these (a full disk, a quota) names the file that could not be written.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

BLOCK = 16 << 20  # bytes hashed and written at a time, both without Python's lock
FULL = (errno.ENOSPC, errno.EDQUOT)


class Written(NamedTuple):
    size: int  # bytes
    sha256: str


def write(path: Path, blocks: Iterable[bytes | memoryview]) -> Written:
    """Write a new file, not yet synced; what is returned is of the bytes in memory, not of those read back."""
    digest, size = hashlib.sha256(), 0
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            for view in map(memoryview, blocks):
                for start in range(0, len(view), BLOCK):
                    digest.update(view[start : start + BLOCK])
                    file.write(view[start : start + BLOCK])
                size += len(view)
    return Written(size, digest.hexdigest())


def replace(path: Path, text: str | Iterable[bytes]) -> None:
    """Put a text file in the place of what is there, in one move."""
    blocks = [text.encode()] if isinstance(text, str) else text
    beside = path.with_name(f".{path.name}.new")
    with naming(path):
        try:
            write(beside, blocks)
            sync(beside)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        beside.rename(path)
        sync(path.parent)


def append(path: Path, text: str) -> None:
    """Add to a text file all of it or nothing."""
    rest = memoryview(text.encode())
    with naming(path), open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def sync(*paths: Path) -> None:
    """Have files on the disk, and of folders the names in them. Many at once take hardly longer than one."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            with naming(path):
                os.fsync(handle)
        except OSError as error:
            if error.errno != errno.EINVAL:  # file systems that sync no folders have no use for it
                raise
        finally:
            os.close(handle)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError, of which a write does not know the file, gets its name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
