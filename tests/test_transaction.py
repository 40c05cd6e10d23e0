"""What a step applied is synced, counted and kept, whatever goes wrong in it and whatever ends the run."""

from pathlib import Path

import processes
import pytest
import torch
from engines import needs_vllm
from faulty_steps import changed, weights
from test_trainer import make_trainer, overwrite

from prime_fast.cli import main
from prime_fast.engine import checkpoint
from prime_fast.engine.distributed import Stop
from prime_fast.metrics import MetricsLog, read_metrics

HERE = Path(__file__).parent
MINIS = ["policy.mini_batch=12", "prm.mini_batch=12"]


@pytest.mark.parametrize(("engine", "ranks"), [("hf", 1), ("vllm", 2)])
def test_trainer_and_engine_agree_after_any_fault(engine, ranks, workspace, tmp_path):
    if engine == "vllm":
        needs_vllm()
    script = [HERE / "faulty_steps.py", workspace / "config.yaml", f"run_dir={tmp_path / 'run'}"]
    settings = [*MINIS, f"rollout.engine={engine}", "rollout.vllm={gpu_memory_utilization: 0.2}"]
    result = processes.torchrun(ranks, *script, *settings)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "engine and trainer agree after each" in result.stdout


def train(workspace, run_dir, *overrides):
    return main(["train", str(workspace / "config.yaml"), f"run_dir={run_dir}", *overrides])


def reward(path: Path, body: str) -> str:
    """A reward function that can see how far the run is."""
    path.write_text(f"""
import json, pathlib
def steps(run_dir):
    path = pathlib.Path(run_dir) / "metrics.jsonl"
    return len(path.read_text().splitlines()) - 1 if path.is_file() else -1
def compute_score(data_source, solution_str, ground_truth, extra_info):
    coin = float(sum(map(ord, solution_str)) % 3 == 0)
    {body}
""")
    return f"reward.function={path}:compute_score"


def test_the_end_of_learning_ends_the_run_with_a_checkpoint_and_a_sentence(workspace, tmp_path, capsys):
    run_dir = tmp_path / "run"
    function = reward(tmp_path / "reward.py", f"return 1.0 if steps({str(run_dir)!r}) >= 2 else coin")
    small = ["steps=50", "rollout.max_rounds=1", "rollout.patience=2", "log.eval_every=3"]
    assert train(workspace, run_dir, function, *small) == 0
    records = read_metrics(run_dir)
    assert "finished early: no group of the last 2 steps" in capsys.readouterr().out
    empty = [record["step"] for record in records if record.get("groups") == 0]
    last = records[-1]
    assert empty[-2:] == [last["step"] - 1, last["step"]] and last["step"] < 8 and last["outcome"] == 1.0
    assert "eval_accuracy" in last and "no group" in last["skip_reason"]
    assert checkpoint.latest(run_dir).name == f"step-{last['step']:06d}"
    assert train(workspace, run_dir, function, *small[:2], "rollout.patience=2", "log.eval_every=3", "--resume") == 0
    assert "finished early" in capsys.readouterr().out


def test_a_run_that_waits_goes_on_to_its_last_step(workspace, tmp_path):
    run_dir = tmp_path / "run"
    function = reward(tmp_path / "reward.py", f"return 1.0 if steps({str(run_dir)!r}) >= 1 else coin")
    assert train(workspace, run_dir, function, "steps=6", "rollout.max_rounds=1", "rollout.patience=0") == 0
    assert read_metrics(run_dir)[-1]["step"] == 6 and read_metrics(run_dir)[-1]["groups"] == 0


def test_a_run_that_never_trained_is_stopped_with_advice(workspace, tmp_path, capsys):
    function = reward(tmp_path / "reward.py", "return 0.0")
    assert train(workspace, tmp_path / "run", function, "steps=9", "rollout.max_rounds=1") == 1
    error = capsys.readouterr().err
    assert "the policy was not trained yet" in error and "reward.function" in error and "mean outcome is 0.00" in error
    assert read_metrics(tmp_path / "run")[-1]["step"] == 2


def test_a_disagreement_leaves_what_was_trained(configure, device, monkeypatch):
    """Found in step 3 after the PRM's update: that is kept and told, the policy is as after step 2."""
    config = configure("steps=5", "log.checkpoint_every=1")
    trainer = make_trainer(config, device)
    log = MetricsLog(config.run_dir, config.steps)
    step, policy = trainer.step, {}

    def spoiled(number):
        if number == 3:
            policy.update(weights(trainer.learner.policy))
            with torch.no_grad():
                head = trainer.rollout.engine.model.lm_head.weight
                head.add_(0.3 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0)))
        return step(number)

    monkeypatch.setattr(trainer, "step", spoiled)
    with pytest.raises(Stop, match="rollout engine and the trainer disagree"):
        trainer.run(log)
    prm = weights(trainer.learner.prm)
    trainer.close()
    record = read_metrics(config.run_dir)[-1]
    assert record["step"] == 3 and record["prm_applied"] > 0 and "policy_applied" not in record
    newest = checkpoint.latest(Path(config.run_dir))
    assert newest.name == "step-000003"
    again = make_trainer(config, device)
    assert again.restore(newest) == 4
    assert not changed(prm, weights(again.learner.prm)) and not changed(policy, weights(again.learner.policy))
    assert again.step(4)["skipped"] == 0
    again.close()


def test_a_prm_that_is_not_finite_costs_the_step_alone(configure, device):
    trainer = make_trainer(configure(*MINIS), device)
    trainer.step(1)
    parameter = next(trainer.learner.prm.lm.parameters())
    healthy, before = overwrite(parameter, float("nan")), weights(trainer.learner.policy)
    record = trainer.step(2)
    assert record["skipped"] == 1 and "log-probs of the PRM" in record["skip_reason"] and record["prm_applied"] == 0
    assert not changed(before, weights(trainer.learner.policy))
    overwrite(parameter, healthy)
    record = trainer.step(3)
    assert record["skipped"] == 1 and record["policy_applied"] == record["policy_updates"]
    trainer.close()
