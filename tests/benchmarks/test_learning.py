import json
import sys
from pathlib import Path

import pytest

from benchmarks import learning
from benchmarks.learning import Study
from prime_fast.config import load_config, save_config
from prime_fast.metrics import MetricsLog, read_metrics

CONFIG = """
run_dir: runs/x
steps: 10
model: {policy: somewhere}
rollout: {prompts: 8, samples: 4, max_response: 32}
data: {max_prompt: 32}
"""


@pytest.fixture
def study(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    return Study(tmp_path / "out", str(config), ("policy.lr=1e-4",), steps=10)


def records(steps, slope, prm=True, rollouts=32):
    rows = [{"step": 0, "eval_accuracy": 0.4}]
    for step in range(1, steps + 1):
        row = {"step": step, "rollouts": rollouts * step, "outcome": 0.5, "seconds": 2.0, "seconds/generate": 1.0}
        row |= {"prm_pair_accuracy": 0.5 + 0.01 * step, "seconds/prm": 0.5} if prm else {}
        rows.append(row | ({"eval_accuracy": 0.4 + slope * step} if step % 5 == 0 else {}))
    return rows


def fake_run(study, arm, seed, rows, checkpoint=True):
    run = study.run(arm, seed)
    if arm == "frozen" and not study.run("offline", seed).exists():
        fake_run(study, "offline", seed, records(60, 0.0))
    log = MetricsLog(run, 10)
    for row in rows:
        log.write(row)
    save_config(load_config(study.config, study.train_overrides(arm, seed)), run / "config.yaml")
    if checkpoint:
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "latest").write_text(f"step-{rows[-1]['step']:06d}\n")
    return run


def resolved(study, arm, seed=0):
    return load_config(study.config, study.train_overrides(arm, seed))


def test_arms_differ_in_what_they_should_and_nothing_else(study):
    fake_run(study, "offline", 0, records(60, 0.0))
    prime, rloo, offline, frozen = (resolved(study, arm) for arm in ("prime", "rloo", "offline", "frozen"))
    assert prime.prime.process_weight == 1 and prime.policy.lr == 1e-4 and prime.seed == 0 and prime.steps == 10
    assert not rloo.uses_prm
    assert (offline.policy.lr, offline.rollout.max_rounds, offline.steps) == (0, 1, prime.steps)
    assert offline.seed != prime.seed  # other prompts and samples than those that the frozen PRM will score
    assert frozen.prime.update == "none"
    assert Path(frozen.model.prm) == study.run("offline", 0) / "checkpoints" / "step-000060" / "prm"
    for arm, config in {"rloo": rloo, "frozen": frozen}.items():
        same = config.model_copy(update={"prime": prime.prime, "model": prime.model, "run_dir": prime.run_dir})
        assert same == prime, arm
    assert Path(prime.model.policy) == study.out / "sft" / "model"
    assert prime.data.train == [str(study.out / "task" / "train.jsonl")]


def test_one_sft_model_for_all_seeds_or_one_for_each(study):
    assert resolved(study, "prime", 0).model.policy == resolved(study, "prime", 3).model.policy
    shared = load_config(study.config, study.sft_overrides(3))
    assert shared.seed == 0 and shared.sft.data == [str(study.out / "task" / "sft.jsonl")]
    own = Study(study.out, study.config, (), 10, sft_per_seed=True)
    assert Path(resolved(own, "prime", 3).model.policy) == study.out / "sft-seed3" / "model"
    assert load_config(own.config, own.sft_overrides(3)).seed == 3


def test_finished_means_every_step_made_under_the_same_settings(study):
    config = resolved(study, "prime")
    assert not learning.finished(study.run("prime", 0), config)
    run = fake_run(study, "prime", 0, records(9, 0.01), checkpoint=False)
    assert not learning.finished(run, config)
    MetricsLog(run, 10, resume_step=9).write({"step": 10})
    assert learning.finished(run, config)
    assert not learning.finished(run, config, checkpoint=True)
    assert not learning.finished(run, config.model_copy(update={"steps": 20}))  # to be continued
    other = load_config(study.config, [*study.train_overrides("prime", 0), "policy.lr=3e-4"])
    with pytest.raises(ValueError, match="prime-seed0 was made with policy.lr=0.0001, not 0.0003; choose"):
        learning.finished(run, other)


def test_only_unfinished_runs_are_called_and_they_resume(study, monkeypatch):
    fake_run(study, "prime", 0, records(10, 0.01))
    fake_run(study, "rloo", 0, records(4, 0.01, prm=False))
    calls = {}
    monkeypatch.setattr(Study, "call", lambda self, name, *command: calls.setdefault(name, command))
    learning.train(study, "prime", 0)
    assert calls == {}
    learning.train(study, "rloo", 0)
    assert calls["rloo-seed0"][:3] == ("prime_fast", "train", study.config)
    assert calls["rloo-seed0"][-2:] == ("prime.process_weight=0", "--resume")
    fake_run(study, "frozen", 0, records(4, 0.01))
    learning.train(study, "frozen", 0)
    assert list(calls) == ["rloo-seed0", "frozen-seed0"]  # its PRM was there


