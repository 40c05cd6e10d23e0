import importlib
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch

from benchmarks.learning import __main__ as command
from benchmarks.learning import arms, oracle, summary, views
from benchmarks.learning import study as runs
from benchmarks.learning.study import Study
from prime_fast.config import load_config, save_config
from prime_fast.engine.batch import Group, Sample
from prime_fast.metrics import MetricsLog, read_metrics
from prime_fast.stages import quickstart
from prime_fast.stream import Passes

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
    return Study(tmp_path / "out" / "chain6", str(config), ("policy.lr=1e-4",), steps=10)


def records(steps, slope, prm=True, rollouts=32):
    rows = [{"step": 0, "eval_accuracy": 0.4}]
    for step in range(1, steps + 1):
        row = {"step": step, "rollouts": rollouts * step, "outcome": 0.5, "seconds": 2.0, "seconds/generate": 1.0}
        row |= {"prm_pair_accuracy": 0.5 + 0.01 * step, "seconds/prm": 0.5} if prm else {}
        rows.append(row | ({"eval_accuracy": 0.4 + slope * step} if step % 5 == 0 else {}))
    return rows


def fake_run(study, arm, seed, rows, checkpoint=True):
    run = study.run(arm, seed)
    helper = arms.arm(arm).helper
    if helper and not study.run(helper, seed).exists():
        fake_run(study, helper, seed, records(60, 0.0))
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
    prime, rloo, offline, frozen = (resolved(study, arm) for arm in ("published", "rloo", "offline", "frozen"))
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
    assert resolved(study, "published", 0).model.policy == resolved(study, "published", 3).model.policy
    shared = load_config(study.config, study.sft_overrides(3))
    assert shared.seed == 0 and shared.sft.data == [str(study.out / "task" / "sft.jsonl")]
    own = Study(study.out, study.config, (), 10, sft_per_seed=True)
    assert Path(resolved(own, "published", 3).model.policy) == study.out / "sft-seed3" / "model"
    assert load_config(own.config, own.sft_overrides(3)).seed == 3


def test_finished_means_every_step_made_under_the_same_settings(study):
    config = resolved(study, "published")
    assert not runs.finished(study.run("published", 0), config)
    run = fake_run(study, "published", 0, records(9, 0.01), checkpoint=False)
    assert not runs.finished(run, config)
    MetricsLog(run, 10, resume_step=9).write({"step": 10})
    assert runs.finished(run, config)
    assert not runs.finished(run, config, checkpoint=True)
    assert not runs.finished(run, config.model_copy(update={"steps": 20}))  # to be continued
    other = load_config(study.config, [*study.train_overrides("published", 0), "policy.lr=3e-4"])
    with pytest.raises(ValueError, match="published-seed0 was made with policy.lr=0.0001, not 0.0003; choose"):
        runs.finished(run, other)


def test_only_unfinished_runs_are_called_and_they_resume(study, monkeypatch):
    fake_run(study, "published", 0, records(10, 0.01))
    fake_run(study, "rloo", 0, records(4, 0.01, prm=False))
    calls = {}
    monkeypatch.setattr(Study, "call", lambda self, name, *command: calls.setdefault(name, command))
    runs.train(study, "published", 0)
    assert calls == {}
    runs.train(study, "rloo", 0)
    assert calls["rloo-seed0"][:3] == ("prime_fast", "train", study.config)
    assert calls["rloo-seed0"][-2:] == ("prime.process_weight=0", "--resume")
    fake_run(study, "frozen", 0, records(4, 0.01))
    runs.train(study, "frozen", 0)
    assert list(calls) == ["rloo-seed0", "frozen-seed0"]


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
    study.out.mkdir(parents=True)
    with pytest.raises(RuntimeError):
        runs.prepare(study, 0)
    assert not (study.out / "sft").exists()
    runs.prepare(study, 0)
    runs.prepare(study, 7)
    assert calls == ["task", "sft", "sft"]


