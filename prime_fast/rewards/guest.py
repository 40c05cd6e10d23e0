"""Runs inside the sandbox, as `python -c SOURCE LIMITS` with the standard library alone; started by `rewards.sandbox`.

The channel is a socket on descriptor 0, frames as in the pool. The first request is {"code", "function", "calls"}; then
    stdin programs   {"stdin": text} -> {"output": text, "exit": status}: each test in a fresh fork of this process
    calls            {"args": [...]} or {"setup", "values", "after", "needs"} -> {"reply": text}: one process for all
    calls, at last   {"end": true} -> {"exit": status}
with "cpu" and "memory" (seconds, bytes) and "limit", the one that was hit. A reply is what the program's process says,
{"value": encoded} or {"values": [{"value"} ...]} or {"failed": name}; all else comes from this process, which runs
nothing that the model wrote. Nothing here knows an expected output: what model-written code can forge is its own
answers. It runs with a system-call filter that lets it start threads but no process, program or socket.
"""

import builtins
import ctypes
import errno
import gc
import json
import os
import platform
import resource
import select
import signal
import socket
import struct
import sys
import time
import types
from collections import deque
from collections.abc import Iterator, KeysView, ValuesView
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from numbers import Integral, Real

# What programs of contests and LeetCode expect without importing it; builtins last, as math and operator shadow them.
STARS = "string re collections heapq bisect copy math random statistics itertools functools operator io sys json typing"
PRELUDE = "".join(f"from {name} import *\n" for name in (*STARS.split(), "builtins"))
PRELUDE += "import datetime, " + STARS.replace(" ", ", ")
PRELUDE += """
quit = exit
class ListNode:
    def __init__(self, val=0, next=None): self.val, self.next = val, next
class TreeNode:
    def __init__(self, val=0, left=None, right=None): self.val, self.left, self.right = val, left, right
"""
RECURSION = 600_000
NOBODY = 65534
HEADER = struct.Struct("<I")
POLL_SECONDS = 0.05  # how often the CPU time of a call is looked at
END = b'{"end": true}'
MOST_ITEMS = 100_000  # of an iterator
EXITS = {"memory": 91, "output": 92, "files": 93, "threads": 94}  # of programs that a limit ended, as they tell it
KEPT = 512  # the first of the descriptors that a program keeps: folders of Python's

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 4, 38, 22, 2
CLONE_THREAD = 0x10000
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# processes and programs · signals · others' memory · sockets · mounts · unbounded memory, pages given to pipes · kernel
# surface · what is counted for the whole machine: io_setup, inotify, fanotify · others' pages and priorities · files'
# attributes
DENIED = {
    "x86_64": """57 58 59 322 109 112  62 129 200 234 297 424  101 310 311 312 438  41 42 49 54
        155 161 165 166 272 304 308 428 429 430 431 432 433 442  29 64 68 240 319 447  275 276 278
        135 163 167 169 175 179 246 248 249 250 298 313 321 323 425 426 427
        206 253 294 300 301  256 279 141 142 144 203 251 314  188 189 190""",
    "aarch64": """221 281 154 157  129 130 131 138 240 424  117 270 271 272 438  198 200 203 208
        39 40 41 51 97 265 268 428 429 430 431 432 433 442  180 186 190 194 279 447  75 76 77
        60 89 92 104 105 142 217 218 219 224 241 273 280 282 425 426 427
        0 26 262 263  238 239 30 118 119 122 140 274  5 6 7""",
}
NEWEST = 462  # of the system calls that this list was made from: what came later is as if it did not exist
CALLS = ("clone", "clone3", "prlimit", "fcntl", "ioctl", "prctl")
NUMBERS = {"x86_64": (56, 435, 302, 72, 16, 157), "aarch64": (220, 435, 261, 25, 29, 167)}
# Of calls that are allowed otherwise: F_SETOWN, F_SETSIG, F_SETOWN_EX (who gets a signal), F_SETLEASE, F_NOTIFY and
# F_SETPIPE_SZ; FIOSETOWN, SIOCSPGRP, TIOCSTI, TIOCLINUX; PR_SET_PDEATHSIG.
DENIED_COMMANDS = {
    "fcntl": (8, 10, 15, 1024, 1026, 1031),
    "ioctl": (0x8901, 0x8902, 0x5412, 0x541C),
    "prctl": (PR_SET_PDEATHSIG,),
}


