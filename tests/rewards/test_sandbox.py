import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import venv
from contextlib import suppress
from pathlib import Path

import processes
import pytest

from prime_fast.rewards import RewardPool, cgroup, escapes, isolate, score
from prime_fast.rewards.attacks import ATTACKS, READ, STDIN

SUM = "print(sum(map(int, input().split())))"
ROW = {"ability": "code", "reward_model": {"ground_truth": json.dumps({"inputs": ["1 2"], "outputs": ["3"]})}}
FORBID = [
    "unshare",
    "--user",
    "--map-root-user",
    "sh",
    "-c",
    'echo 0 > /proc/sys/user/max_user_namespaces; exec "$0" "$@"',
]

# What wins where there is no sandbox, so that its failure inside one means something.
REAL = (
    "environment",
    "environment of the parent",
    "secret file",
    "secret file through a symbolic link",
    "tcp connection",
    "tcp server",
    "udp",
    "unix socket",
    "abstract unix socket",
    "message to a unix socket",
    "a user namespace of its own",
    "memory of the parent as a file",
    "fork",
    "clone by the system call",
    "spawn",
    "process pool",
    "memory by maps",
    "one huge file",
    "shared memory files of others",
    "shared memory of others",
    "kill of a neighbour",
)
ORDINARY = ["secret file", "environment of every process", "tcp connection", "fork", "kill of everything", "disk"]


def run(code: str, *before: str, **options) -> subprocess.CompletedProcess:
    return processes.run([*before, sys.executable, "-c", textwrap.dedent(code)], timeout=60, **options)


@pytest.fixture(scope="module")
def world():
    with escapes.outside() as world:
        yield world


@pytest.fixture(scope="module")
def pool(world):
    with RewardPool("code", workers=1, timeout=escapes.SECONDS) as pool:
        yield pool


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name, world, pool):
    assert escapes.attack(name, world, pool) is None


def test_the_readme_counts_them():
    readme = Path(escapes.__file__).parents[2] / "README.md"
    assert f"`prime-fast doctor` tries {len(ATTACKS)} ways" in readme.read_text()


def test_attacks_are_valid_python():
    for name, (_, program) in ATTACKS.items():
        compile(program, name, "exec")


def test_the_pool_is_well_after_all_attacks(pool):
    truth, program = escapes.HONEST
    assert pool.score([program], [{"reward_model": {"ground_truth": truth}}]) == [1.0]
    assert pool.counts["errors"] == 0


@pytest.mark.parametrize("name", REAL)
def test_attack_wins_without_a_sandbox(name, tmp_path):
    with escapes.outside() as world:
        text = json.dumps(world.described())
        program = (READ + STDIN[name]).replace("'/tmp/", f"'{tmp_path}/")
        shell = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", program]  # a parent to look at
        out = processes.run(shell, input=text, timeout=60)
        assert world.secret in out.stdout or world.win in out.stdout, out.stderr


def test_only_python_and_the_system_can_be_seen():
    program = """
        import os
        def seen(places):
            devices = {"full", "null", "random", "shm", "urandom", "zero"}
            listed = set(os.listdir("/etc")) <= {"ld.so.cache", "localtime"}, set(os.listdir("/dev")) == devices
            return [os.getuid(), len(os.environ), *listed, any(map(os.path.exists, places))]
    """
    places = [
        "/proc",
        "/sys",
        "/run",
        "/var",
        "/home",
        "/etc/passwd",
        "/bin/sh",
        "/root/.bashrc",
        __file__,
    ]
    truth = {"inputs": [[places]], "outputs": [[1000, 6, True, True, False]], "fn_name": "seen"}
    row = {"reward_model": {"ground_truth": truth}}
    assert score([textwrap.dedent(program)], [row], reward="code", workers=1) == [1.0]