def test_a_command_runs_with_its_threads_and_its_log(study, monkeypatch, capfd):
    study.out.mkdir(parents=True)
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
        runs.in_parallel(work, 1, [(i,) for i in range(50)])
    assert len(begun) < 50


def test_rollouts_to_a_level_are_interpolated():
    curve = {"rollouts": [0, 100, 200, 300], "accuracy": [0.4, 0.6, 0.5, 0.9]}
    assert summary.rollouts_to(curve, 0.3) == 0
    assert summary.rollouts_to(curve, 0.5) == pytest.approx(50)
    assert summary.rollouts_to(curve, 0.6) == pytest.approx(100)
    assert summary.rollouts_to(curve, 0.8) == pytest.approx(275)
    assert summary.rollouts_to(curve, 0.95) is None


def test_the_mean_curve_ends_with_the_shortest_seed():
    curves = [
        {"rollouts": [0, 100, 200], "accuracy": [0.0, 0.2, 0.4]},
        {"rollouts": [0, 50, 150], "accuracy": [0.2, 0.2, 0.6]},
    ]
    mean = summary.mean_curve(curves)
    assert mean["rollouts"] == [0, 50, 100, 150]
    assert mean["accuracy"] == pytest.approx([0.1, 0.15, 0.3, 0.45])


def test_step_auc_is_averaged_between_evaluations():
    points = [10, 20, 30, 40], [0.5, 0.7, 0.9, 0.1]
    found = summary.between(points, [0, 5, 20, 30])
    assert found == {"rollouts": [20, 30], "auc": pytest.approx([0.6, 0.9])}
    assert summary.between(([], []), [0, 20]) is None
    mean = summary.mean_curve([found, {"rollouts": [30, 40], "auc": [0.7, 0.8]}], "auc")
    assert mean["rollouts"] == [30] and mean["auc"] == pytest.approx([0.8])


def test_a_band_is_students():
    known = {1: 12.70620, 2: 4.302653, 4: 2.776445, 9: 2.262157, 30: 2.042272}
    assert {freedom: summary.t_quantile(freedom) for freedom in known} == pytest.approx(known, rel=1e-5)
    assert summary.interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-5
    )
    middle, low, high = summary.interval([0.7])
    assert middle == 0.7 and math.isnan(low) and math.isnan(high)
    rng = np.random.default_rng()
    held = [low <= 0 <= high for _, low, high in map(summary.interval, rng.normal(size=(2000, 4)))]
    assert abs(np.mean(held) - 0.95) < 0.025  # five standard errors


def run_summary(costs, final=0.9, warmup=0):
    return {
        "rollouts_to": dict(zip(map(str, summary.LEVELS), costs, strict=True)),
        "final_accuracy": final,
        "mean_accuracy": final / 2,
        "warmup_rollouts": warmup,
    }


def test_arms_are_compared_within_pairs():
    base = {"0": run_summary([100, 1000, 2000, None], 0.9), "1": run_summary([200, 4000, 5000, 6000], 0.98)}
    arm = {
        "1": run_summary([100, 2000, None, None], 0.96, warmup=400),
        "0": run_summary([100, 1000, 1000, None], 0.98, warmup=400),
        "7": run_summary([1, 1, 1, 1], 0.5),  # without a partner
    }
    result = summary.paired(arm, base)
    levels = result["rollouts_to"]
    assert result["seeds"] == 2
    half = summary.t_quantile(1) * math.log(2) / 2
    expected = [math.exp(math.log(0.5) / 2 + half * side) for side in (0, -1, 1)]
    assert levels["0.5"]["ratio"] == levels["0.8"]["ratio"] == pytest.approx(expected)
    assert levels["0.5"]["ratio_with_warmup"][0] == pytest.approx((500 / 100 * 500 / 200) ** 0.5)
    assert levels["0.9"] == {
        "reached": 1,
        "base_reached": 2,
        "pairs": 1,
        "ratio": [pytest.approx(0.5), None, None],
        "ratio_with_warmup": [pytest.approx(0.7), None, None],
    }
    assert levels["0.95"] == {"reached": 0, "base_reached": 1, "pairs": 0, "ratio": None, "ratio_with_warmup": None}
    assert result["final_difference"][0] == pytest.approx(0.03) and result["mean_difference"][0] == pytest.approx(0.015)
    assert result["error_ratio"] == pytest.approx(0.03 / 0.06)
    row = views.pair_table({"arm": {"label": "arm", "against_rloo": result}}).splitlines()[-1]
    assert (
        "| 0.71 [" in row
        and "| 0.50 (1 of 2 pairs) * | - (reached by 0 and 1) | 0.70 (1 of 2 pairs) * | +0.030 [" in row
    )
    assert summary.paired({"7": arm["7"]}, base) is None