def main() -> None:
    limits = json.loads(sys.argv[1])
    parent, channel = os.getppid(), os.dup(0)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    _prctl(PR_SET_DUMPABLE, 0)
    _limit("AS", limits["memory"])
    sys.path += limits["packages"]
    sys.set_int_max_str_digits(0)
    task = receive(channel)
    prelude = {"__name__": "prelude", "__builtins__": builtins}
    exec(PRELUDE, prelude)
    del prelude["__builtins__"]
    given = {name: value for name, value in prelude.items() if name not in vars(builtins)}
    vars(builtins).update(given)  # not among the program's own names
    module = types.ModuleType("solution" if task["calls"] else "__main__")
    sys.modules[module.__name__] = module
    kept = become_nobody() if os.getuid() == 0 else 0
    _end_with(parent)
    try:
        program = compile(task["code"], "solution.py", "exec", dont_inherit=True)
    except Exception as error:
        return send(channel, {"failed": type(error).__name__})
    sys.setrecursionlimit(RECURSION)
    gc.freeze()  # what is loaded so far need not be walked in every fork
    if not task["calls"]:
        send(channel, {"loaded": True})
    while True:
        if task["calls"]:
            ours, theirs = socket.socketpair()
            given = null, null, theirs.fileno()
        else:
            test = receive(channel)
            given = _file(test["stdin"].encode()), _file(b""), null
        me, child = os.getpid(), os.fork()
        if child == 0:
            for target, fd in enumerate((given[0], given[1], null, given[2])):
                os.dup2(fd, target)
            os.closerange(4, KEPT)
            os.closerange(KEPT + kept, 1 << 20)
            _end_with(me)
            confine(limits, limits["total" if task["calls"] else "cpu"])
            builtins.stdin = sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
            builtins.stdout = sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            if task["calls"]:
                answer(program, module, task["function"])
            try:
                exec(program, module.__dict__)
            except Exception as error:
                if (limit := limit_of(error)) is None:
                    raise
                sys.exit(EXITS[limit])
            return None  # through the interpreter's end: exit handlers, buffers and threads as in any program
        if task["calls"]:
            theirs.close()
            return send(channel, converse(channel, ours, child, limits))
        reply = ended(child, limits)
        output = os.pread(given[1], limits["output"], 0)
        if len(output) == limits["output"]:
            reply["limit"] = "output"
        for fd in given[:2]:
            os.close(fd)
        send(channel, {"output": output.decode(errors="replace")} | reply)
        empty(".")  # no test finds what another left


def converse(channel: int, program: socket.socket, child: int, limits: dict) -> dict:
    """Carries messages between who asks and the program's process, and looks at its CPU time; how that ended."""
    received = bytearray()
    while True:
        body, limit = _hear(program, received, child, limits)
        if body is None:
            break
        send(channel, {"reply": body.decode(errors="replace"), "cpu": _cpu_seconds(child)})
        request = receive_body(channel)
        if request == END:
            limit = "end"
            break
        with suppress(OSError):  # it has ended
            program.sendall(HEADER.pack(len(request)) + request)
    if not limit:
        return ended(child, limits)
    os.kill(child, signal.SIGKILL)
    return ended(child, limits) | {"limit": limit, "stopped": limit == "cpu"}


def _hear(program: socket.socket, received: bytearray, child: int, limits: dict) -> tuple[bytes | None, str | None]:
    """The next message of the program's process, or None and the limit that it hit (none: it ended)."""
    start, size = _cpu_seconds(child), HEADER.size
    while len(received) < size or size == HEADER.size:
        if len(received) >= size:
            size += HEADER.unpack_from(received)[0]
            if size > limits["reply"]:
                return None, "output"
            continue
        ready = select.select([program], [], [], POLL_SECONDS)[0]
        if _cpu_seconds(child) - start > limits["cpu"]:
            return None, "cpu"
        chunk = b""
        with suppress(OSError):
            chunk = program.recv(1 << 16) if ready else b""
        if ready and not chunk:
            return None, None
        received += chunk
    body = bytes(received[HEADER.size : size])
    del received[:size]
    return body, None


