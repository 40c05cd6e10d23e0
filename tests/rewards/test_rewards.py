import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import processes
import pytest

from prime_fast.rewards import RewardPool, score

ROW = {
    "data_source": "test",
    "prompt": [{"role": "user", "content": "?"}],
    "reward_model": {"ground_truth": "7"},
    "extra_info": {"index": 3},
}

# One function that does what the response says.
ACTOR = """
    import os, re, subprocess, sys, time

    def act(data_source, solution_str, ground_truth, extra_info=None):
        what, _, value = solution_str.partition(" ")
        if what == "hang":
            while True:
                time.sleep(0.01)
        elif what == "regex":  # C code that never gives up the interpreter lock
            re.match(r"(a+)+$", "a" * 60 + "b")
        elif what == "child":
            child = subprocess.Popen(["sleep", "600"])
            open(value, "w").write(str(child.pid))
            time.sleep(600)
        elif what == "daemon":  # in a session of its own, and orphaned
            code = f"import os; os.setsid(); os.fork() and os._exit(0); open({value!r}, 'w').write(str(os.getpid()))"
            subprocess.run([sys.executable, "-c", code + "; import time; time.sleep(600)"])
            while not os.path.exists(value) or not open(value).read():
                time.sleep(0.01)
            return 0.5
        elif what == "print":
            while True:
                print("x" * 10_000, flush=True)
                os.write(1, b"x" * 10_000)
                sys.stderr.write("x" * 10_000)
        elif what == "chatter":
            print("{}", flush=True)
            os.write(1, b"\\0\\0\\0\\0")
            sys.stderr.write("noise")
        elif what == "input":
            return float(sys.stdin.read() == "")
        elif what == "die":
            os.kill(os.getpid(), 9)
        elif what == "once" and not os.path.exists(value):
            open(value, "w").close()
            os.kill(os.getpid(), 9)
        elif what == "exit":
            sys.exit(0)
        elif what == "raise":
            raise KeyError(value)
        elif what == "nap":
            time.sleep(float(value))
        elif what == "pid":
            open(value, "w").write(str(os.getpid()))
            return 1.0
        elif what == "value":
            return {"None": None, "nan": float("nan"), "dict": {"score": 0.5}, "true": True}.get(value, value)
        return 0.25
"""


@pytest.fixture
def write(tmp_path):
    def write(code, name="act"):
        path = tmp_path / "reward_file.py"
        path.write_text(textwrap.dedent(code))
        return f"{path}:{name}"

    return write


@pytest.fixture
def actor(write):
    return write(ACTOR)


