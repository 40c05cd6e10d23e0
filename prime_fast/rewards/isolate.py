"""The ways to start a process that can reach nothing: own namespaces, bubblewrap, or limits alone.

Each takes (channel, command, enter): a socket to become descriptor 0, what to run, and what to do with the id of the
process before that. It returns a function that ends the process and all it started, and tells what that said on its
standard error before it became the guest (None: nothing); or raises Refused with the reason.
"""

import ctypes
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from prime_fast.rewards.guest import HEADER

TMP_BYTES, TMP_FILES = 64 << 20, 4096
SAID_BYTES = 1000  # of what one that did not start said last
INSIDE_ID, NOBODY = 1000, 65534
ENVIRONMENT = {"PATH": "/usr/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

SYS_CLONE = {"x86_64": 56, "aarch64": 220}
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
# user, mount, pid, network, ipc, uts, cgroup
NEW_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH, PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 2, 1, 4, 38

libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL keeps the interpreter lock, which the child of clone() must hold


class Refused(RuntimeError):
    """This machine cannot isolate a program as asked."""


def python() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


def packages() -> list[str]:
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def _expendable(parent: int, enter: Callable[[int], None]) -> None:
    """Before this process becomes the guest: it ends with `parent`, and is the first to go where memory runs out."""
    libc.prctl(PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (signal.SIGKILL, 0, 0, 0)))
    if os.getppid() != parent:
        os._exit(1)
    enter(os.getpid())
    _first_to_go()


def _first_to_go() -> None:
    with suppress(FileNotFoundError):  # no /proc
        Path("/proc/self/oom_score_adj").write_text("1000")


def has_nobody() -> bool:
    """Whether this process is a root that can run others as nobody."""
    spans = (line.split() for line in Path("/proc/self/uid_map").read_text().splitlines())
    return os.geteuid() == 0 and any(int(first) <= NOBODY < int(first) + int(count) for first, _, count in spans)


def limits_alone(channel: socket.socket, command: list[str], enter: Callable[[int], None]) -> Callable[[], None]:
    folder = tempfile.mkdtemp(prefix="prime-fast-")
    os.chmod(folder, 0o777)
    process = subprocess.Popen(command, stdin=channel, env=ENVIRONMENT, cwd=folder, **_detached(enter))

    def stop() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # nobody can leave the group: the filter denies setsid and setpgid
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)

    return stop


def bubblewrap(channel: socket.socket, command: list[str], enter: Callable[[int], None]) -> Callable[[], str | None]:
    """For ordinary users. Its /tmp is read-only, as bubblewrap can limit a writable one's bytes but not its files."""
    program = shutil.which("bwrap")
    if program is None:
        raise Refused("it is not installed")
    if os.geteuid() == 0:  # it can make a program no other user than its own
        raise Refused("it would leave programs root, who owns devices and whom no limit on processes holds")
    visible = _visible()
    scratch = _scratch(visible)
    options = ["--unshare-all", "--uid", str(INSIDE_ID), "--gid", str(INSIDE_ID), "--die-with-parent"]
    options += ["--cap-drop", "ALL", "--dir", scratch, "--chdir", scratch]
    for path in visible:
        options += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for path in DEVICES:  # not its --dev, which brings terminals
        options += ["--dev-bind", path, path]
    command = [program, *options, "--remount-ro", "/", "--", *command]
    errors = os.fdopen(os.memfd_create("bwrap"), "rb")  # the guest lets go of it before it reads what a model wrote
    start = _detached(enter) | {"stderr": errors}
    process = subprocess.Popen(command, stdin=channel, env=_environment(scratch), **start)

    def stop() -> str | None:
        process.kill()
        process.wait()
        with errors:
            errors.seek(max(0, os.fstat(errors.fileno()).st_size - SAID_BYTES))
            return " ".join(errors.read().decode(errors="replace").split()) or None

    return stop


def namespaces(channel: socket.socket, command: list[str], enter: Callable[[int], None]) -> Callable[[], None]:
    """By one clone(2). The process must have a single thread: its child goes on in Python until it runs `command`."""
    user, group = os.geteuid(), os.getegid()
    wait_fd, go_fd = os.pipe()
    pid = libc.syscall(SYS_CLONE[platform.machine()], NEW_NAMESPACES | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os.close(go_fd)
        _become(command, channel.fileno(), wait_fd)
    reason = os.strerror(ctypes.get_errno())
    os.close(wait_fd)

    def stop() -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)  # returns when the last process of its pid namespace has gone

    with os.fdopen(go_fd, "wb", buffering=0) as go:
        if pid < 0:
            raise Refused(f"new namespaces: {reason}")
        try:
            if has_nobody():  # a real root would own files, and escape the limit on processes
                user = group = NOBODY
            else:
                Path(f"/proc/{pid}/setgroups").write_text("deny")
            Path(f"/proc/{pid}/uid_map").write_text(f"{INSIDE_ID} {user} 1")
            Path(f"/proc/{pid}/gid_map").write_text(f"{INSIDE_ID} {group} 1")
            enter(pid)
            go.write(b"!")
        except OSError as error:
            stop()
            raise Refused(f"new user namespace: {error}") from error
    return stop