def ended(child: int, limits: dict) -> dict:
    """Waits for the end of a program's process: its status, what it took, and the limit that ended it."""
    _, status, usage = os.wait4(child, 0)
    status, cpu = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    limit = next((name for name, code in EXITS.items() if code == status), None)
    stopped = status in (-signal.SIGKILL, -signal.SIGXCPU)  # by the limit on CPU time, or for want of memory
    if stopped:
        limit = "cpu" if cpu > limits["cpu"] - 1 else "memory"
    return {"exit": status, "stopped": stopped, "limit": limit, "cpu": cpu, "memory": usage.ru_maxrss << 10}


def answer(program, module: types.ModuleType, function: str | None) -> None:
    """Runs the program, then its calls, until the channel closes. Names count only if the program bound them itself."""
    space, target = module.__dict__, None
    given = set(space)
    try:
        exec(program, space)
        if function:
            owner = space.get("Solution")
            target = getattr(owner(), function) if hasattr(owner, function) else space[function]
        bound = space.keys() - given
        send(3, {"loaded": True})
    except BaseException as error:
        send(3, {"failed": type(error).__name__, "limit": limit_of(error)})
        os._exit(1)
    while True:
        test = receive(3)
        try:
            if target:
                reply = {"value": encode(target(*decode(test["args"])))}
            elif bound.isdisjoint(test["needs"]):
                reply = {"failed": "NameError"}
            else:
                exec(test["setup"], space)
                reply = {"values": [_value(source, space) for source in test["values"]]}
                exec(test["after"], space)
        except BaseException as error:
            reply = {"failed": type(error).__name__, "limit": limit_of(error)}
        send(3, reply)


def _value(source: str, space: dict) -> dict:
    try:
        return {"value": encode(eval(source, space))}
    except BaseException as error:
        return {"failed": type(error).__name__, "limit": limit_of(error)}


def limit_of(error: BaseException) -> str | None:
    """The limit that an error comes from, as far as it tells."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError):
        return {errno.EFBIG: "output", errno.ENOSPC: "output", errno.EMFILE: "files"}.get(error.errno)
    return "threads" if isinstance(error, RuntimeError) and "start new thread" in str(error) else None


def encode(value):
    """A value as JSON that keeps tuples, sets and keys; what is no plain data becomes its type's name."""
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or type(value) in (bool, float):
        return value
    if isinstance(value, Integral):
        value = int(value)
        return value if value.bit_length() < 64 else {"int": f"{value:x}"}  # long ones are slow to read as decimals
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {"set": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, Decimal | Fraction) and value % 1 == 0:
        return encode(int(value))
    if isinstance(value, Real | Decimal):
        return float(value)
    if isinstance(value, list | deque | range | KeysView | ValuesView):
        return [encode(item) for item in value]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist())
    if isinstance(value, Iterator):
        return {"iterator": [encode(item) for item in islice(value, MOST_ITEMS)]}
    return {"object": type(value).__name__}


