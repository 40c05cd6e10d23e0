"""Runs that are asked to leave, and runs that hang."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from test_trainer import stable, weights

from prime_fast.cli import main
from prime_fast.engine import checkpoint, interrupt
from prime_fast.metrics import read_metrics
from prime_fast.rollout.hf import HFEngine
from prime_fast.stages.sft import Sft
from prime_fast.trainer import Trainer

SETTINGS = ["steps=3", "log.eval_every=3"]


def train(workspace, run_dir, *words):
    return main(["train", str(workspace / "config.yaml"), f"run_dir={run_dir}", *SETTINGS, *words])


def ask(number=signal.SIGTERM):
    """Send the signal to this process, and wait until its watchdog has heard it."""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 30
    while not interrupt.asked():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def when(monkeypatch):
    """when(step, phase, act): call act() as soon as the trainer begins this phase of this step."""

    def plan(step, phase, act):
        begins = Trainer._begins

        def begin(self, name):
            if (self.work.step, name) == (step, phase):
                monkeypatch.setattr(Trainer, "_begins", begins)
                act()
            begins(self, name)

        monkeypatch.setattr(Trainer, "_begins", begin)

    return plan


def in_the_middle_of_a_response(monkeypatch, act):
    forward, calls = HFEngine._forward, []

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            act()
        return forward(*arguments)

    monkeypatch.setattr(HFEngine, "_forward", counted)
    return calls


def test_a_run_asked_to_leave_again_and_again_ends_with_the_same_bits(workspace, tmp_path, when, monkeypatch, capsys):
    """One command line for all of it, as a requeued job has it: --resume starts anew where there is no checkpoint."""
    assert train(workspace, tmp_path / "whole") == 0
    run = tmp_path / "run"

    def leaves(step, phase, saved):
        assert train(workspace, run, "--resume") == 143
        (told,) = capsys.readouterr().err.splitlines()
        after = f"continue from {run}/checkpoints/step-{saved:06d} with --resume" if saved else "no checkpoint was"
        assert told.startswith(f"prime-fast: asked to leave in step {step}, phase {phase}; {after}"), told
        newest = checkpoint.latest(run)
        assert newest == (run / f"checkpoints/step-{saved:06d}" if saved else None)

    capsys.readouterr()
    when(0, "eval", ask)  # before anything was trained
    leaves(0, "eval", saved=0)
    when(1, "policy", lambda: ask(signal.SIGUSR1))  # a weight has moved: the step is made to its end
    leaves(2, "generate", saved=1)
    with monkeypatch.context() as patch:
        calls = in_the_middle_of_a_response(patch, ask)  # of step 2
        leaves(2, "reward", saved=1)
        assert len(calls) == 5
    when(3, "reference", ask)  # what came of its rollouts is given up
    leaves(3, "reference", saved=2)
    when(3, "sync", ask)  # trained, and not evaluated
    leaves(3, "eval", saved=3)
    assert [record["step"] for record in read_metrics(run)] == [0, 1, 2]
    assert train(workspace, run, "--resume") == 0
    assert stable(read_metrics(run)) == stable(read_metrics(tmp_path / "whole"))
    assert checkpoint.best(run).name == checkpoint.best(tmp_path / "whole").name
    for name in ("policy", "prm"):
        expected, got = weights(tmp_path / "whole", name), weights(run, name)
        assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_what_ends_a_run_ends_it_though_it_left_before_the_evaluation(workspace, tmp_path, when, capsys):
    """A watcher of watch.stop begins in a step whose evaluation is made after --resume."""
    (tmp_path / "reward.py").write_text("def compute_score(data_source, solution_str, ground_truth):\n    return 0.0\n")
    words = [f"reward.function={tmp_path}/reward.py:compute_score", "watch.stop=[reward_constant]"]
    words += ["rollout.keep=[0, 1]", "log.eval_every=2", "--resume"]
    when(2, "eval", ask)
    for code, told in ((143, "asked to leave in step 2, phase eval"), (1, "stopped after step 2 by reward_constant")):
        assert train(workspace, tmp_path / "run", *words) == code
        assert told in capsys.readouterr().err
    assert train(workspace, tmp_path / "run", *words) == 0
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert "eval_accuracy" in records[2]


def test_sft_leaves_before_an_evaluation_and_makes_it_later(workspace, tmp_path, monkeypatch, capsys):
    words = ["sft", str(workspace / "config.yaml"), f"sft.eval={workspace}/rows.jsonl", "sft.steps=2"]
    assert main([*words, f"run_dir={tmp_path}/whole"]) == 0
    step = Sft.step

    def asked(self, number):
        if number == 2:
            ask()
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Sft, "step", asked)
        assert main([*words, f"run_dir={tmp_path}/run", "--resume"]) == 143
    assert "asked to leave after step 2; continue from" in capsys.readouterr().err
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [0, 1]
    assert main([*words, f"run_dir={tmp_path}/run", "--resume"]) == 0
    assert stable(read_metrics(tmp_path / "run")) == stable(read_metrics(tmp_path / "whole"))
    assert "eval_loss" in read_metrics(tmp_path / "run")[-1]
    assert checkpoint.best(tmp_path / "run").name == "step-000002"


RANK = """
import os, signal, sys, time
import test_interrupt as here