def _become(command: list[str], channel: int, wait_fd: int) -> None:
    """In the first process of the namespaces: build the root, drop what is left of privileges, run `command`."""
    try:
        if not os.read(wait_fd, 1):
            os._exit(1)
        _first_to_go()
        sources = {path: os.open(path, os.O_PATH | os.O_NOFOLLOW) for path in (*_visible(), *DEVICES)}
        if os.getuid() != INSIDE_ID:  # root has become nobody; only now, as Python may lie in root's home
            os.setgroups([])
            os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
            os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
            libc.prctl(PR_SET_DUMPABLE, *map(ctypes.c_ulong, (1, 0, 0, 0)))  # to keep /proc/self
        scratch = _scratch(sources)
        _build_root(sources, scratch)
        os.setsid()
        for option, value in ((PR_SET_PDEATHSIG, signal.SIGKILL), (PR_SET_NO_NEW_PRIVS, 1)):
            _check("prctl", libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))))
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(channel, 0)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.closerange(3, 1 << 20)
        os.execve(command[0], command, _environment(scratch))  # which also drops the capabilities in the namespace
    except BaseException as error:
        body = json.dumps({"refused": str(error)}).encode()
        os.write(channel, HEADER.pack(len(body)) + body)
    os._exit(1)


def _build_root(sources: dict[str, int], scratch: str) -> None:
    """A root of its own: `sources` (path -> O_PATH descriptor) read-only at their paths, and a small `scratch`."""
    new = "/tmp"
    _mount(None, "/", MS_REC | MS_PRIVATE)
    _mount("tmpfs", new, MS_NOSUID | MS_NODEV, f"size=1m,nr_inodes={TMP_FILES},mode=755")
    os.makedirs(f"{new}{scratch}")
    options = f"size={TMP_BYTES},nr_inodes={TMP_FILES},mode=1777"
    _mount("tmpfs", f"{new}{scratch}", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    for path, fd in sources.items():
        here = f"/proc/self/fd/{fd}"
        target = Path(new + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.islink(here) and (link := _link(fd)):
            target.symlink_to(link)
            continue
        if os.path.isdir(here):
            target.mkdir(exist_ok=True)
        else:
            target.touch()
        _mount(here, str(target), MS_BIND | MS_REC)
    os.makedirs(f"{new}/dev/shm")
    _mount(f"{new}{scratch}", f"{new}/dev/shm", MS_BIND)
    with open("/proc/self/mountinfo") as file:
        points = [re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4]) for line in file]
    for point in filter(os.path.lexists, points):  # but for what our /tmp hides of the machine's
        if point == new or (point.startswith(f"{new}/") and point not in (f"{new}{scratch}", f"{new}/dev/shm")):
            kept = os.statvfs(point).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)  # may be locked, and must not be lost
            _mount(None, point, MS_REMOUNT | MS_BIND | MS_RDONLY | kept)
    os.chdir(new)
    _check("pivot_root", libc.syscall(SYS_PIVOT_ROOT[platform.machine()], b".", b"."))
    _check("umount of the old root", libc.umount2(b".", MNT_DETACH))
    os.chdir(scratch)


def _link(fd: int) -> str | None:
    try:
        return os.readlink("", dir_fd=fd)
    except OSError:
        return None


def _mount(source: str | None, target: str, flags: int, options: str | None = None) -> None:
    kind = b"tmpfs" if source == "tmpfs" else None
    encode = lambda text: text and os.fsencode(text)  # noqa: E731
    result = libc.mount(encode(source), encode(target), kind, ctypes.c_ulong(flags), encode(options))
    _check(f"mount of {target}", result)


def _check(what: str, result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _visible() -> list[str]:
    """What the inside sees of the machine's files, read-only: Python and the system's libraries."""
    places = [*SYSTEM, sys.base_prefix, *packages()]
    covered = lambda path, others: any(Path(path).is_relative_to(other) for other in others)  # noqa: E731
    return [path for i, path in enumerate(places) if os.path.lexists(path) and not covered(path, places[:i])]


def _scratch(visible: Iterable[str]) -> str:
    """Where programs may write, and what is emptied between their tests: not where Python itself lies."""
    return "/scratch" if any(Path(path).is_relative_to("/tmp") for path in visible) else "/tmp"


def _environment(scratch: str) -> dict[str, str]:
    return ENVIRONMENT | dict.fromkeys(("HOME", "TMPDIR"), scratch)


def _detached(enter: Callable[[int], None]) -> dict:
    null, parent = subprocess.DEVNULL, os.getpid()
    return {"stdout": null, "stderr": null, "start_new_session": True, "preexec_fn": lambda: _expendable(parent, enter)}
