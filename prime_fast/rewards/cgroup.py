"""A cgroup (version 2) for each sandbox, where this machine lets us: the kernel then counts the memory of all that a
program holds (pipes, files in memory, its /tmp), which limits on its address space do not."""

import os
import re
import secrets
from contextlib import suppress
from functools import cache
from pathlib import Path

CONTROLLERS = {"memory", "pids"}
MEMORY_BYTES = 1280 << 20  # of the program, of the process that watches it, and of its files
PIDS = 260


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
        self.folder = parent / f"prime-fast-{os.getpid()}-{secrets.token_hex(4)}"
        self.folder.mkdir()
        settings = {"memory.max": MEMORY_BYTES, "memory.swap.max": 0, "memory.oom.group": 1, "pids.max": PIDS}
        for name, value in settings.items():
            with suppress(FileNotFoundError):  # a kernel without swap has no limit on it
                (self.folder / name).write_text(str(value))

    def add(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

    def end(self) -> dict:
        """Removes it, whose processes are gone; what they took."""
        took = self.took()
        self.folder.rmdir()
        return took

    def took(self) -> dict:
        """{"memory"} at its highest, and the "limit" that was hit."""
        took = {"limit": None}
        with suppress(FileNotFoundError):  # since Linux 5.19
            took["memory"] = int((self.folder / "memory.peak").read_text())
        for name, limit, event in (("pids", "threads", "max"), ("memory", "memory", "oom_kill")):
            if re.search(rf"^{event} [1-9]", (self.folder / f"{name}.events").read_text(), re.M):
                took["limit"] = limit
        return took


def sweep(pid: int) -> None:
    """Removes what a process that was killed left."""
    with suppress(NoCgroup):
        for folder in parent().glob(f"prime-fast-{pid}-*"):
            folder.rmdir()


@cache
def parent() -> Path:
    """The cgroup in which those of sandboxes can be made. Raises NoCgroup."""
    return find(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text())


def find(own: str, mounts: str) -> Path:
    """own, mounts: what /proc/self/cgroup and /proc/self/mountinfo hold."""
    roots = re.findall(r"^(?:\S+ ){3}(\S+) (\S+) .* - cgroup2 ", mounts, re.M)
    path = re.search(r"^0::(.*)$", own, re.M)
    if not roots or path is None:
        raise NoCgroup("no cgroup v2 is mounted")
    top, root = roots[0]
    here = Path(root) / os.path.relpath(path[1], top)
    missing, locked = CONTROLLERS, None
    for folder in (here, here.parent) if here != Path(root) else (here,):  # its parent where it was delegated
        try:
            missing = CONTROLLERS - set((folder / "cgroup.subtree_control").read_text().split())
        except OSError:
            continue
        if not missing and os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK):
            return folder
        locked = locked or (None if missing else folder)
    if locked:
        raise NoCgroup(f"{locked} cannot be written")
    raise NoCgroup(f"{here} gives its children no {' and no '.join(sorted(missing))} controller")