def test_python_may_lie_where_programs_write():
    """In /tmp, as a throw-away environment does: its files are no leftovers of a test."""
    program = "```python\nimport os\nprint(int(input()) + len(os.listdir('.')))\nopen('left', 'w').close()\n```"
    code = "import sys, sysconfig; from prime_fast.rewards import code; print(sysconfig.get_path('purelib'), "
    code += "code.grade(sys.argv[1], {'inputs': ['1', '2'], 'outputs': ['1', '2']}, seconds=10, sandbox='namespaces'))"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        venv.create(folder, symlinks=True, with_pip=False)
        here = os.pathsep.join(path for path in sys.path if path)
        command = [f"{folder}/bin/python", "-c", code, program]
        result = processes.run(command, env=processes.environment(PYTHONPATH=here))
        assert result.stdout.split()[0].startswith(folder) and result.stdout.split()[1] == "1.0", result.stderr


def run_as_ordinary_user(code: str) -> subprocess.CompletedProcess:
    """With the system's Python where this is root, as an ordinary user may not be allowed to run ours."""
    python = sys.executable
    before = []
    if os.geteuid() == 0:
        python, before = "/usr/bin/python3", ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"]
        version = processes.run([python, "-c", "import sys; print(sys.version_info >= (3, 11))"])
        if version.stdout.strip() != "True":
            pytest.skip("no such Python")
    root = str(Path(escapes.__file__).parents[2])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*before, python, "-c", textwrap.dedent(code)]
    return processes.run(command, env=environment, cwd="/")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_as_an_ordinary_user():
    code = f"""
        from prime_fast.rewards import escapes
        from prime_fast.rewards import RewardPool, score
        print(score([{SUM!r}], [{ROW!r}], reward="code", timeout=30, workers=1))
        with escapes.outside() as world, RewardPool("code", workers=1, timeout=escapes.SECONDS) as pool:
            for attack in {ORDINARY!r}:
                print(escapes.attack(attack, world, pool))
    """
    out = run_as_ordinary_user(code)
    assert out.stdout.split() == ["[1.0]"] + ["None"] * len(ORDINARY), out.stderr


class TestRefusal:
    def test_says_why_and_how(self):
        code = "from prime_fast.rewards import RewardPool\nRewardPool('auto', workers=1)"
        out = run(code, *FORBID)
        assert "ValueError: cannot isolate model-written code on this machine" in out.stderr
        assert "sysctl user.max_user_namespaces=10000" in out.stderr and "rlimits-only" in out.stderr

    def test_doctor(self):
        out = run("from prime_fast.views.doctor import host\nprint(*host.sandbox(), sep='\\n')", *FORBID)
        assert out.stdout.startswith("FAIL  sandbox: cannot isolate") and len(out.stdout.splitlines()) == 1

    def test_math_needs_no_isolation(self):
        code = """
            from prime_fast.rewards import score
            print(score([r"\\boxed{7}"], [{"reward_model": {"ground_truth": "7"}}], workers=1))
        """
        assert run(code, *FORBID).stdout.strip() == "[1.0]"

    def test_rlimits_only_works_there(self):
        code = f"""
            from prime_fast.rewards import score
            print(score([{SUM!r}], [{ROW!r}], reward="code", sandbox="rlimits-only", workers=1))
        """
        out = run(code, *FORBID)
        assert out.stdout.strip() == "[1.0]" and "SANDBOX OFF" in out.stderr

    def test_unknown_sandbox(self):
        with pytest.raises(ValueError, match='unknown sandbox "off": use "namespaces" or "rlimits-only"'):
            RewardPool("code", sandbox="off")


HELD_BY_LIMITS = [
    "environment",
    "tcp connection",
    "fork bomb",
    "kill of a neighbour",
    "memory by bytes",
    "shell",
    "endless loop",
    "signal to a pipe's owner",
    "signal to a pipe's owner, the longer way",
    "signal to a socket's owner",
    "priority of others",
    "processors of others",
    "scheduling of others",
    "input and output of others",
    "life beyond the parent's",
    "pages given to a pipe",
    "queues of asynchronous io",
    "large pipes",
    "timers by the thousand",
]
USES_PYTHON = """
import os, concurrent.futures, encodings.idna, fractions, importlib.metadata
import numpy as np
open('kept', 'w').write(input())
print(np.arange(int(open('kept').read())).sum() if os.listdir() == ['kept'] else os.listdir())
"""


