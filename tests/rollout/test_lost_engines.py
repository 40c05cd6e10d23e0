"""An engine lost in any phase of training is replaced, or the run ends with exit code 1 and all that was trained."""

import os
import signal
import socket
import struct
import sys
from types import SimpleNamespace

import processes
import pytest
from engines import needs_vllm

from prime_fast import passes
from prime_fast.cli import main
from prime_fast.engine import checkpoint
from prime_fast.engine.writing import Checkpoints
from prime_fast.metrics import read_metrics
from prime_fast.rollout import EngineDied, hf, process
from prime_fast.rollout.collect import Collector
from prime_fast.rollout.fleet import Fleet
from prime_fast.trainer import Trainer

PHASES = {
    "while a checkpoint is written": (Checkpoints, "save"),
    "during rollouts": (Fleet, "step"),
    "after rollouts": (Fleet, "sleep"),
    "asleep": (passes, "train_policy"),
    "while it wakes": (Fleet, "sync"),
    "during evaluation": (Collector, "greedy"),
}
# Which phase loses its engine in which step; the first loss is found in step 2, which has no second chance then.
STEPS = dict(zip((1, 3, 4, 5, 6, 7), PHASES, strict=True))
EVERY = ["steps=8", "log.eval_every=1", "log.checkpoint_every=1"]


def train(workspace, run_dir, *overrides):
    return main(["train", str(workspace / "config.yaml"), f"run_dir={run_dir}", *overrides])


def lose(monkeypatch, phases: dict[int, str], end) -> list[str]:
    """Call end(engine) in each phase of `phases`, step -> phase, once; returns the list of the phases that came."""
    now, lost = {}, []
    step, fleet = Trainer.step, Fleet.__init__

    def count(self, number):
        now["step"] = number
        return step(self, number)

    def remember(self, engine, weights):
        now["engine"] = engine
        fleet(self, engine, weights)

    def watch(phase, owner, name):
        original = getattr(owner, name)

        def watched(*arguments, **options):
            due = phases.get(now.get("step")) == phase and phase not in lost
            if due and (name != "step" or arguments[0].pending):
                lost.append(phase)
                end(now["engine"])
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    monkeypatch.setattr(Trainer, "step", count)
    monkeypatch.setattr(Fleet, "__init__", remember)
    for phase in set(phases.values()):
        watch(phase, *PHASES[phase])
    return lost


def kill(engine) -> None:
    os.kill(engine.process.pid, signal.SIGKILL)


def stop(engine) -> None:
    """From now on it takes and gives nothing, and is not waited for long."""
    os.kill(engine.process.pid, signal.SIGSTOP)
    engine.deadlines = process.Deadlines(request=3.0, silence=3.0)
    with socket.socket(fileno=os.dup(engine.connection.fileno())) as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 3, 0))


def test_a_vllm_engine_lost_at_work_is_replaced(workspace, tmp_path, monkeypatch):
    """Killed and stopped by turns, in the phases that it works in and that send it much; all of them: the next test."""
    needs_vllm()
    ends, phases = iter([stop, stop, kill]), ("during rollouts", "while it wakes", "during evaluation")
    restart, pids = process.EngineProcess.restart, []

    def patient(self, room):
        pids.append(self.process.pid)
        self.deadlines = process.Deadlines()
        restart(self, room)

    monkeypatch.setattr(process.EngineProcess, "restart", patient)
    lost = lose(monkeypatch, dict(zip((2, 3, 4), phases, strict=True)), lambda engine: next(ends)(engine))
    overrides = ["rollout.engine=vllm", *EVERY, "steps=5"]
    assert train(workspace, tmp_path / "run", *overrides) == 0
    assert lost == list(phases) and len(pids) == len(phases)
    records = read_metrics(tmp_path / "run")[1:]
    assert [record["step"] for record in records] == list(range(1, 6))
    assert all(record["skipped"] == 0 and record["mismatch_max"] < 1e-3 for record in records)
    assert all("eval_accuracy" in record for record in records)


def refuse(engine) -> None:
    """vLLM raises its ValueError of too little memory when it is started again."""
    engine.settings["options"]["kv_cache_memory_bytes"] = 1024
    kill(engine)


def vanish(engine) -> None:
    process.sys.executable = "/bin/false"
    kill(engine)


@pytest.mark.parametrize(
    ("end", "phase", "saved"), [(vanish, "while it wakes", 2), (refuse, "during rollouts", 1)], ids=["gone", "refused"]
)
def test_a_vllm_engine_that_stays_away_ends_the_run(end, phase, saved, workspace, tmp_path, monkeypatch, capsys):
    needs_vllm()
    monkeypatch.setattr(process.sys, "executable", process.sys.executable)
    lose(monkeypatch, {2: phase}, end)
    assert train(workspace, tmp_path / "run", "rollout.engine=vllm", "steps=4") == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "the rollout engine's process" in told and f"step-{saved:06d} with --resume" in told
    assert ("ValueError" in told) == (end is refuse)
    assert checkpoint.latest(tmp_path / "run").name == f"step-{saved:06d}"