if os.environ["RANK"] == "1":
    begins = here.Trainer._begins

    def begin(self, name):
        if (self.work.step, name) == (2, "generate") and not here.interrupt.asked():
            here.ask()
        begins(self, name)

    here.Trainer._begins = begin
sys.exit(here.train(here.Path(sys.argv[1]), sys.argv[2], "log.eval_every=0"))
"""

# Two processes on one machine, one of which is stopped in phase policy while the other one waits for it
STAYS = """
import os, signal, sys, time
from pathlib import Path
from prime_fast.engine.watchdog import Watchdog
from prime_fast.progress import at

grace = int(sys.argv[2])
with Watchdog(Path(sys.argv[1]), grace, hang=0, kill=lambda: None):
    at(2, "policy")
    os.kill(os.getpid(), signal.SIGUSR1)
    for _ in range(100):
        time.sleep(0.5)
        if grace > 1:
            os.kill(os.getpid(), signal.SIGTERM)
"""
HANG = """
import os, signal, sys, time
from pathlib import Path
import torch
from prime_fast.engine import distributed
from prime_fast.engine.watchdog import Watchdog
from prime_fast.progress import at, moved

distributed.initialize()
run_dir, pid = Path(sys.argv[1]), distributed.gather_lists([os.getpid()])[1]
with Watchdog(run_dir, grace=60, hang=2, kill=lambda: print("engines killed")):
    at(3, "policy")
    if distributed.rank() == 1:
        while "policy" not in (run_dir / "ranks/1.json").read_text():
            time.sleep(0.01)
        os.kill(pid, signal.SIGSTOP)
    while Path(f"/proc/{pid}/stat").read_text().split()[2] != "T":
        moved()
        time.sleep(0.01)
    at(3, "sync")
    distributed.sum_(torch.ones(1))  # the line that waits
"""


def start_ranks(script: Path, *arguments) -> list:
    """Without torchrun, whose exit code is always 1."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    there = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": path}
    command, pipes = [sys.executable, str(script), *map(str, arguments)], {"stdout": -1, "stderr": -1}
    return [
        processes.start(command, env=processes.environment(RANK=str(rank), LOCAL_RANK=str(rank), **there), **pipes)
        for rank in range(2)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_ranks_of_which_one_is_asked_leave_together(workspace, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    ranks = start_ranks(tmp_path / "rank.py", workspace, tmp_path / "run")
    told = [rank.communicate(timeout=540)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143], told
    assert "asked to leave in step 2, phase generate; continue from" in told[0] and "step-000001" in told[0]
    assert checkpoint.latest(tmp_path / "run").name == "step-000001" and "asked" not in told[1]


def test_a_hang_is_told_with_the_place_of_every_rank(tmp_path):
    (tmp_path / "rank.py").write_text(HANG)
    zero, one = start_ranks(tmp_path / "rank.py", tmp_path / "run")
    try:
        out, told = zero.communicate(timeout=540)
    finally:
        processes.end(one)
    assert zero.returncode == 1 and out == "engines killed\n", told
    assert "no rank has moved for 2s (log.hang=2)" in told and "no checkpoint was written yet" in told
    for rank, phase in ((0, "sync"), (1, "policy")):
        (line,) = [line for line in told.splitlines() if line.startswith(f"  rank {rank}: ")]
        assert f"step 3, phase {phase}, for " in line and ("without a sign of life" in line) == (rank == 1), line
    assert "the line that waits" in told and "rank.py" in (tmp_path / "run/ranks/0.stack").read_text()


@pytest.mark.parametrize(
    ("grace", "told"),
    [
        (1, "asked to leave, but log.grace=1 seconds were too few to end step 2, phase policy; no checkpoint"),
        (60, "asked to leave a second time; no checkpoint"),
    ],
)
def test_who_cannot_leave_in_time_or_is_asked_twice_ends_at_once(grace, told, tmp_path):
    (tmp_path / "stays.py").write_text(STAYS)
    left = processes.run([sys.executable, str(tmp_path / "stays.py"), str(tmp_path / "run"), str(grace)])
    assert left.returncode == 143 and told in left.stderr