@pytest.mark.parametrize("task", arms.TASKS)
def test_every_arm_is_a_run(study, task):
    study = replace(study, out=study.out.with_name(task), task=task)
    names = [
        *arms.FORMS,
        *(f"pav+{addition}" for addition in arms.ADDITIONS),
        "td+step+shrunk+warm",
        "pav+warm+prefix",
        "odds+oracle",
    ]
    for helper in (*arms.HELPERS, "warmup+prefix"):
        fake_run(study, helper, 0, records(2, 0.0))
    made = {name: load_config("configs/quickstart.yaml", study.train_overrides(name, 0)) for name in names}
    for name, config in made.items():
        assert config.prime.credit in ({name.split("+")[0].split("-")[0]} | {"published", "critic"}), name
        assert (config.policy == made["rloo"].policy) == ("policy-lora" not in name) and config.seed == 0, name
        assert config.uses_prm != name.startswith("rloo"), name
    assert len({str(config.model_dump(exclude={"run_dir"})) for config in made.values()}) == len(made)


def test_arms_are_added_up():
    arm = arms.arm("pav+step+warm+prefix")
    assert arm.label == "pav, by steps, warm PRM, prefix loss" and arm.helper == "warmup+prefix" and not arm.oracle
    assert arm.overrides[: len(arms.PAV)] == arms.PAV and "prm.loss=prefix" in arm.overrides
    assert "prm.loss=prefix" in arms.arm("warmup+prefix").overrides
    assert arms.arm("pav+warm").helper == "warmup" and arms.arm("critic+oracle").oracle
    for wrong in ("pave", "pav+wram", "pav+warm+warm", "warm"):
        with pytest.raises(ValueError, match=f"there is no arm {re.escape(wrong)}; give one of rloo, "):
            arms.arm(wrong)


def test_warm_arms_of_a_seed_share_one_run(study):
    fake_run(study, "warmup", 3, records(40, 0.0))
    warm, helper = resolved(study, "published+warm", 3), resolved(study, "warmup", 3)
    assert Path(warm.model.prm) == study.run("warmup", 3) / "checkpoints" / "step-000040" / "prm"
    assert (helper.policy.lr, helper.rollout.keep, helper.steps, helper.seed) == (0, (0, 1), 40, 1003)
    assert warm.prime.update == "after" and warm.seed == 3 and warm.steps == 10


def test_tasks_differ_in_their_settings(study):
    gentle = Study(study.out.with_name("gentle"), study.config, (), 150, task="gentle")
    assert gentle.start("sft", 0) == study.start("sft", 0)  # the same models
    assert load_config(gentle.config, gentle.train_overrides("rloo", 0)).policy.lr == 3e-5
    for name, task in arms.TASKS.items():
        maker = importlib.import_module(task.module)
        config = load_config("configs/quickstart.yaml", task.overrides)
        size = int(task.arguments[1]) if "--chain" in task.arguments else 6
        random = np.random.default_rng()
        for prompt in (maker.problem(random, size) for _ in range(100)):
            assert len(prompt) <= config.data.max_prompt, name
            assert len(maker.solve(prompt)) + 1 <= config.rollout.max_response, name
        made = maker.make_row(prompt, "train", 0)
        reward = importlib.import_module(config.reward.function.partition(":")[0]).compute_score
        assert reward("", maker.solve(prompt), made["reward_model"]["ground_truth"], made["extra_info"]) == 1, name


