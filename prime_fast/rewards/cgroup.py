"""A cgroup (version 2) for each sandbox, where this machine lets us: the kernel then counts the memory of all that a
program holds (pipes, files in memory, its /tmp), which limits on its address space do not."""

import errno
import os
import re
import secrets
import subprocess
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

CONTROLLERS = {"memory", "pids"}
MEMORY_BYTES = 1280 << 20  # of the program, of the process that watches it, and of its files
PIDS = 260
END_SECONDS = 30.0  # for killed processes to have left
PREFIX = "prime-fast"


class NoCgroup(RuntimeError):
    """Programs cannot be put into a cgroup of their own here, and why."""


def make() -> "Cgroup | None":
    """None where there is none to be had; `parent` says why."""
    try:
        return Cgroup(parent())
    except NoCgroup:
        return None


class Cgroup:
    """One sandbox's, made in `parent`."""

    def __init__(self, parent: Path):
        self.folder = parent / f"{PREFIX}-{os.getpid()}-{secrets.token_hex(4)}"
        self.folder.mkdir()
        try:
            for name, value in {"memory.max": MEMORY_BYTES, "memory.oom.group": 1, "pids.max": PIDS}.items():
                self._write(name, value)
            with suppress(FileNotFoundError):  # a kernel without swap has no limit on it
                self._write("memory.swap.max", 0)
        except OSError:
            self.folder.rmdir()
            raise

    def add(self, pid: int) -> None:
        self._write("cgroup.procs", pid)

    def end(self) -> dict:
        """Ends what still runs in it and removes it; what it took. OSError if a process stays for END_SECONDS."""
        deadline = time.monotonic() + END_SECONDS
        with suppress(FileNotFoundError):  # since Linux 5.14; its processes were killed before
            self._write("cgroup.kill", 1)
        took = self.took()
        while True:
            try:
                self.folder.rmdir()
                return took
            except OSError as error:  # who was killed may take a moment to go
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.002)

    def took(self) -> dict:
        """{"memory"} at its highest, and the "limit" that was hit."""
        took = {"limit": None}
        with suppress(FileNotFoundError):  # since Linux 5.19
            took["memory"] = int((self.folder / "memory.peak").read_text())
        for name, limit, event in (("pids", "threads", "max"), ("memory", "memory", "oom_kill")):
            if re.search(rf"^{event} [1-9]", (self.folder / f"{name}.events").read_text(), re.M):
                took["limit"] = limit
        return took

    def _write(self, name: str, value: int) -> None:
        with open(os.open(self.folder / name, os.O_WRONLY), "w") as file:  # creates none: that it is missing is told
            file.write(str(value))


def sweep() -> None:
    """Removes what processes left that were killed."""
    with suppress(NoCgroup):
        for place in _here():
            for folder in place.glob(f"{PREFIX}-*-*"):
                if not Path("/proc", folder.name.split("-")[2]).exists():
                    with suppress(OSError):  # it is another user's, another sweep has removed it, or it is in use
                        folder.rmdir()


@cache
def parent() -> Path:
    """The cgroup in which those of sandboxes can be made, as one was. Raises NoCgroup."""
    reasons = []
    for folder in _here():
        try:
            _try(folder)
            return folder
        except OSError as error:
            reasons.append(f"no cgroup can be made in {folder} ({error.strerror})")
    raise NoCgroup("; ".join(reasons))


def _try(folder: Path) -> None:
    group = Cgroup(folder)
    try:
        with subprocess.Popen(["sleep", "60"]) as process:
            try:
                group.add(process.pid)
            finally:
                process.kill()
    finally:
        group.end()


def _here() -> list[Path]:
    return places(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text())


def places(own: str, mounts: str) -> list[Path]:
    """Where a cgroup would have what is needed. own, mounts: what /proc/self/cgroup and /proc/self/mountinfo hold."""
    roots = re.findall(r"^(?:\S+ ){3}(\S+) (\S+) .* - cgroup2 ", mounts, re.M)
    path = re.search(r"^0::(.*)$", own, re.M)
    if not roots or path is None:
        raise NoCgroup("no cgroup v2 is mounted")
    top, root = roots[0]
    here, found, missing = Path(root) / os.path.relpath(path[1], top), [], CONTROLLERS
    for folder in (here, here.parent) if here != Path(root) else (here,):  # its parent where it was delegated
        with suppress(OSError):  # it is no part of what is mounted here
            missing = CONTROLLERS - set((folder / "cgroup.subtree_control").read_text().split())
            found += [] if missing else [folder]
    if not found:
        raise NoCgroup(f"{here} gives its children no {' and no '.join(sorted(missing))} controller")
    return found
