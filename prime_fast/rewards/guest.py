"""Runs inside the sandbox, as `python -c SOURCE LIMITS` with the standard library alone; started by `rewards.sandbox`.

The channel is a socket on descriptor 0, frames as in the pool. The first request is {"code", "function", "calls"}; then
    stdin programs   {"stdin": text} -> {"output": text, "exit": status}: each test in a fresh fork of this process
    calls            {"args": [...]} or {"setup": source, "value": source} -> {"value": encoded}: one process for all
and {"failed": text} where something raised. Nothing here knows an expected output: what model-written code can forge is
its own answers. It runs with a system-call filter that lets it start threads but no process, program or socket.
"""

import ctypes
import gc
import json
import math
import os
import platform
import resource
import struct
import sys
import time
import types
from contextlib import suppress
from numbers import Integral, Real

# What programs of contests and LeetCode expect without importing it; builtins last, as math and operator shadow them.
STARS = "string re collections heapq bisect copy math random statistics itertools functools operator io sys json typing"
PRELUDE = "".join(f"from {name} import *\n" for name in (*STARS.split(), "builtins"))
PRELUDE += "import datetime, " + STARS.replace(" ", ", ")
PRELUDE += """
class ListNode:
    def __init__(self, val=0, next=None): self.val, self.next = val, next
class TreeNode:
    def __init__(self, val=0, left=None, right=None): self.val, self.left, self.right = val, left, right
"""
RECURSION = 600_000
NOBODY = 65534
HEADER = struct.Struct("<I")

PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 4, 38, 22, 2
CLONE_THREAD = 0x10000
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
DENIED = {  # processes and programs · signals · others' memory · sockets · mounts · unbounded memory · kernel surface
    "x86_64": """57 58 59 322 109 112  62 129 200 234 297 424  101 310 311 312 438  41 42 49
        155 161 165 166 272 304 308 428 429 430 431 432 433 442  29 64 68 240 319 447
        135 163 167 169 175 179 246 248 249 250 298 313 321 323 425 426 427""",
    "aarch64": """221 281 154 157  129 130 131 138 240 424  117 270 271 272 438  198 200 203
        39 40 41 51 97 265 268 428 429 430 431 432 433 442  180 186 190 194 279 447
        60 89 92 104 105 142 217 218 219 224 241 273 280 282 425 426 427""",
}
CLONE, CLONE3, PRLIMIT = {"x86_64": (56, 435, 302), "aarch64": (220, 435, 261)}.get(platform.machine(), (0, 0, 0))


def main() -> None:
    limits = json.loads(sys.argv[1])
    channel = os.dup(0)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, *[ctypes.c_ulong(0)] * 4)
    _limit("AS", limits["memory"])
    sys.path += limits["packages"]
    sys.set_int_max_str_digits(0)
    task = receive(channel)
    module = types.ModuleType("solution" if task["calls"] else "__main__")
    sys.modules[module.__name__] = module
    exec(PRELUDE, module.__dict__)
    if os.getuid() == 0:  # without namespaces: at least not as root, now that Python is loaded (from root's home?)
        with suppress(OSError):  # the root of a user namespace that has no other user
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    try:
        program = compile(task["code"], "solution.py", "exec", dont_inherit=True)
    except Exception as error:
        return send(channel, {"failed": type(error).__name__})
    sys.setrecursionlimit(RECURSION)
    gc.freeze()  # what is loaded so far need not be walked in every fork
    if not task["calls"]:
        send(channel, {"loaded": True})
    while True:
        test = None if task["calls"] else receive(channel)
        read_fd, write_fd = (null, null) if task["calls"] else (_file(test["stdin"].encode()), _file(b""))
        child = os.fork()
        if child == 0:
            os.dup2(read_fd, 0)
            os.dup2(write_fd, 1)
            os.dup2(channel if task["calls"] else null, 3)
            os.closerange(4, 1 << 20)
            confine(limits)
            module.stdin = sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
            module.stdout = sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            if task["calls"]:
                answer(program, module, task["function"], limits)
            exec(program, module.__dict__)
            return None  # through the interpreter's end: exit handlers, buffers and threads as in any program
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if task["calls"]:
            return send(channel, {"exit": status})
        output = os.pread(write_fd, limits["output"], 0).decode(errors="replace")
        os.close(read_fd)
        os.close(write_fd)
        send(channel, {"output": output, "exit": status})


