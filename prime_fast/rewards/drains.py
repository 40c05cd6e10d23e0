"""More hostile programs, in the form of `attacks`: they take what the whole machine shares, play with signals and
limits, leave marks for later tests, and forge what the sandbox says."""

LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
WIN = "print(w['win'])\n"
CALLED = "import ctypes, platform\nlibc = ctypes.CDLL(None)\nx86 = platform.machine() == 'x86_64'\n"
SCHEDULE = "for who in (w['pid'], os.getppid(), 1, 2, 3):\n"

STDIN = {
    "pages given to a pipe": CALLED
    + """
r, out = os.pipe(); page = ctypes.create_string_buffer(4096); v = (ctypes.c_ulong * 2)(ctypes.addressof(page), 4096)
assert libc.syscall(278 if x86 else 75, out, v, 1, 8) > 0; print(w['win'])""",
    "pages moved between pipes": CALLED
    + """
(a, b), (c, d) = os.pipe(), os.pipe(); os.write(b, b'x' * 4096)
assert libc.syscall(276 if x86 else 77, a, d, 4096, 0) > 0 or libc.syscall(275 if x86 else 76, a, 0, d, 0, 4096, 0) > 0
print(w['win'])""",
    "queues of asynchronous io": CALLED
    + "assert libc.syscall(206 if x86 else 0, 65536, ctypes.byref(ctypes.c_ulong())) == 0\n"
    + WIN,
    "watchers of files": "import ctypes\nassert ctypes.CDLL(None).inotify_init1(0) >= 0\n" + WIN,
    "watchers of file systems": LIBC + "assert libc.fanotify_init(0x200, 0) >= 0\n" + WIN,
    "large pipes": "import fcntl\nassert fcntl.fcntl(os.pipe()[1], 1031, 1 << 20) >= 1 << 20\n" + WIN,
    "timers by the thousand": CALLED
    + """
n, timer = 0, ctypes.c_void_p()
while n < 1000 and libc.syscall(222 if x86 else 107, 1, 0, ctypes.byref(timer)) == 0: n += 1
if n == 1000: print(w['win'])""",
    "memory in pipes": """
total = 0
try:
    while True:
        out = os.pipe()[1]; os.set_blocking(out, False)
        try:
            while True: total += os.write(out, bytes(65536))
        except BlockingIOError: pass
except OSError: pass
if total > 1 << 26: print(w['win'])""",
    "memory in sockets": """
import socket
total, kept = 0, []
try:
    while True:
        kept.append(socket.socketpair()); kept[-1][0].setblocking(False)
        kept[-1][0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)
        try:
            while True: total += kept[-1][0].send(bytes(65536))
        except BlockingIOError: pass
except OSError: pass
if total > 1 << 26: print(w['win'])""",
    "descriptors in flight": """
import array, socket
total = 0
try:
    while True:
        a, b = socket.socketpair(); a.setblocking(False); fd = os.memfd_create('x'); os.truncate(fd, 1 << 22)
        a.sendmsg([b'x'], [(1, 1, array.array('i', [fd, b.fileno()]))]); os.close(fd); b.close(); total += 1
except OSError: pass
if total > 256: print(w['win'])""",
    "memory in many memfds": """
total = 0
try:
    while True: total += os.write(os.memfd_create('x'), bytes(1 << 22))
except OSError: pass
if total > 1 << 29: print(w['win'])""",
    "memory behind holes": """
import fcntl
fd, n = os.memfd_create('x'), 0
try:
    while n < 1 << 30: os.posix_fallocate(fd, n, 1 << 24); n += 1 << 24
except OSError: pass
if n > 1 << 28: print(w['win'])""",
    "shared memory that is forgotten": """
import mmap
kept = []
for n in range(40): kept.append(mmap.mmap(-1, 1 << 26)); kept[-1].write(bytes(1 << 26))
print(w['win'])""",
    "descriptors by the thousand": "x = [os.open('/dev/null', 0) for n in range(1000)]\n" + WIN,
    "epolls by the thousand": "import select\nx = [select.epoll() for n in range(1000)]\n" + WIN,
    "threads with huge stacks": """
import threading, time
threading.stack_size(1 << 28)
for n in range(64): threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print(w['win'])""",
    "threads beyond the limit": """
import threading, time
threading.stack_size(1 << 15)
for n in range(300): threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print(w['win'])""",
    "terminals of its own": "import os\nos.openpty()\n" + WIN,
    "mode of a device": "import os\nos.chmod('/dev/null', 0o666)\n" + WIN,
    "limits raised": """
import resource as r
for name in ('NOFILE', 'NPROC', 'FSIZE', 'SIGPENDING', 'CPU', 'AS', 'CORE'):
    kind = getattr(r, 'RLIMIT_' + name); hard = r.getrlimit(kind)[1]
    try: r.setrlimit(kind, (hard + 1, hard + 1)); print(w['win']); break
    except (OSError, ValueError): pass""",
    "soft limit on time raised": """
import resource as r, signal, time
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
hard = r.getrlimit(r.RLIMIT_CPU)[1]; r.setrlimit(r.RLIMIT_CPU, (hard, hard))
while time.process_time() < 1.5: pass
print(w['win'])""",
    "time in many threads": """
import hashlib, threading, time
def burn():
    while True: hashlib.sha256(bytes(1 << 20))
for n in range(8): threading.Thread(target=burn, daemon=True).start()
while time.process_time() < 1.6: time.sleep(0.01)
print(w['win'])""",
    "end deferred by signals": """
import signal
for n in (signal.SIGXCPU, signal.SIGTERM, signal.SIGALRM): signal.signal(n, lambda *a: None)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
while True: pass""",
    "signals blocked": "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
    "signal to a pipe's owner": """
import fcntl
r, out = os.pipe()
for command, value in ((8, w['pid']), (10, 9)): fcntl.fcntl(r, command, value)
fcntl.fcntl(r, 4, 0o20000); os.write(out, b'x'); print(w['win'])""",
    "signal to a pipe's owner, the longer way": """
import fcntl, struct
r, out = os.pipe()
fcntl.fcntl(r, 15, struct.pack('ii', 1, w['pid'])); fcntl.fcntl(r, 4, 0o20000); os.write(out, b'x'); print(w['win'])""",
    "signal to a socket's owner": """
import fcntl, socket, struct
a, b = socket.socketpair()
for request in (0x8901, 0x8902): fcntl.ioctl(a, request, struct.pack('i', w['pid']))
print(w['win'])""",
    "signal by a notification": "import fcntl\nfcntl.fcntl(os.open('/tmp', 0), 1026, 0x80000002)\n" + WIN,
    "priority of others": SCHEDULE
    + "    try: os.setpriority(0, who, 19); print(w['win']); break\n    except OSError: pass",
    "priority of all of this user": "os.setpriority(os.PRIO_USER, 0, 19)\n" + WIN,
    "processors of others": SCHEDULE
    + "    try: os.sched_setaffinity(who, {0}); print(w['win']); break\n    except OSError: pass",
    "scheduling of others": SCHEDULE
    + "    try: os.sched_setscheduler(who, os.SCHED_IDLE, os.sched_param(0)); print(w['win']); break\n"
    + "    except OSError: pass",
    "input and output of others": CALLED
    + SCHEDULE
    + "    if libc.syscall(251 if x86 else 30, 1, who, 3 << 13) == 0: print(w['win']); break",
    "life beyond the parent's": LIBC + "assert libc.prctl(1, 0, 0, 0, 0) == 0\n" + WIN,
    "system calls of tomorrow": LIBC
    + """
for number in range(463, 500):
    if libc.syscall(number, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 38: print(w['win']); break""",
    "a filter of its own that listens": CALLED
    + """
code = (ctypes.c_ulong)(0x7fff000000000006); rules = (ctypes.c_ulong * 2)(1, ctypes.addressof(code))
fd = libc.syscall(317 if x86 else 277, 1, 8, rules)
assert fd >= 0 and libc.unshare(0x10000000) == 0; print(w['win'])""",
    "mark in a file": """
if os.path.exists('/tmp/mark'): print(w['win'])
open('/tmp/mark', 'w')""",
    "mark in shared memory": """
if os.path.exists('/dev/shm/mark'): print(w['win'])
open('/dev/shm/mark', 'w')""",
    "mark in a locked folder": """
if os.path.exists('/tmp/mark'): print(w['win'])
os.makedirs('/tmp/mark/inner'); open('/tmp/mark/inner/x', 'w')
os.chmod('/tmp/mark/inner', 0); os.chmod('/tmp/mark', 0)""",
    "mark in a deep folder": """
if os.listdir('/tmp'): print(w['win'])
for n in range(3000):
    os.mkdir('x' * 50); os.chdir('x' * 50)""",
    "mark in a locked /tmp": """
if os.stat('/tmp').st_mode & 0o777 == 0: print(w['win'])
os.chmod('/tmp', 0)""",
    "mark in the time of /tmp": """
if os.stat('/tmp').st_mtime == 5: print(w['win'])
os.utime('/tmp', (5, 5))""",
    "mark in an attribute": """
if 'user.mark' in os.listxattr('/tmp'): print(w['win'])
os.setxattr('/tmp', 'user.mark', b'x')""",
    "mark in a link": """
if os.path.lexists('/tmp/mark'): print(w['win'])
os.symlink('/usr', '/tmp/mark'); os.mkfifo('/tmp/fifo')""",
    "output by a file of its own": "os.dup2(os.open('/tmp/x', os.O_RDWR | os.O_CREAT), 1)\n" + WIN,
    "output sealed and stretched": """
import fcntl
os.ftruncate(1, 1 << 22); os.lseek(1, 1 << 22, 0)
try: fcntl.fcntl(1, 1033, 15)
except OSError: pass
print(w['win'])""",
    "statuses that mean limits": "sys.exit(91)",
    "exit after success by a thread": """
import threading
print(w['win'], flush=True); threading.Thread(target=lambda: os._exit(3)).start()
while True: pass""",
    "exit handler that fails": "import atexit\nprint(w['win'])\natexit.register(lambda: os._exit(1))",
    "crash after success": "import ctypes\nprint(w['win'], flush=True)\nctypes.string_at(0)",
    "zeros and a letter": "print('0' * 1_000_000 + 'x')",
    "digits and points": "print('1.' * 500_000)",
    "words by the million": "print('1 ' * 1_000_000)",
    "lines by the million": "print('1\\n' * 1_000_000)",
    "an exponent beyond all bounds": "print('1e' + '9' * 1_000_000)",
}