def decode(value):
    """Inverse of `encode`; what was no plain data comes back as something equal to nothing."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "object":
        return object()
    if kind == "int":
        return int(content, 16)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    return {"tuple": tuple, "set": set}[kind](map(decode, content))


def confine(limits: dict, cpu_seconds: int) -> None:
    """Limits for this process alone: it is about to run what the model wrote."""
    _limit("CPU", cpu_seconds)  # a hard limit ends it, whatever it does with signals
    for name in ("fsize", "nofile", "nproc", "sigpending"):
        _limit(name.upper(), limits[name])
    _limit("CORE", 0)
    machine = platform.machine()
    numbers = dict(zip(CALLS, NUMBERS[machine], strict=True))
    jump = lambda code, value, yes, no: struct.pack("=HBBI", code, yes, no, value)  # noqa: E731
    load = lambda offset: struct.pack("=HBBI", 0x20, 0, 0, offset)  # noqa: E731
    give = lambda verdict: struct.pack("=HBBI", 0x06, 0, 0, verdict)  # noqa: E731
    equal, at_least, any_bit = 0x15, 0x35, 0x45
    first, second = 16, 24  # where the low halves of a call's arguments lie
    steps = [load(4), jump(equal, AUDIT_ARCH[machine], 1, 0), give(KILL), load(0)]
    steps += [jump(at_least, 0x40000000, 0, 1), give(KILL)]  # the x32 numbering of x86
    steps += [jump(at_least, NEWEST + 1, 0, 1), give(ENOSYS)]
    for number in map(int, DENIED[machine].split()):
        steps += [jump(equal, number, 0, 1), give(EPERM)]
    steps += [jump(equal, numbers["clone3"], 0, 1), give(ENOSYS)]  # its flags are out of sight; libc takes clone
    for name, commands in DENIED_COMMANDS.items():
        rest = [load(first if name == "prctl" else second)]
        for command in commands:
            rest += [jump(equal, command, 0, 1), give(EPERM)]
        steps += [jump(equal, numbers[name], 0, len(rest) + 1), *rest, give(ALLOW)]
    steps += [
        jump(equal, numbers["clone"], 0, 4),
        load(first),
        jump(any_bit, CLONE_THREAD, 1, 0),
        give(EPERM),
        give(ALLOW),
    ]
    steps += [jump(equal, numbers["prlimit"], 0, 3), load(first), jump(equal, 0, 1, 0), give(EPERM), give(ALLOW)]
    code = ctypes.create_string_buffer(b"".join(steps))
    rules = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    if _prctl(PR_SET_NO_NEW_PRIVS, 1) or _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, rules):
        os._exit(1)


def become_nobody() -> int:
    """Root without namespaces is at least not to stay root. Python's folders, which may lie in root's home, stay within
    reach by their descriptors; how many."""
    folders = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in sys.path if os.path.isdir(path)}
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:  # the root of a user namespace that has no other user
        return 0
    if os.access(os.__file__, os.R_OK):
        return 0
    moved = {path: f"/proc/self/fd/{os.dup2(fd, KEPT + i)}" for i, (path, fd) in enumerate(folders.items())}
    sys.path[:] = moved.values()
    sys.path_importer_cache.clear()
    for package in [module for module in sys.modules.values() if getattr(module, "__path__", None)]:
        for path in moved:
            package.__path__ = [part.replace(f"{path}/", f"{moved[path]}/") for part in package.__path__]
    return len(moved)


def empty(folder: str) -> None:
    """Removes all that is in it; ends the program's tests if that cannot be done."""
    with suppress(OSError):  # it is another's, or read-only
        os.chmod(folder, 0o1777)
        os.utime(folder, (0, 0))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                empty(entry.path)
                os.rmdir(entry.path)
            else:
                os.unlink(entry.path)


def receive(channel: int) -> dict:
    return json.loads(receive_body(channel))


def receive_body(channel: int) -> bytes:
    return _read(channel, HEADER.unpack(_read(channel, HEADER.size))[0])


def send(channel: int, message: dict) -> None:
    body = json.dumps(message, ensure_ascii=False).encode(errors="replace")
    view = memoryview(HEADER.pack(len(body)) + body)
    while view:
        view = view[os.write(channel, view) :]


def _read(channel: int, size: int) -> bytes:
    chunks = []
    while size:
        chunk = os.read(channel, min(size, 1 << 20))
        if not chunk:
            os._exit(0)  # the other side has what it wanted
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def _file(content: bytes) -> int:
    """A file in memory, without a name, that holds `content`; read from its start."""
    fd = os.memfd_create("test")
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _cpu_seconds(pid: int) -> float:
    return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3)


def _end_with(parent: int) -> None:
    """However the parent ends, this process does too."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _limit(name: str, value: int) -> None:
    kind = getattr(resource, f"RLIMIT_{name}")
    most = resource.getrlimit(kind)[1]
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(kind, (value, value))


def _prctl(option: int, value: int, pointer=None) -> int:
    zero = ctypes.c_ulong(0)
    return ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), pointer or zero, zero, zero)


if __name__ == "__main__":
    main()
