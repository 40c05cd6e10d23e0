"""One line of the doctor's findings, and what several checks ask."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import metadata
from typing import NamedTuple

GIB = 1 << 30
IMPORT_SECONDS = 180.0
MESSAGE = 400  # characters of an error that are shown


class Check(NamedTuple):
    """FAIL: training here would fail of it, or run wrong, or on the wrong device. What merely could be better: note."""

    name: str
    status: str  # ok, note or FAIL
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.status:4}  {self.name}: {self.detail}" + (f"; fix: {self.fix}" if self.fix else "")


def raised(name: str, error: Exception) -> Check:
    return Check(name, "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:MESSAGE]}")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def import_error(code: str) -> str | None:
    """The last line of what these imports raise, in a process of their own, which they may change or take along."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-W", "ignore", "-c", code]
        try:
            result = subprocess.run(command, stdout=log, stderr=log, timeout=IMPORT_SECONDS)
        except subprocess.TimeoutExpired:
            return f"no end after {IMPORT_SECONDS:.0f} s"
        log.seek(0)
        said = log.read().strip().splitlines() or ["nothing was said"]
    if result.returncode == 0:
        return None
    return said[-1] if result.returncode > 0 else f"killed by signal {-result.returncode}"