CALLS = {
    "refusal forged": """
import struct
def attack(world):
    for body in (b'{"refused": "no"}', b'{"exit": -9, "stopped": true}', b'{"loaded": true}', b'{"reply": "{}"}'):
        for fd in range(64):
            try: os.write(fd, struct.pack('<I', len(body)) + body)
            except OSError: pass""",
    "limit forged": """
import struct
body = b'{"value": 1, "limit": ["cpu"], "cpu": -1e9, "memory": "x", "stopped": true}'
def attack(world): os.write(3, struct.pack('<I', len(body)) + body)""",
    "time limit ignored in a call": """
import resource, signal, time
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
def attack(world):
    while time.process_time() < 1.5: pass
    return world['win']""",
    "answers by a thread": """
import struct, threading, time
def later():
    while True: os.write(3, struct.pack('<I', 15) + b'{"value": true}'); time.sleep(0.01)
threading.Thread(target=later, daemon=True).start()
def attack(world): return None""",
    "numbers that collide": "def attack(world): return [i * (2**61 - 1) for i in range(50_000)]",
    "numbers that collide as keys": "def attack(world):\n    return {float(i) * 2.0**70: 0 for i in range(30_000)}",
    "a million empty lists": "def attack(world): return [[] for _ in range(1_000_000)]",
    "long numbers by the score": "def attack(world): return [10 ** 40_000] * 20",
    "digits by the million": """
body = b'{"value": ' + b'7' * 10**6 + b'}'
def attack(world): os.writev(3, [len(body).to_bytes(4, 'little'), body])""",
    "value of no known kind": 'import struct\nbody = b\'{"value": {"module": "os"}}\'\n'
    "def attack(world): os.write(3, struct.pack('<I', len(body)) + body)",
    "iterator without end": "import itertools\ndef attack(world): return itertools.repeat(world)",
    "import hook": """
class Finder:
    def find_spec(self, name, path=None, target=None): print(name, path); return None
sys.meta_path.insert(0, Finder()); sys.modules.pop('json')
def attack(world): return [name for name in sys.modules if 'prime' in name] or None""",
    "trace of the harness": """
seen = []
def trace(frame, event, argument): seen.append({**frame.f_locals}); return trace
sys.settrace(trace); sys.setprofile(trace)
def attack(world):
    import re
    found = [x for x in re.findall('[0-9a-f]{32}', repr(seen)) if x != world['win']]
    return found[0] if found else None""",
    "audit of the harness": """
seen = []
sys.addaudithook(lambda event, arguments: seen.append((event, arguments)))
def attack(world):
    import re
    found = [x for x in re.findall('[0-9a-f]{32}', repr(seen)) if x != world['win']]
    return found[0] if found else None""",
    "memory of its own, searched": """
import ctypes, re
def attack(world):
    text = ctypes.string_at(id(world) & ~0xfffff, 1 << 20)
    found = [x for x in re.findall(rb'[0-9a-f]{32}', text) if x.decode() != world['win']]
    return found[0].decode() if found else None""",
    "arguments of the harness": "def attack(world): return ' '.join(sys.orig_argv)[-64:]",
    "exit handler of a call": "import atexit\natexit.register(print, 'x')\ndef attack(world): raise SystemExit",
    "recursion without end": "sys.setrecursionlimit(10**9)\ndef attack(world): return attack(world)",
}