def test_labels_take_the_place_of_the_prm():
    prompt, right, wrong = "3*9+6:", "3*9=7,7+6=3$", "3*9=1,1+6=7$"
    encode = [quickstart.CHARACTERS.index(character) for character in prompt]
    samples = [[quickstart.CHARACTERS.index(character) for character in text] for text in (right, wrong)]
    samples = tuple(Sample(torch.tensor(tokens), torch.zeros(len(tokens)), False) for tokens in samples)
    rewards = oracle.label_rewards(Group(0, 0, tuple(encode), samples, (1.0, 0.0)), quickstart.step_labels)
    assert [reward.nonzero().flatten().tolist() for reward in rewards] == [[4, 10], [4, 10]]
    assert [reward[[4, 10]].tolist() for reward in rewards] == [
        pytest.approx([oracle.RIGHT, oracle.RIGHT]),
        pytest.approx([oracle.WRONG, oracle.RIGHT]),
    ]


LABELS = """
def step_labels(prompt, response):
    return [(i, character.isdecimal()) for i, character in enumerate(response)]
"""


def test_a_run_is_rewarded_by_labels(workspace, tmp_path):
    (tmp_path / "labels.py").write_text(LABELS)
    settings = ["steps=1", "prime.update=none", f"model.prm={workspace / 'model'}", f"run_dir={tmp_path / 'run'}"]
    command = ["benchmarks.learning.oracle", "labels", "train", str(workspace / "config.yaml"), *settings]
    environment = processes.environment(PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    done = processes.run([sys.executable, "-m", *command], env=environment)
    assert done.returncode == 0, done.stderr
    record = read_metrics(tmp_path / "run")[-1]
    mean, std = record["process_reward_mean"], record["process_reward_std"]
    assert oracle.WRONG < mean < oracle.RIGHT  # every token's reward is one of the two, which leaves them one std
    assert std == pytest.approx(((oracle.RIGHT - mean) * (mean - oracle.WRONG)) ** 0.5, rel=0.01)
    assert record["policy_applied"] and record["process_over_outcome"] > 0


def test_labels_are_not_for_a_prm_that_trains():
    prm = SimpleNamespace(trains=True)
    with pytest.raises(ValueError, match="set prime.update=none"):
        oracle.labelled(quickstart.step_labels)(
            Passes(None, (), prm, beta=0.05, lr=0.1, micro_tokens=99, mini_batch=8), None, 2, 4, waves=False
        )


def test_a_report_takes_what_is_finished(study, monkeypatch, capsys):
    for seed in (0, 1):
        fake_run(study, "rloo", seed, records(10, 0.055 + 0.001 * seed, prm=False))
        fake_run(study, "published+warm", seed, records(10, 0.058 - 0.001 * seed))
    fake_run(study, "frozen", 1, records(9, 0.01))  # not finished
    fake_run(study, "frozen", 0, records(10, 0.01))
    monkeypatch.setattr(Study, "call", lambda *_: pytest.fail("a report runs nothing"))
    result = study.out.parent / "learning-chain6.json"
    places = f"--out {study.out.parent} --config {study.config} --result {result}"
    command.main(f"--report policy.lr=1e-4 {places}".split())
    document = json.loads(result.read_text())
    assert str(study.out.parent) not in result.read_text()
    assert document["command"] == "python -m benchmarks.learning --task chain6 --warmup 40 policy.lr=1e-4"
    assert {name: list(of["seeds"]) for name, of in document["arms"].items()} == {
        "rloo": ["0", "1"],
        "frozen": ["0"],
        "published+warm": ["0", "1"],
    }
    warm = document["arms"]["published+warm"]
    assert warm["mean"]["warmup_rollouts"] == 60 * 32 and warm["mean"]["warmup_seconds"] == 120
    cost = warm["against_rloo"]["rollouts_to"]["0.9"]
    plain = [320 * 0.5 / (10 * slope) for slope in (0.058, 0.057, 0.055, 0.056)]
    assert cost["ratio"][0] == pytest.approx((plain[0] / plain[2] * plain[1] / plain[3]) ** 0.5, abs=1e-3)
    assert cost["ratio"][1] < cost["ratio"][0] < cost["ratio"][2] and cost["ratio_with_warmup"][0] > 7
    assert result.with_suffix(".png").stat().st_size > 10_000
    tables = capsys.readouterr().out.split("\n\n")
    assert len(tables) == 2 and "| - (reached by 0 and 1) |" in tables[1]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_picture_holds_few_arms(tmp_path):
    curve = {"rollouts": [0, 10], "accuracy": [0.1, 0.9], "low": [0.1, 0.8], "high": [0.1, 1.0]}
    arm = {"label": "x", "seeds": {"0": {}}, "mean": {"start_accuracy": 0.1, "final_accuracy": 0.9, "curve": curve}}
    names = ["rloo", *(f"arm{i}" for i in range(7))]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "plot", lambda results, path: drawn.append((path.name, list(results))))
        views.pictures(dict.fromkeys(names, arm), tmp_path / "learning.png")
    assert drawn == [("learning.png", names[:6]), ("learning-2.png", ["rloo", "arm5", "arm6"])]