def stat(pid: int | str) -> list[str]:
    """Process state, parent id, ... from /proc; [] if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def ends(pid: int) -> bool:
    """True if the process ends within 5 s."""
    for _ in range(100):
        if stat(pid)[:1] in ([], ["Z"]):
            return True
        time.sleep(0.05)
    return False


def children() -> set[int]:
    """Ids of our child processes, zombies too."""
    processes = {int(pid): stat(pid) for pid in os.listdir("/proc") if pid.isdigit()}
    return {pid for pid, fields in processes.items() if fields[1:2] == [str(os.getpid())]}


class TestPool:
    def test_order_is_kept_when_samples_end_out_of_order(self, write):
        code = """
            import time
            def act(data_source, solution_str, ground_truth):
                time.sleep(float(solution_str))
                return float(solution_str)
        """
        values = [0.2, 0.0, 0.1, 0.0, 0.05, 0.01]
        with RewardPool(write(code), workers=3) as pool:
            assert pool.score([str(value) for value in values], [ROW] * len(values)) == values

    @pytest.mark.parametrize("what", ["hang", "regex", "print"])
    def test_hanging_sample_is_killed_at_its_deadline(self, actor, what):
        with RewardPool(actor, workers=1, timeout=0.5) as pool:
            start = time.monotonic()
            assert pool.score([what, "ok"], [ROW, ROW]) == [0.0, 0.25]
            assert 0.5 <= time.monotonic() - start < 60.0  # of which most is the start of two workers
            assert pool.counts == {"timeouts": 1, "errors": 0, "crashes": 0}

    def test_a_forked_child_that_returns_does_not_answer(self, write):
        code = """
            import os
            def act(data_source, solution_str, ground_truth):
                os.fork()
                return float(solution_str)
        """
        values = [k / 8 for k in range(8)]
        with RewardPool(write(code), workers=1) as pool:
            assert pool.score([str(value) for value in values], [ROW] * len(values)) == values

    def test_an_error_is_no_outcome_whatever_it_carries(self, write):
        code = """
            class Judged(Exception):
                score = 0.7
            def act(data_source, solution_str, ground_truth):
                raise Judged("first line\\n  second line")
        """
        with RewardPool(write(code), workers=1) as pool:
            assert pool.judge(["r"], [ROW]) == [(0.0, "errors", "Judged: first line second line", None)]

    def test_clock_starts_when_the_sample_starts(self, actor):
        """Six samples of 0.3 s behind one worker all fit a deadline of 1.5 s: none is charged for its wait."""
        with RewardPool(actor, workers=1, timeout=1.5) as pool:
            assert pool.score(["nap 0.3"] * 6, [ROW] * 6) == [0.25] * 6

    def test_what_a_hanging_sample_started_is_killed_too(self, actor, tmp_path):
        with RewardPool(actor, timeout=0.5) as pool:
            assert pool.score([f"child {tmp_path / 'pid'}"], [ROW]) == [0.0]
        assert ends(int((tmp_path / "pid").read_text()))

    @pytest.mark.parametrize("after", ["close", "hang", "die"])
    def test_what_left_the_session_is_killed_too(self, actor, tmp_path, after):
        with RewardPool(actor, workers=1, timeout=5.0) as pool:
            assert pool.score([f"daemon {tmp_path / 'pid'}"], [ROW]) == [0.5]
            daemon = int((tmp_path / "pid").read_text())
            assert stat(daemon)[:1] not in ([], ["Z"])
            if after != "close":
                pool.timeout = 0.5
                assert pool.score([after], [ROW]) == [0.0]
                assert ends(daemon)
        assert ends(daemon)

    @pytest.mark.parametrize("what", ["die", "exit"])
    def test_crashed_worker_is_replaced(self, actor, what):
        with RewardPool(actor, workers=1) as pool:
            assert pool.score(["ok", what, "ok"], [ROW] * 3) == [0.25, 0.0, 0.25]
            assert pool.counts == {"timeouts": 0, "errors": 0, "crashes": 1}

    def test_a_sample_whose_worker_died_is_tried_once_more(self, actor, tmp_path):
        with RewardPool(actor, workers=1) as pool:
            assert pool.score(["ok", f"once {tmp_path / 'died'}", "ok"], [ROW] * 3) == [0.25] * 3
            assert (tmp_path / "died").exists() and pool.counts["crashes"] == 0

    def test_worker_that_died_between_calls_costs_no_sample(self, actor, tmp_path):
        with RewardPool(actor, workers=1) as pool:
            assert pool.score([f"pid {tmp_path / 'pid'}"], [ROW]) == [1.0]
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
            time.sleep(0.1)
            assert pool.score(["ok"], [ROW]) == [0.25]
            assert pool.counts["crashes"] == 0

    def test_chatter_and_input_do_not_reach_the_protocol(self, actor):
        with RewardPool(actor, workers=1) as pool:
            assert pool.score(["chatter", "input", "chatter"], [ROW] * 3) == [0.25, 1.0, 0.25]

    def test_long_texts_pass(self, actor):
        with RewardPool(actor, workers=2) as pool:
            assert pool.score(["ok " + "é" * 500_000] * 4, [ROW] * 4) == [0.25] * 4

    def test_exceptions_are_counted_and_the_first_is_told(self, actor, caplog):
        with RewardPool(actor, workers=1) as pool, caplog.at_level(logging.WARNING):
            assert pool.score(["raise one", "raise two", "value None", "ok"], [ROW] * 4) == [0.0, 0.0, 0.0, 0.25]
            assert pool.counts["errors"] == 3
        assert "KeyError: 'one'" in caplog.text and len(caplog.records) == 1

    def test_values(self, actor):
        with RewardPool(actor, workers=1) as pool:
            assert pool.score(["value dict", "value true", "value 1.0"], [ROW] * 3) == [0.5, 1.0, 1.0]
            for bad in ("1.5", "-0.1", "nan", "inf"):
                with pytest.raises(ValueError, match=r"^row 1 of .*prompt '\?'\): .*returned .* must lie in \[0, 1\]"):
                    pool.score(["ok", f"value {bad}"], [ROW] * 2)
            assert pool.score(["ok"], [ROW]) == [0.25]

    def test_nothing_is_left_after_close(self, actor):
        before = children()
        pool = RewardPool(actor, workers=3, timeout=0.5)
        pool.score(["ok", "die", "hang", "ok", "ok"], [ROW] * 5)
        assert children() - before
        pool.close()
        assert children() <= before

    def test_nothing_is_left_running_after_an_exception(self, actor):
        before = children()
        with RewardPool(actor, workers=2) as pool:
            with pytest.raises(ValueError):
                pool.score(["hang", "value 2"], [ROW] * 2)
            assert children() <= before

    def test_ctrl_c(self, actor):
        """SIGINT during a hanging sample ends score() at once and leaves no process."""
        code = f"""
            import signal
            from prime_fast.rewards import RewardPool
            signal.signal(signal.SIGINT, signal.default_int_handler)  # these tests may run with it ignored
            with RewardPool({actor!r}, workers=2, timeout=600) as pool:
                print("ready", *(w.process.pid for w in pool._pool), flush=True)
                pool.score(["hang", "hang"], [{ROW!r}] * 2)
        """
        command = [sys.executable, "-c", textwrap.dedent(code)]
        parent = processes.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        worker = int(parent.stdout.readline().split()[1])
        time.sleep(0.5)
        parent.send_signal(signal.SIGINT)
        try:
            assert "KeyboardInterrupt" in parent.communicate(timeout=30)[1]
        finally:
            processes.end(parent)
        assert ends(worker)

    @pytest.mark.parametrize("what", ["hang", "regex"])
    def test_workers_die_with_their_parent(self, actor, what):
        code = f"""
            from prime_fast.rewards import RewardPool
            pool = RewardPool({actor!r}, workers=1, timeout=600)
            print(pool._pool[0].process.pid, flush=True)
            pool.score([{what!r}], [{ROW!r}])
        """
        parent = processes.start([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
        worker = int(parent.stdout.readline())
        time.sleep(0.5)
        parent.kill()
        parent.communicate()
        assert ends(worker)

    def test_workers_see_one_thread_and_no_gpu(self, write):
        code = """
            import os
            def act(data_source, solution_str, ground_truth):
                return float((os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("1", ""))
        """
        assert score(["x"], [ROW], reward=write(code)) == [1.0]

    def test_import_is_light(self):
        code = "import sys, prime_fast.rewards; print([m for m in ('torch', 'deepspeed', 'vllm') if m in sys.modules])"
        assert processes.run([sys.executable, "-c", code]).stdout.strip() == "[]"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"reward": "maths"}, 'unknown reward "maths"'),
            ({"workers": 0}, "at least 1"),
            ({"sandbox": "none"}, 'unknown sandbox "none"'),
            ({"timeout": 0}, "positive"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            RewardPool(**arguments)

    def test_lengths_must_agree(self):
        with pytest.raises(ValueError, match="1 responses for 2 rows"):
            score(["x"], [ROW, ROW])

    def test_nothing_to_score(self):
        assert score([], []) == []


class TestAbilities:
    def test_names_that_rows_use(self):
        rows = [ROW | {"ability": name} for name in ("MATH", " Maths", "mathematics", None, "")]
        tests = {"ground_truth": {"inputs": [""], "outputs": ["7"]}}
        rows += [ROW | {"ability": name, "reward_model": tests} for name in ("CODE", "coding", "Programming")]
        with RewardPool("auto", workers=1) as pool:
            assert pool.score([r"\boxed{7}"] * 5 + ["print(7)"] * 3, rows) == [1.0] * 8
        with pytest.raises(ValueError, match='row 0 has ability "code", which reward "math-strict" cannot score'):
            score(["print(7)"], rows[5:6], reward="math-strict")


class TestCustomFunctions:
    def test_verl(self, write):
        code = """
            def act(data_source, solution_str, ground_truth, extra_info):
                return float((data_source, solution_str, ground_truth, extra_info) == ("test", "r", "7", {"index": 3}))
        """
        assert score(["r"], [ROW | {"prompt_ids": [1]}], reward=write(code)) == [1.0]

    def test_trl_conversational(self, write):
        code = """
            def act(prompts, completions, extra_info, **columns):
                assert prompts == [[{"role": "user", "content": "?"}]]
                assert completions == [[{"role": "assistant", "content": "r"}]]
                assert extra_info == [{"index": 3}] and "prompt_ids" not in columns
                return [float(columns["ground_truth"] == ["7"] and columns["data_source"] == ["test"])]
        """
        assert score(["r"], [ROW | {"prompt_ids": [1]}], reward=write(code)) == [1.0]

    def test_trl_plain_text_and_none(self, write):
        code = """
            def act(completions, hint):
                return [None if hint == ["skip"] else float(completions == ["r"])]
        """
        rows = [{"prompt": "text", "hint": "use"}, {"prompt": "text", "hint": "skip"}]
        with RewardPool(write(code)) as pool:
            assert pool.score(["r", "r"], rows) == [1.0, 0.0]
            assert pool.counts["errors"] == 0

    def test_trl_rows_without_a_truth(self, write):
        """As the loader makes them: what it added is not handed on, and its absence is no error."""
        code = """
            def act(prompts, completions, **columns):
                assert columns == {"hint": ["x"]}, columns
                return [1.0]
        """
        row = {"prompt": "text", "hint": "x", "data_source": None, "reward_model": None, "extra_info": None}
        with RewardPool(write(code), workers=1) as pool:
            assert pool.score(["r"], [row | {"_added": ["data_source", "reward_model", "extra_info"]}]) == [1.0]
            assert pool.counts["errors"] == 0

    @pytest.mark.parametrize("parameters", ["data_source, solution_str, ground_truth", "completions, ground_truth"])
    def test_what_rows_lack_is_never_a_zero(self, write, parameters):
        for model in (None, 5):
            with pytest.raises(ValueError, match="requires .*ground_truth.*, which the rows do not have"):
                score(["r"], [ROW | {"reward_model": model}], reward=write(f"def act({parameters}): return [1.0]"))

    def test_a_row_that_cannot_be_handed_over_is_never_a_zero(self, write):
        with pytest.raises(ValueError, match="cannot be given a row: KeyError: 'prompt'"):
            score(["r"], [{"reward_model": {"ground_truth": "7"}}], reward=write("def act(completions): return [1.0]"))

    def test_trl_column_that_rows_lack(self, write):
        reward = write("def act(completions, solution): return [1.0]")
        with pytest.raises(ValueError, match=r"requires \['solution'\], which the rows do not have"):
            score(["r"], [ROW], reward=reward)

    def test_module_and_neighbour(self, write, tmp_path):
        (tmp_path / "neighbour.py").write_text("VALUE = 0.75")
        code = """
            import json, numpy
            from neighbour import VALUE
            def act(data_source, solution_str, ground_truth):
                return VALUE
        """
        with RewardPool(write(code), workers=1) as pool:
            assert pool.score(["r"], [ROW]) == [0.75]
            assert set(pool.sources) == {"function", "reward_file", "neighbour"}
        row = {"data_source": "", "reward_model": {"ground_truth": "8"}, "extra_info": {"steps": 1}}
        assert score(["4*2=8"], [row], reward="prime_fast.stages.quickstart:compute_score") == [1.0]

    @pytest.mark.parametrize(
        ("code", "name", "message"),
        [
            ("import no_such_module", "act", "cannot be imported: ModuleNotFoundError.*no_such_module"),
            ("x = (", "act", "cannot be imported: SyntaxError"),
            ("act = 1", "act", 'no function "act"'),
            ("def other(a): pass", "act", 'no function "act"'),
            ("def act(prompt, answer): pass", "act", r"takes \(prompt, answer\).*compute_score\(.*reward\(prompts"),
        ],
    )
    def test_bad_functions(self, write, code, name, message):
        with pytest.raises(ValueError, match=message):
            RewardPool(write(code, name))

    def test_missing_file_and_module(self):
        with pytest.raises(ValueError, match="cannot be imported: FileNotFoundError"):
            RewardPool("no/such/file.py:f")
        with pytest.raises(ValueError, match="cannot be imported: ModuleNotFoundError"):
            RewardPool("no_such_package.module:f")

    def test_worker_that_ends_while_importing(self, write):
        with pytest.raises(ValueError, match="was not ready .*exit code 5"):
            RewardPool(write("import os; os._exit(5)"))


class TestSources:
    """What `RewardPool.sources` covers: enough that no change of the user's code goes unseen, and no more."""

    def sources(self, reward: str) -> dict[str, str]:
        with RewardPool(reward, workers=1) as pool:
            pool.score(["r"], [ROW | {"ability": "math"}])
            return pool.sources

    def test_a_package_of_the_users(self, tmp_path, monkeypatch):
        package = tmp_path / "judging"
        (package / "deep").mkdir(parents=True)
        files = {"__init__.py": "", "deep/__init__.py": "", "deep/rules.py": "ONE = 1.0\n", "unused.py": ""}
        files["main.py"] = "from judging.deep.rules import ONE\ndef act(completions): return [ONE]\n"
        for name, code in files.items():
            (package / name).write_text(code)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        before = self.sources("judging.main:act")
        assert set(before) == {"function", "judging", "judging.main", "judging.deep", "judging.deep.rules"}
        (package / "deep/rules.py").write_text("ONE = 1.00\n")
        (package / "unused.py").write_text("changed")
        after = self.sources("judging.main:act")
        assert [name for name in after if after[name] != before[name]] == ["judging.deep.rules"]

    def test_ours_are_known_by_their_version(self):
        assert self.sources("math") == {}
        assert set(self.sources("prime_fast.stages.quickstart:compute_score")) == {
            "function",
            "prime_fast.stages.quickstart",
        }
