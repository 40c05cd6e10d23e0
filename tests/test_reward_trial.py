"""Rewards tried on made-up responses before a model loads: what is refused, what is only said."""

import json
import logging

import pytest

from prime_fast import preflight
from prime_fast.cli import main
from prime_fast.rewards import trial
from prime_fast.rewards.pool import Verdict

VERL, TRL = "data_source, solution_str, ground_truth, extra_info", "completions, hint"


@pytest.fixture
def tried(workspace, tmp_path, capsys):
    """prime-fast train with a reward of this body: exit code and what was said. 40 rows of two sources."""
    rows = [json.loads(line) for line in (workspace / "rows.jsonl").read_text().splitlines()]
    for i in range(20, 40):
        rows[i] |= {"data_source": "second", "extra_info": None}

    def run(body: str, parameters: str = VERL, *words: str, shape: str = "verl") -> tuple[int, str]:
        (tmp_path / "own.py").write_text(f"def own({parameters}):\n    {body}\n")
        made = rows if shape == "verl" else [{"prompt": f"{i}+1:", "hint": i} | {"tag": None} for i in range(40)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        places = [f"run_dir={tmp_path}/run", f"data.train={tmp_path}/rows.jsonl", "data.eval=[]", "steps=1"]
        words = [f"reward.function={tmp_path}/own.py:own", "rollout.prompts=2", *words]
        code = main(["train", str(workspace / "config.yaml"), *places, *words])
        printed = capsys.readouterr()
        assert (code == 0) == (tmp_path / "run").exists()
        return code, printed.err.strip() if code else printed.out

    return run


REFUSED = {
    "signature": ("return 1.0", "text", "", "takes (text): it must have verl's"),
    "missing column": (
        "return [1.0]",
        "completions, answer",
        "row 1 ",
        "requires ['answer'], which the rows do not have",
    ),
    "exception": ("raise RuntimeError('no judge')", VERL, "row 1 ", "RuntimeError: no judge"),
    "rows of a source": (
        'return float(extra_info["index"] > 5)',
        VERL,
        "row 21 ",
        "'NoneType' object is not subscript",
    ),
    "out of range": ("return len(solution_str)", VERL, "row 1 ", "outcomes must lie in [0, 1]"),
    "not finite": ("return float('nan')", VERL, "row 1 ", "returned nan; outcomes must lie in [0, 1]"),
    "not a number": ("return None", VERL, "row 1 ", "TypeError"),
    "endless": ("while True: pass", VERL, "row 1 ", "no verdict within 0.5 s"),
    "death": ("import os; os._exit(1)", VERL, "row 1 ", "the worker's process died"),
    "one value in three": ('return 1.5 if "python" in solution_str else 1.0', VERL, "row 1 ", "returned 1.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_score_is_refused_before_anything_is_written(name, tried):
    body, parameters, where, told = REFUSED[name]
    code, error = tried(body, parameters, "reward.timeout=0.5")
    assert code == 2 and error.startswith("prime-fast: ") and "\n" not in error
    assert f"rows.jsonl, {where}" in error or not where
    assert told in error, error


def test_what_is_odd_about_one_response_is_said_and_trains(tried):
    code, printed = tried("return solution_str[0] and float(sum(map(ord, solution_str)) % 2)")
    assert code == 0
    odd = [line for line in printed.splitlines() if "in training it would score 0.0" in line]
    assert len(odd) == 2 and "row 1 " in odd[0] and "row 21 " in odd[1] and "on the response ''" in odd[0]


def test_one_row_of_each_kind_of_all_files(configure, workspace, tmp_path):
    """The rows of the training files come first, one of each ability and data_source, wherever it stands."""
    rows = [json.loads(line) for line in (workspace / "rows.jsonl").read_text().splitlines()]
    kinds = [("a", "x"), ("a", "x"), ("a", "y"), ("b", "x"), ("b", None), ("b", "x")]
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path, part in zip(paths, (kinds, [("a", "y"), ("c", ["z"])]), strict=True):
        made = [row | {"ability": a, "data_source": d} for row, (a, d) in zip(rows, part, strict=False)]
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
    inputs = preflight.load_inputs(configure(f"data.train={paths[0]}", f"data.eval={paths[1]}"))
    where = {row["_where"].removeprefix(str(tmp_path) + "/") for row in inputs.kinds}
    assert where == {f"one.jsonl, row {i}" for i in (1, 3, 4, 5)} | {"two.jsonl, row 2"}


def test_kinds_without_end_are_bounded(configure, workspace, tmp_path):
    rows = [json.loads(line) for line in (workspace / "rows.jsonl").read_text().splitlines()]
    many = [rows[i % 40] | {"data_source": f"source {i}"} for i in range(300)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    inputs = preflight.load_inputs(configure(f"data.train={tmp_path}/many.jsonl"))
    assert len(inputs.kinds) == preflight.MAX_KINDS and inputs.kinds[-1]["data_source"] == "source 63"


class Slow:
    """Stands for a pool whose every call takes a minute."""

    reward = "slow"

    def __init__(self, clock):
        self.clock = clock

    def judge(self, responses, rows, quiet):
        self.clock[0] += 61
        return [Verdict(1.0)] * len(rows)


def test_time_is_bounded_and_it_is_said(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(trial.time, "monotonic", lambda: clock[0])
    assert trial.try_out(Slow(clock), [{"prompt": "?"}] * 9) == [
        "the reward is slow: only 1 of 9 kinds of rows were tried in 60 s"
    ]


def test_made_up_responses(caplog):
    """An answer that is right is among them, where it is short; the built-in rewards fail on none of them."""
    math = {"prompt": "?", "ability": "math", "reward_model": {"ground_truth": r"\frac{1}{2}"}}
    tests = {"ground_truth": json.dumps({"inputs": [""] * 30, "outputs": ["7"] * 30})}
    rows = [
        math,
        math | {"ability": "code", "reward_model": tests},
        math | {"reward_model": {"ground_truth": "9" * 999}},
    ]
    assert r"\boxed{\frac{1}{2}}" in trial.made_up(math)[1] and r"\boxed{7}" in trial.made_up(rows[1])[1]
    with trial.RewardPool("auto", 2) as pool, caplog.at_level(logging.WARNING):
        assert trial.try_out(pool, rows) == [] and pool.counts == {"timeouts": 0, "errors": 0, "crashes": 0}
        assert pool.score(trial.made_up(math), [math] * 4) == [0.0, 1.0, 1.0, 0.0]
        assert pool.score(trial.made_up(rows[1])[3:], rows[1:2]) == [1.0]