def answer(program, module: types.ModuleType, function: str | None, limits: dict) -> None:
    """Runs the program, then its calls, until the channel closes."""
    space, target = module.__dict__, None
    try:
        _limit("CPU", limits["cpu"], limits["total"])
        exec(program, space)
        if function:
            owner = space["Solution"]() if "Solution" in space and function not in space else module
            target = getattr(owner, function)
        send(3, {"loaded": True})
    except BaseException as error:
        send(3, {"failed": type(error).__name__})
        os._exit(1)
    while True:
        test = receive(3)
        try:
            _limit("CPU", math.ceil(time.process_time()) + limits["cpu"], limits["total"])
            if target:
                value = target(*decode(test["args"]))
            else:
                exec(test["setup"], space)
                value = eval(test["value"], space)
            reply = {"value": encode(value)}
        except BaseException as error:
            reply = {"failed": type(error).__name__}
        send(3, reply)


def encode(value):
    """A value as JSON that keeps tuples, sets and keys; what is no plain data becomes its type's name."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {"set": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
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
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    return {"tuple": tuple, "set": set}[kind](map(decode, content))


def confine(limits: dict) -> None:
    """Limits for this process alone: it is about to run what the model wrote."""
    _limit("CPU", limits["cpu"], limits["total"])
    for name in ("fsize", "nofile", "nproc"):
        _limit(name.upper(), limits[name])
    _limit("CORE", 0)
    machine, zero = platform.machine(), ctypes.c_ulong(0)
    jump = lambda code, value, yes, no: struct.pack("=HBBI", code, yes, no, value)  # noqa: E731
    load = lambda offset: struct.pack("=HBBI", 0x20, 0, 0, offset)  # noqa: E731
    give = lambda verdict: struct.pack("=HBBI", 0x06, 0, 0, verdict)  # noqa: E731
    equal, at_least, any_bit = 0x15, 0x35, 0x45
    steps = [load(4), jump(equal, AUDIT_ARCH[machine], 1, 0), give(KILL), load(0)]
    steps += [jump(at_least, 0x40000000, 0, 1), give(KILL)]  # the x32 numbering of x86
    for number in map(int, DENIED[machine].split()):
        steps += [jump(equal, number, 0, 1), give(EPERM)]
    steps += [
        jump(equal, CLONE3, 0, 1),
        give(ENOSYS),
    ]  # its flags are out of a filter's sight; libc falls back to clone
    steps += [jump(equal, CLONE, 0, 4), load(16), jump(any_bit, CLONE_THREAD, 1, 0), give(EPERM), give(ALLOW)]
    steps += [jump(equal, PRLIMIT, 0, 4), load(16), jump(equal, 0, 1, 0), give(EPERM), give(ALLOW), give(ALLOW)]
    code = ctypes.create_string_buffer(b"".join(steps))
    rules = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero):
        os._exit(1)
    if prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), rules, zero, zero):
        os._exit(1)


def receive(channel: int) -> dict:
    body = _read(channel, HEADER.unpack(_read(channel, HEADER.size))[0])
    return json.loads(body)


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


def _limit(name: str, value: int, hard: int | None = None) -> None:
    kind = getattr(resource, f"RLIMIT_{name}")
    most = resource.getrlimit(kind)[1]
    hard = value if hard is None else hard
    hard = hard if most == resource.RLIM_INFINITY else min(hard, most)
    resource.setrlimit(kind, (min(value, hard), hard))


if __name__ == "__main__":
    main()