def test_the_start_is_made_once_and_only_whole(study, monkeypatch):
    calls = []

    def call(self, name, module, *arguments):
        calls.append(name)
        config = load_config(study.config, study.sft_overrides(0))
        folder = Path(arguments[0] if "quickstart" in module else config.run_dir)
        assert not folder.exists() and folder.suffix == ".partial"
        folder.mkdir()
        save_config(config, folder / "config.yaml")
        if name == "sft" and calls.count("sft") == 1:
            raise RuntimeError("killed")

    monkeypatch.setattr(Study, "call", call)
    study.out.mkdir()
    with pytest.raises(RuntimeError):
        learning.prepare(study, 0)
    assert not (study.out / "sft").exists()
    learning.prepare(study, 0)
    learning.prepare(study, 7)
    assert calls == ["task", "sft", "sft"]


def test_a_command_runs_with_its_threads_and_its_log(study, monkeypatch, capfd):
    study.out.mkdir()
    study.call("env", "platform", "--nothing")
    assert "Linux" in (study.out / "env.log").read_text() or sys.platform != "linux"
    with pytest.raises(RuntimeError, match="bad ended with exit code 1; the last lines of (?s:.*)No module named"):
        study.call("bad", "no_such_module")
    printed = capfd.readouterr().out
    assert "env: started" in printed and "env: done in" in printed


def test_a_failure_drops_what_has_not_begun():
    begun = []

    def work(i):
        begun.append(i)
        raise ValueError(f"run {i}")

    with pytest.raises(ValueError, match="run 0"):
        learning.in_parallel(work, 1, [(i,) for i in range(50)])
    assert len(begun) < 50


def test_rollouts_to_a_level_are_interpolated():
    curve = {"rollouts": [0, 100, 200, 300], "accuracy": [0.4, 0.6, 0.5, 0.9]}
    assert learning.rollouts_to(curve, 0.3) == 0
    assert learning.rollouts_to(curve, 0.5) == pytest.approx(50)
    assert learning.rollouts_to(curve, 0.6) == pytest.approx(100)
    assert learning.rollouts_to(curve, 0.8) == pytest.approx(275)
    assert learning.rollouts_to(curve, 0.95) is None


def test_the_mean_curve_ends_with_the_shortest_seed():
    curves = [
        {"rollouts": [0, 100, 200], "accuracy": [0.0, 0.2, 0.4]},
        {"rollouts": [0, 50, 150], "accuracy": [0.2, 0.2, 0.6]},
    ]
    mean = learning.mean_curve(curves)
    assert mean["rollouts"] == [0, 50, 100, 150]
    assert mean["accuracy"] == pytest.approx([0.1, 0.15, 0.3, 0.45])


def test_a_finished_study_becomes_json_picture_and_table(study, monkeypatch, capsys):
    for seed in (0, 1):
        fake_run(study, "prime", seed, records(10, 0.04 + 0.01 * seed))
        fake_run(study, "rloo", seed, records(12, 0.05, prm=False))  # two steps more than asked for
    monkeypatch.setattr(learning, "prepare", lambda study, seed: None)
    arguments = f"--arms prime rloo --seeds 0 1 policy.lr=1e-4 --jobs 2 --config {study.config} --out {study.out}"
    learning.main(arguments.split())
    document = json.loads((study.out / "learning.json").read_text())
    assert document["steps"] == 10 and document["hardware"]["runs_at_a_time"] == 2 and document["versions"]["torch"]
    prime, rloo = document["arms"]["prime"], document["arms"]["rloo"]
    assert [prime["seeds"][seed]["final_accuracy"] for seed in "01"] == [0.8, 0.9]
    assert prime["mean"]["final_accuracy"] == 0.85 and prime["mean"]["start_accuracy"] == 0.4
    assert prime["mean"]["mean_accuracy"] == pytest.approx(0.625)
    assert prime["mean"]["rollouts_to"]["0.5"] == pytest.approx(320 * 0.1 / 0.45, abs=1e-3)
    assert prime["mean"]["pair_accuracy_by_thirds"] == [0.525, 0.56, 0.59]  # 4, 3 and 3 steps
    assert prime["mean"]["seconds_per_step"] == {"generate": 1.0, "prm": 0.5, "whole": 2.0}
    assert rloo["mean"]["pair_accuracy_by_thirds"] is None and rloo["mean"]["final_accuracy"] == 0.9
    assert rloo["mean"]["curve"]["rollouts"] == [0, 160, 320]
    assert (study.out / "learning.png").stat().st_size > 10_000
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    assert "| 0.800, 0.900 | 0.850 |" in table[2] and "| - |" in table[3]
    assert len(read_metrics(study.run("rloo", 0))) == 13  # nothing was run again


def test_a_mistake_is_one_sentence(study, capsys):
    with pytest.raises(SystemExit, match="benchmarks.learning: .*unknown key policy.lrr; did you mean policy.lr"):
        learning.main(["--config", study.config, "--out", str(study.out), "policy.lrr=1"])
    assert not study.out.exists()