def test_a_finished_study_becomes_json_picture_and_table(study, monkeypatch, capsys):
    for seed in (0, 1):
        fake_run(study, "published", seed, records(10, 0.04 + 0.01 * seed))
        fake_run(study, "rloo", seed, records(12, 0.05, prm=False))  # two steps more than asked for
    monkeypatch.setattr(runs, "prepare", lambda study, seed: None)
    places = f"--jobs 2 --config {study.config} --out {study.out.parent}"
    command.main(f"--arms published rloo --seeds 0 1 policy.lr=1e-4 {places}".split())
    document = json.loads((study.out / "learning.json").read_text())
    assert document["steps"] == 10 and document["hardware"]["runs_at_a_time"] == 2 and document["versions"]["torch"]
    prime, rloo = document["arms"]["published"], document["arms"]["rloo"]
    assert [prime["seeds"][seed]["final_accuracy"] for seed in "01"] == [0.8, 0.9]
    assert prime["mean"]["final_accuracy"] == 0.85 and prime["mean"]["start_accuracy"] == 0.4
    assert prime["mean"]["mean_accuracy"] == pytest.approx(0.625)
    assert prime["mean"]["rollouts_to"]["0.5"] == pytest.approx(320 * 0.1 * (1 / 0.4 + 1 / 0.5) / 2, abs=1e-3)
    assert prime["mean"]["pair_accuracy_by_thirds"] == [0.525, 0.56, 0.59]  # 4, 3 and 3 steps
    assert prime["mean"]["seconds_per_step"] == {"generate": 1.0, "prm": 0.5, "whole": 2.0}
    assert rloo["mean"]["pair_accuracy_by_thirds"] is None and rloo["mean"]["final_accuracy"] == 0.9
    assert rloo["mean"]["curve"] == {
        "rollouts": [0, 160, 320],
        "accuracy": [0.4, 0.65, 0.9],
        "low": [0.4, 0.65, 0.9],
        "high": [0.4, 0.65, 0.9],
    }
    assert prime["against_rloo"]["final_difference"] == pytest.approx([-0.05, -0.05 - 0.6353, -0.05 + 0.6353], abs=1e-3)
    assert (study.out / "learning.png").stat().st_size > 10_000
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4 + 3 and len({line.count("|") for line in table[:4]}) == 1
    assert "| 0.800, 0.900 | 0.850 |" in table[3] and "| - |" in table[2]
    assert len(read_metrics(study.run("rloo", 0))) == 13  # nothing was run again


def test_a_mistake_is_one_sentence(study, capsys):
    with pytest.raises(SystemExit, match="benchmarks.learning: .*unknown key policy.lrr; did you mean policy.lr"):
        command.main(["--config", study.config, "--out", str(study.out.parent), "policy.lrr=1"])
    assert not study.out.exists()
