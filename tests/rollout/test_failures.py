"""Rewards that fail during a run: counted by step, told with their row, and the run's end on every rank at once."""

import json
import re
from collections import Counter

import processes
import pytest

from prime_fast import preflight
from prime_fast.cli import main
from prime_fast.data.rows import PromptSampler
from prime_fast.engine.batch import Group
from prime_fast.engine.distributed import Stop
from prime_fast.evaluation import evaluate
from prime_fast.metrics import read_metrics
from prime_fast.rewards.code import Usage
from prime_fast.rollout import failures
from prime_fast.trainer import Trainer

KINDS = ("errors", "crashes", "timeouts", "fine", "fine", "fine", "fine")  # by the sum of a response's characters
REWARD = f"""
import os, time

def kind(text):
    return {KINDS!r}[sum(map(ord, text)) % {len(KINDS)}]

def compute_score(data_source, solution_str, ground_truth, extra_info):
    what = kind(solution_str)
    if what == "errors":
        raise KeyError("no " + data_source)
    if what == "crashes":
        os._exit(3)
    if what == "timeouts":
        time.sleep(60)
    return float(sum(map(ord, solution_str)) % 2)
"""


@pytest.fixture
def trainer(configure, device, tmp_path):
    """Makes trainers with a reward function of this source."""
    made = []

    def make(source: str, *overrides: str) -> Trainer:
        (tmp_path / "failing.py").write_text(source)
        reward = [f"reward.function={tmp_path}/failing.py:compute_score", "reward.timeout=0.3"]
        config = configure(*reward, *overrides)
        made.append(Trainer(config, device, preflight.load_inputs(config)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def expected(trainer: Trainer, groups: list[Group]) -> Counter:
    texts = [trainer.inputs.tokenizer.decode(s.tokens, skip_special_tokens=True) for g in groups for s in g.samples]
    return Counter(KINDS[sum(map(ord, text)) % len(KINDS)] for text in texts)


def test_shares_are_of_the_step_and_evaluation_has_its_own(trainer):
    """Two steps, then the second again after a resume: every number is of the responses of its own step."""
    one = trainer(REWARD)
    records, counts, states = [], [], []
    for step in range(3):
        if step == 2:
            one.collector.load_state_dict(states[1])
        states.append(one.collector.state_dict())
        _, record, fresh = one.collector.collect(one.phases)
        records.append(record)
        counts.append(expected(one, fresh))
        if step == 0:
            groups = one.collector.greedy(one.inputs.eval)
            metrics = evaluate.during_training(one.inputs.eval, groups, one.inputs.tokenizer, None)
            failed = expected(one, groups)
            assert metrics["eval_reward_failures"] == 1 - failed["fine"] / failed.total() > 0
    for record, count in zip(records, counts, strict=True):
        for kind in ("errors", "timeouts", "crashes"):
            assert record[f"reward_{kind}"] == count[kind] / count.total() > 0
    assert records[2] == records[1] != records[0]


def test_too_many_failures_end_the_run(trainer):
    """The commonest kind is told, with the row: here errors, though crashes come first."""
    source = REWARD.replace("what = kind(solution_str)", 'what = "crashes" if extra_info["index"] < 8 else "errors"')
    one = trainer(source, "rollout.prompts=40")
    with pytest.raises(Stop) as stop:
        one.collector.collect(one.phases)
    told = str(stop.value)
    first = next(index for index in PromptSampler(40, one.config.seed).take(40) if index >= 8)
    where = (
        f"rows.jsonl, row {first + 1} (data_source test, prompt {one.inputs.train[first]['prompt'][0]['content']!r})"
    )
    assert "no verdict on 100% of 160 responses, more than reward.max_failures=0.5" in told
    assert f"{where}: KeyError: 'no test'; " in told and "--accept reward" in told


def test_a_broken_reward_is_found_before_a_step_has_drawn_all_it_may(trainer):
    one = trainer(REWARD.replace("kind(solution_str)", '"errors"'), "rollout.prompts=4", "rollout.max_rounds=8")
    with pytest.raises(Stop, match="100% of 16 responses"):
        one.collector.collect(one.phases)


def test_programs_that_were_stopped_have_their_verdict():
    kinds = ("stopped", "stopped", "stopped", "timeouts")
    group = Group(0, 0, (), (), (0.5, 0.5, 0.5, 0.0), failures=tuple((kind, "") for kind in kinds))
    assert failures.shares([group]) == {"reward_errors": 0, "reward_timeouts": 1, "reward_crashes": 0}
    assert failures.unscored([group]) == 0.25


def test_limits_are_shares_of_the_programs():
    took = Usage(1.5, 3 << 20, ("cpu", "output")), Usage(0.5, 1 << 20, ()), Usage(0.0, 0, ("output",)), Usage()
    groups = [Group(0, 0, (), (), (0.0,) * 3, programs=took[:1]), Group(1, 0, (), (), (0.0,) * 3, programs=took[1:])]
    assert failures.limits(groups) == {
        **dict.fromkeys(("sandbox_time", "sandbox_memory", "sandbox_files", "sandbox_threads"), 0.0),
        "sandbox_cpu": 0.25,
        "sandbox_output": 0.5,
        "sandbox_peak_mib": 3.0,
        "sandbox_cpu_seconds": 0.5,
    }
    assert failures.limits([Group(0, 0, (), (), (1.0,))]) == {}


VERL, TRL = "data_source, solution_str, ground_truth, extra_info", "completions, hint"
CASES = {  # the reward's parameters, its body, what is told
    "out of range": (
        VERL,
        'return 2.0 if extra_info["index"] == 7 else 1.0',
        "row 8 .* returned 2.0; outcomes must lie",
    ),
    "not there": (TRL, "return [1.0]", "row 8 .* requires .'hint'., which the rows do not have"),
    "too many": (VERL, '1 / (extra_info["index"] % 4); return 1.0', "no verdict on 25% of 160 .* ZeroDivisionError"),
}
TWO = """
import sys
from pathlib import Path

from prime_fast import preflight
from prime_fast.config import load_config
from prime_fast.engine import distributed, zero
from prime_fast.trainer import Trainer

file, *overrides = sys.argv[1:]
device = zero.start()
for case in {cases!r}:
    here = [f"data.train={folder}/{{case}}.jsonl", f"reward.function={folder}/{{case}}.py:compute_score"]
    config = load_config(file, overrides + here)
    trainer = Trainer(config, device, preflight.load_inputs(config))
    try:
        trainer.collector.collect(trainer.phases)
    except distributed.Stop as error:
        Path(f"{folder}/{{case}}.{{distributed.rank()}}").write_text(str(error))
    distributed.barrier()
    trainer.close()
"""


def test_what_one_rank_finds_stops_both(workspace, tmp_path):
    rows = (workspace / "rows.jsonl").read_text().splitlines(keepends=True)
    hints = [json.dumps({"prompt": f"{i}+1:"} | ({} if i == 7 else {"hint": i})) + "\n" for i in range(40)]
    for name, (parameters, body, _) in CASES.items():
        (tmp_path / f"{name}.py").write_text(f"def compute_score({parameters}):\n    {body}\n")
        (tmp_path / f"{name}.jsonl").write_text("".join(hints if parameters == TRL else rows))
    (tmp_path / "two.py").write_text(TWO.format(cases=list(CASES), folder=tmp_path))
    words = [f"run_dir={tmp_path / 'run'}", "rollout.prompts=40", "reward.max_failures=0.2", "prime.process_weight=0"]
    result = processes.torchrun(2, tmp_path / "two.py", workspace / "config.yaml", *words)
    assert result.returncode == 0, result.stderr[-2000:]
    for name, (_, _, told) in CASES.items():
        one, two = ((tmp_path / f"{name}.{rank}").read_text() for rank in (0, 1))
        assert one == two and re.search(told, one), (one, two)


@pytest.mark.parametrize("fault", ["raise KeyError('no judge')", "return -1.0"])
def test_a_run_that_is_stopped_leaves_its_steps_and_goes_on_when_mended(fault, workspace, tmp_path, capsys):
    """The reward breaks in step 2, when a metrics.jsonl says that step 1 is made."""
    reward, run_dir = tmp_path / "breaking.py", tmp_path / "run"
    body = f"""
from pathlib import Path

def compute_score(data_source, solution_str, ground_truth, extra_info):
    if Path({str(run_dir / "metrics.jsonl")!r}).is_file() and ACT:
        {fault}
    return float(sum(map(ord, solution_str)) % 2)
"""
    reward.write_text(body.replace("ACT", "True"))
    command = ["train", str(workspace / "config.yaml"), f"run_dir={run_dir}", "steps=3", "log.eval_every=0"]
    command += [f"reward.function={reward}:compute_score", "rollout.prompts=4"]
    assert main(command) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "rows.jsonl, row " in error and "step-000001 with --resume" in error
    assert ("KeyError: 'no judge'; mend it and add --accept reward" in error) == ("raise" in fault)
    reward.write_text(body.replace("ACT", "False"))
    assert main([*command, "--resume"]) == 2
    assert "reward, where breaking was" in capsys.readouterr().err
    assert main([*command, "--resume", "--accept", "reward"]) == 0
    assert [record["step"] for record in read_metrics(run_dir)] == [1, 2, 3]
