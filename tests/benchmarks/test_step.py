import importlib.util
import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.step import __main__ as program
from benchmarks.step import arm, table, workload

SETTINGS = {"device": "cpu", "threads": 1, "shape": "tiny", "longest": 48, "rows": 8, "updates": 2, "whiten": True}
SETTINGS |= {"cases": ["long-tailed"], "case": "long-tailed", "checkpointing": False}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    made = SETTINGS | {"folder": str(tmp_path_factory.mktemp("step"))}
    threads = torch.get_num_threads()
    workload.make(made)
    torch.set_num_threads(threads)
    return made


def values(name, settings):
    made = arm.build(name, settings)
    groups = workload.load(settings)
    first, second = (arm.measured(made, groups) for _ in range(2))
    made.close()
    assert first["values"] == second["values"] and second["seconds"] >= sum(second["phases"].values())
    return second["values"]


@pytest.mark.parametrize("algorithm", ["PRIME", "RLOO"])
def test_the_published_dataflow_computes_what_ours_does_in_every_round(algorithm, settings, device):
    ours = values(f"ours {algorithm}", settings)
    assert len(ours) == (4 if algorithm == "PRIME" else 2) and min(abs(v) for v in ours.values()) > 1e-3
    if algorithm == "PRIME":
        assert abs(ours["prm_loss"] - math.log(2)) > 1e-5  # the PRM is another model than its reference
    for name in (name for name, same in table.SAME.items() if same == f"ours {algorithm}"):
        assert values(name, settings) == pytest.approx(ours, rel=1e-4, abs=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is no dependency")
def test_trl_computes_our_loss_but_for_whitening_and_the_baseline(settings, device):
    plain = settings | {"whiten": False, "updates": 1}
    ours = values("ours RLOO", plain)["policy_grad_norm"]
    options = Namespace(trl_python=sys.executable, device="cpu", threads=1)
    for name in ("TRL GRPO", "TRL RLOO"):
        process = program.Arm(name, plain, options)
        assert "note" not in process.answer()
        found = process.ask("step")["values"]
        process.close()
        expected = torch.cat([s.logprob for group in workload.load(plain) for s in group.samples]).mean()
        assert found["mean_logprob"] == pytest.approx(float(expected), rel=1e-5)
        if name == "TRL GRPO":  # its baseline is the mean of all K
            assert found["policy_grad_norm"] == pytest.approx(ours * (workload.K - 1) / workload.K, rel=1e-4)


def test_lengths_are_as_reasoning_leaves_them():
    for rows in (8, 64):
        drawn = workload.lengths("long-tailed", rows, 4096)
        assert 0.35 < sum(drawn) / rows / max(drawn) < 0.5 and max(drawn) > 0.9 * 4096
        assert drawn == workload.lengths("long-tailed", rows, 4096) != sorted(drawn)
    assert workload.lengths("uniform", 8, 4096) == [512] * 8


def rounds(**changed):
    found = {"policy_loss": 0.5, "policy_grad_norm": 2.0} | changed
    one = {"seconds": 2.0, "cpu_seconds": 1.0, "phases": {"policy": 1.5}, "peak_gib": 1.0, "values": found}
    return [one, one | {"seconds": 4.0}]


def test_an_arm_that_computes_something_else_says_so(settings):
    groups = workload.load(settings)
    made = [("ours RLOO", rounds()), ("published RLOO", rounds(policy_grad_norm=2.1)), ("TRL GRPO", rounds())]
    made.append(("TRL RLOO", rounds(mean_logprob=-5.0)))
    rows = [{"case": "uniform", "arm": name, "rounds": found} for name, found in made]
    ours, published, grpo, rloo = table.summarised(rows, groups, "cpu")
    assert ours["seconds"] == 3.0 and "note" not in ours and "note" not in grpo
    assert published["note"] == "disagrees: policy_grad_norm is 2.1, should be 2"
    assert rloo["note"].startswith("disagrees: mean_logprob is -5, should be -5.7")


def test_comparisons_are_held_against_their_targets():
    seconds = {"ours PRIME": 14, "ours RLOO": 10, "rollouts": 10, "published PRIME, after": 28, "TRL GRPO": 19}
    found = table.comparisons([{"case": "long-tailed", "arm": name, "seconds": s} for name, s in seconds.items()])
    verdicts = {item["what"]: (item["ratio"], table.met(item)) for item in found}
    assert verdicts == {
        "published PRIME, after / ours PRIME": (2.0, False),
        "TRL GRPO / ours RLOO": (1.9, False),
        "ours PRIME / ours RLOO, after the rollouts": (1.4, None),
        "ours PRIME / ours RLOO, rollouts included": (1.2, True),
    }
    assert "| long-tailed | TRL GRPO / ours RLOO | 1.90 | >= 2.0 | missed |" in table.compared(found)


def test_a_run_leaves_a_row_for_every_arm_and_a_picture(tmp_path, capsys, monkeypatch):
    if importlib.util.find_spec("trl") is None:
        monkeypatch.setattr(program, "versions", lambda python: {"trl": "1.0"})  # as if, so that its arm fails
    arms = ["ours RLOO", "TRL RLOO, Liger"]
    command = ["--quick", "--cases", "uniform", "--arms", *arms, "--out", str(tmp_path), "--note", "a test"]
    assert program.main(command) == 0
    record = json.loads((tmp_path / "step.json").read_text())
    ours, library = record["rows"]
    assert [ours["arm"], library["arm"]] == arms and record["note"] == "a test"
    assert ours["tokens_per_second"] == pytest.approx(ours["tokens"] / ours["seconds"]) and ours["peak_gib"] > 0.1
    assert set(ours["phases"]) >= {"advantage", "policy"} and "seconds" not in library and library["note"]
    assert record["machine"]["packages"]["torch"] and record["settings"]["longest"] == 48
    assert (tmp_path / "step.png").stat().st_size > 5000
    assert "| uniform | ours RLOO |" in capsys.readouterr().out


def test_without_trl_its_arms_are_left_out_in_a_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(program, "versions", lambda python: {})
    assert program.main(["--quick", "--arms", "TRL GRPO", "--trl-python", "some/python", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert said.startswith("TRL is not installed for some/python, so its arms are left out: pip install trl")
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize("wrong", [["--rows", "10"], ["--updates", "3"], ["--longest", "8"]])
def test_sizes_that_cannot_be_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(["--quick", *wrong])
    assert ended.value.code == 2 and "must be" in capsys.readouterr().err