@pytest.fixture(scope="module")
def open_pool():
    with RewardPool("code", 1, escapes.SECONDS, "rlimits-only") as pool:
        yield pool


@pytest.mark.parametrize("name", HELD_BY_LIMITS)
def test_rlimits_only_still_holds(name, world, open_pool):
    assert escapes.attack(name, world, open_pool) is None


def test_rlimits_only_runs_what_needs_all_of_python(caplog):
    """Also where Python lies in the home of root, who becomes nobody."""
    row = {"reward_model": {"ground_truth": {"inputs": ["3", "4"], "outputs": ["3", "6"]}}}
    with caplog.at_level(logging.WARNING):
        assert score([USES_PYTHON], [row], workers=1, timeout=60.0, reward="code", sandbox="rlimits-only") == [1.0]
    assert "SANDBOX OFF" in caplog.text


LIMITED = {
    "memory": "x = bytearray(1 << 31)",
    "output": "print('x' * (1 << 23))",
    "files": "x = [open('/dev/null') for _ in range(99)]",
    "threads": "import threading, time\n"
    "for _ in range(999): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
    "": "print(3)",
}


def test_limits_that_were_hit_are_told():
    called = {"reward_model": {"ground_truth": {"inputs": [[1]], "outputs": [1], "fn_name": "f"}}}
    held = "x = bytearray(b'x' * (1 << 26))\ndef f(x): return x"
    with RewardPool("code", workers=1, timeout=60.0) as pool:
        *verdicts, kept = pool.judge([*LIMITED.values(), held], [ROW] * len(LIMITED) + [called])
    assert [verdict.usage.limits for verdict in verdicts] == [(limit,) if limit else () for limit in LIMITED]
    assert all(verdict.usage.seconds > 0 and verdict.usage.memory > 1 << 20 for verdict in verdicts)
    assert kept.outcome == 1.0 and kept.usage.memory > 1 << 26 and not kept.usage.limits


def test_the_limit_on_time_cannot_be_ignored():
    """Neither of a test nor of a call, by the CPU time that it takes, whatever the clock says.

    The kernel ends a test by counting ticks, each whole to whoever runs when it comes: on a busy machine that is off by
    tenths of a second from the time that it then reports.
    """
    code = """
        import time
        from prime_fast.rewards.sandbox import Sandbox
        burn = "import signal\\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\\ndef f():\\n    while True: pass\\n"
        for code, calls, request in ((burn + "f()", False, {"stdin": ""}), (burn, True, {"args": []})):
            with Sandbox("namespaces", 1, 60) as box:
                for ask in ({"code": code, "function": "f", "calls": calls}, request):
                    reply = box.ask(ask, time.monotonic() + 60)
                print(reply["stopped"], reply["limit"], 0.5 < reply["cpu"] < 3)
    """
    assert run(code).stdout.split() == ["True", "cpu", "True"] * 2