class Mortal(hf.HFEngine):
    """The embedded engine; once lost, every call finds it dead until it is restarted."""

    lost, immortal = False, ("__init__", "restart", "close", "generate")

    def __getattribute__(self, name):
        if name in ("submit", "step", "load_weights", "sleep", "wake", "ready") and self.lost:
            raise EngineDied("lost")
        return super().__getattribute__(name)

    def restart(self, room):
        if self.lost == "for good":
            raise EngineDied("lost for good")
        self.lost, self.waiting = False, []


@pytest.fixture
def mortal(monkeypatch):
    monkeypatch.setattr(hf, "HFEngine", Mortal)


@pytest.mark.parametrize("phase", PHASES)
def test_an_engine_lost_for_good_leaves_all_that_was_trained(phase, workspace, tmp_path, monkeypatch, mortal):
    """The embedded engine made mortal, so that a run for each phase is cheap."""
    lost = lose(monkeypatch, {2: phase}, lambda engine: setattr(engine, "lost", "for good"))
    every = ["log.eval_every=1", f"log.checkpoint_every={2 * (phase == 'while a checkpoint is written')}"]
    assert train(workspace, tmp_path / "run", "steps=4", *every) == 1
    assert lost == [phase]
    made = {"during rollouts": 1, "after rollouts": 1}.get(phase, 2)
    assert checkpoint.latest(tmp_path / "run").name == f"step-{made:06d}"
    monkeypatch.undo()
    assert train(workspace, tmp_path / "run", "steps=4", *every, "--resume") == 0
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4] and all("policy_loss" in r for r in records[1:])


def test_engines_lost_in_every_phase_change_nothing(workspace, tmp_path, monkeypatch, mortal):
    assert train(workspace, tmp_path / "whole", *EVERY) == 0
    lost = lose(monkeypatch, STEPS, lambda engine: setattr(engine, "lost", True))
    assert train(workspace, tmp_path / "run", *EVERY) == 0
    assert lost == list(PHASES)
    for one, two in zip(*(read_metrics(tmp_path / name) for name in ("whole", "run")), strict=True):
        for key in ("outcome", "policy_grad_norm", "prm_loss", "eval_accuracy", "rollouts"):
            assert one.get(key) == two.get(key), key


RANK = """
import os
import pytest
import test_lost_engines as here

patch = pytest.MonkeyPatch()
patch.setattr(here.hf, "HFEngine", here.Mortal)
state = {state} if os.environ["RANK"] == "1" else False
lost = here.lose(patch, here.STEPS, lambda engine: setattr(engine, "lost", state))
code = here.main({arguments})
assert code or lost == list(here.PHASES)
raise SystemExit(code)
"""


@pytest.mark.parametrize("state", [True, "for good"])
def test_two_ranks_of_which_one_loses_its_engine(state, workspace, tmp_path):
    """The other rank goes along through every restart, and to the same end."""
    arguments = ["train", str(workspace / "config.yaml"), f"run_dir={tmp_path / 'run'}", *EVERY]
    (tmp_path / "rank.py").write_text(RANK.format(state=repr(state), arguments=arguments))
    result = processes.torchrun(2, tmp_path / "rank.py")
    if state is True:
        assert result.returncode == 0, result.stderr[-3000:]
        assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(9))
    else:
        assert result.returncode == 1 and result.stderr.count("lost for good; continue from") == 1
        assert checkpoint.latest(tmp_path / "run").name == "step-000001"


@pytest.mark.parametrize("command", ["train", "eval"])
def test_an_engine_that_ends_before_it_has_started_is_one_sentence(command, workspace, tmp_path, monkeypatch, capsys):
    needs_vllm()
    monkeypatch.setattr(process, "sys", SimpleNamespace(executable="/bin/false", path=sys.path))
    if command == "train":
        assert train(workspace, tmp_path / "run", "rollout.engine=vllm") == 1
    else:
        arguments = [str(workspace / "model"), "--data", str(workspace / "rows.jsonl"), "--out", str(tmp_path / "out")]
        arguments += ["--reward", f"{workspace}/reward.py:compute_score", "--max-response", "8", "--engine", "vllm"]
        assert main(["eval", *arguments]) == 1
    assert "prime-fast: the rollout engine's process ended; exit code 1" in capsys.readouterr().err