class TestCgroup:
    """On made-up folders."""

    MOUNTS = "25 1 0:22 / {root} rw,nosuid - cgroup2 cgroup2 rw\n"

    @pytest.fixture
    def tree(self, tmp_path):
        """Of a machine whose session may divide its own cgroup among its children, but holds processes itself."""
        for path, controllers in (
            (".", "cpu memory pids"),
            ("user", "memory pids"),
            ("user/run", ""),
            ("user/low", "pids"),
        ):
            (tmp_path / path).mkdir(exist_ok=True)
            (tmp_path / path / "cgroup.subtree_control").write_text(controllers + "\n")
        return tmp_path

    def places(self, tree, own):
        return cgroup.places(f"5:memory:/x\n0::{own}\n", self.MOUNTS.format(root=tree))

    def test_where_it_may_be_made(self, tree):
        assert self.places(tree, "/") == [tree]
        assert self.places(tree, "/user") == [tree / "user", tree]
        assert self.places(tree, "/user/run") == self.places(tree, "/user/low") == [tree / "user"]

    def test_why_not(self, tree):
        (tree / "user" / "cgroup.subtree_control").write_text("pids\n")
        with pytest.raises(cgroup.NoCgroup, match="gives its children no memory controller"):
            self.places(tree, "/user/low/deep")
        with pytest.raises(cgroup.NoCgroup, match="no cgroup v2 is mounted"):
            cgroup.places("4:memory:/x\n", "25 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n")

    def test_is_tried(self, tree, monkeypatch):
        """As a folder's new folders have no memory.max."""
        monkeypatch.setattr(cgroup, "_here", lambda: [tree])
        cgroup.parent.cache_clear()
        with pytest.raises(cgroup.NoCgroup, match=f"no cgroup can be made in {tree} .No such file or directory"):
            cgroup.parent()
        assert not list(tree.glob("prime-fast-*"))

    def test_what_it_tells(self, tree):
        group = object.__new__(cgroup.Cgroup)
        group.folder = tree
        for name, text in (("memory.peak", "9"), ("memory.events", "max 4\noom_kill 1"), ("pids.events", "max 0")):
            (tree / name).write_text(text + "\n")
        assert group.took() == {"memory": 9, "limit": "memory"}

    def test_what_the_killed_leave_is_removed(self, tree, monkeypatch):
        monkeypatch.setattr(cgroup, "_here", lambda: [tree])
        gone = subprocess.Popen(["true"])
        gone.wait()
        for pid in (gone.pid, os.getpid()):
            (tree / f"prime-fast-{pid}-0a").mkdir()
        cgroup.sweep()
        assert [path.name for path in tree.glob("prime-fast-*")] == [f"prime-fast-{os.getpid()}-0a"]


class TestRealCgroup:
    """Where this machine has one to give."""

    PROGRAMS = [
        "import mmap\nx = [mmap.mmap(-1, 1 << 22) for _ in range(64)]\n"
        "for part in x: part.write(bytes(1 << 22))\nprint(3)",
        "import threading, time\n"
        "for _ in range(30): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\nprint(3)",
        "print(3)",
    ]

    @pytest.fixture
    def parent(self):
        cgroup.parent.cache_clear()
        try:
            return cgroup.parent()
        except cgroup.NoCgroup as error:
            pytest.skip(str(error))

    @pytest.mark.parametrize("way", ["namespaces", "limits_alone"])
    def test_what_it_holds(self, parent, way):
        code = f"""
            import os, time
            from contextlib import suppress
            from prime_fast.rewards import cgroup, isolate, sandbox
            cgroup.MEMORY_BYTES, cgroup.PIDS = 64 << 20, 20
            sandbox.isolation = lambda mode: isolate.{way}
            for program in {self.PROGRAMS!r}:
                output, deadline = "", time.monotonic() + 200
                with sandbox.Sandbox("", 60, 60) as box, suppress(EOFError):
                    box.ask({{"code": program, "function": None, "calls": False}}, deadline)
                    output = box.ask({{"stdin": ""}}, deadline)["output"]
                held = 1 << 20 < box.took.get("memory", 1 << 21) <= 64 << 20
                print(box.took["limit"], held, repr(output))
            print(list(cgroup.parent().glob(f"prime-fast-{{os.getpid()}}-*")))
        """
        out = processes.run([sys.executable, "-c", textwrap.dedent(code)])
        told = ["memory True ''", "threads True ''", r"None True '3\n'", "[]"]
        assert out.stdout.splitlines() == told, out.stdout + out.stderr

    def test_ends_who_is_in_it(self, parent):
        group = cgroup.Cgroup(parent)
        program = subprocess.Popen(["sleep", "60"])
        group.add(program.pid)
        with pytest.raises(FileNotFoundError):
            group._write("memory.max.of.tomorrow", 1)
        group.end()
        assert program.wait() == -signal.SIGKILL and not group.folder.exists()


BUBBLEWRAP = """
from prime_fast.rewards import isolate, sandbox
from prime_fast.rewards.code import grade
isolate.namespaces = isolate.bubblewrap
sandbox.isolation("namespaces")  # now, not in the time of a program
def reward(data_source, solution_str, ground_truth, extra_info):
    return grade(solution_str, ground_truth, seconds=60, sandbox="namespaces")
"""
HELD_BY_BUBBLEWRAP = [
    "environment of every process",
    "secret file",
    "secret file through /proc/1/root",
    "inherited descriptors",
    "a user namespace of its own",
    "remount for writing",
    "disk and kernel devices",
    "file outside",
    "new file in the root",
    "tcp connection",
    "abstract unix socket",
    "fork",
    "daemon that outlives its parent",
    "disk",
    "disk under /dev/shm",
    "kill of a neighbour",
    "kill of everything",
    "memory of the parent as a file",
    "host name",
    "shared memory files of others",
    "threads beyond the limit",
    "terminals of its own",
    "mode of a device",
    "mark in shared memory",
    "endless loop",
]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
class TestBubblewrap:
    """The other way into namespaces."""

    def test_holds(self):
        code = f"""
            import tempfile
            from prime_fast.rewards import RewardPool, escapes, score
            with escapes.outside() as world, tempfile.NamedTemporaryFile("w", suffix=".py") as file:
                file.write({BUBBLEWRAP!r})
                file.flush()
                reward = f"{{file.name}}:reward"
                print(score([{SUM!r}], [{ROW!r}], reward=reward, timeout=60, workers=1))
                with RewardPool(reward, workers=1, timeout=escapes.SECONDS) as pool:
                    for attack in {HELD_BY_BUBBLEWRAP!r}:
                        print(escapes.attack(attack, world, pool))
        """
        out = run_as_ordinary_user(code)
        assert out.stdout.split() == ["[1.0]"] + ["None"] * len(HELD_BY_BUBBLEWRAP), out.stdout + out.stderr

    def test_its_own_words_say_why_it_does_not_start(self):
        code = """
            from prime_fast.rewards import isolate, sandbox
            isolate.namespaces, isolate._visible = isolate.bubblewrap, lambda: []
            sandbox.isolation("namespaces")
        """
        error = run_as_ordinary_user(code).stderr
        assert "bubblewrap: its first process did not answer (EOFError: bwrap: execvp" in error, error

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    def test_root_is_refused(self):
        with pytest.raises(isolate.Refused, match="would leave programs root"):
            isolate.bubblewrap(None, [], None)


@pytest.mark.parametrize(
    ("sandbox", "whom"),
    [("namespaces", ["parent"]), ("namespaces", ["scorer"]), ("namespaces", ["watcher"])]
    + [("rlimits-only", ["watcher", "scorer"])],
)
def test_no_program_survives_a_kill(sandbox, whom, tmp_path):
    """SIGKILL of any of our processes while a program runs ends that program."""
    code = f"""
        from prime_fast.rewards import RewardPool
        pool = RewardPool("code", workers=1, timeout=600, sandbox={sandbox!r})
        print(pool._pool[0].process.pid, flush=True)
        pool.score(["import ctypes\\nctypes.CDLL(None).prctl(1, 0)\\nwhile True: pass"], [{ROW!r}])
        pool.close()
    """
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    parent = processes.start(command, stdout=subprocess.PIPE, env=environment)
    watcher = int(parent.stdout.readline())
    for _ in range(200):
        if len(family := escapes.descendants(watcher)) >= 3:
            break
        time.sleep(0.05)
    scorer = family[0]
    assert bool(list(tmp_path.iterdir())) is (sandbox == "rlimits-only")
    for victim in whom:
        os.kill({"parent": parent.pid, "watcher": watcher, "scorer": scorer}[victim], signal.SIGKILL)
    try:
        assert all(_ends(pid) for pid in family[1:])
        while whom != ["parent"] and parent.poll() is None:  # the sample is tried once more, then the pool is closed
            for pid in escapes.descendants(parent.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        assert not list(tmp_path.iterdir())
    finally:
        processes.end(parent)
    assert _ends(watcher) and _ends(scorer)


def _ends(pid: int) -> bool:
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False
