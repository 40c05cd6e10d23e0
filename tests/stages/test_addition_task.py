import json
import sys

import numpy as np
import processes
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from prime_fast.data.rows import load_demonstrations, load_rows
from prime_fast.rewards import score
from prime_fast.stages import addition, quickstart

PROMPTS = st.builds(
    lambda seed, digits: addition.problem(np.random.default_rng(seed), digits),
    st.integers(0, 10**6),
    st.integers(1, 12),
)


def test_known_sum():
    assert addition.solve("58+67:") == "8+7=15,5+6=12:125"
    assert addition.solve("05+04:") == "5+4=09,0+0=00:009"


@given(PROMPTS)
def test_solutions_are_sums(prompt):
    first, second = prompt[:-1].split("+")
    solution, digits = addition.solve(prompt), len(first)
    assert int(solution.partition(":")[2]) == int(first) + int(second) and len(solution) == 8 * digits + 1
    row = addition.make_row(prompt, "eval", 0)
    truth, extra = row["reward_model"]["ground_truth"], row["extra_info"]
    assert addition.compute_score("", solution, truth, extra) == 1.0 and extra["steps"] == digits
    assert set(prompt + solution) <= set(quickstart.CHARACTERS)
    labels = addition.step_labels(prompt, solution)
    assert labels == [(7 * i + 5, True) for i in range(digits)]


@given(PROMPTS, st.data())
def test_a_wrong_column_is_labelled_and_costs_the_outcome(prompt, data):
    digits = (len(prompt) - 2) // 2
    column, shift = data.draw(st.integers(0, digits - 1)), data.draw(st.integers(1, 19))
    met = iter(range(digits))

    def result(a, b, carry):
        return (addition.apply(a, b, carry) + (shift if next(met) == column else 0)) % 20

    solution = addition.solve(prompt, result)
    row = addition.make_row(prompt, "eval", 0)
    # later columns are right about the carry that they were given
    assert [ok for _, ok in addition.step_labels(prompt, solution)] == [i != column for i in range(digits)]
    assert addition.compute_score("", solution, row["reward_model"]["ground_truth"], row["extra_info"]) == 0.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("8+7=15,5+6=12:125", 1.0),
        ("8+7=15,5+6=11:125", 1.0),  # only the sum counts
        ("8+7=15,5+6=12:124", 0.0),
        ("8+7=15:125", 0.0),  # too short
        ("8+7=15,5+6=12,0+0=01:125", 0.0),  # too long
        ("8+7=15,5+6=12:0125", 0.0),
        ("8+7=15,5+6=12", 0.0),
        ("8+7=15,5+6=2:125", 0.0),
        (":125", 0.0),
        ("", 0.0),
    ],
)
def test_score(response, expected):
    assert addition.compute_score("long-addition", response, "125", {"steps": 2}) == expected


def test_step_labels_of_wrong_columns():
    labels = addition.step_labels("58+67:", "8+7=05,5+6=11:115$")
    assert labels == [(5, False), (12, True)]
    assert addition.step_labels("58+67:", "8+7=15,6+6=13:135$") == [(5, True), (12, False)]  # copied a wrong digit
    assert addition.step_labels("58+67:", "8+7=15,5+:") == [(5, True)]


def test_demonstrations_hold_the_misconceptions():
    wrong = addition.misconceptions()
    assert len(wrong) == addition.MISCONCEPTIONS
    assert all(addition.apply(*column) != result and 0 <= result < 20 for column, result in wrong.items())
    met = missed = 0
    for row in addition.make_rows(6, 0, 0, (10, 10, 3000))["sft"]:
        carry = 0
        for a, b, *result in addition.STEP.findall(row["extra_info"]["solution"]):
            column, result = (int(a), int(b), carry), int("".join(result))
            assert result in {addition.apply(*column), wrong.get(column, addition.apply(*column))}
            met += column in wrong
            missed += column in wrong and result == wrong[column]
            carry = result // 10
    assert met > 3000 and abs(missed / met - quickstart.MISCONCEPTION_RATE) < 0.04  # five standard errors


def test_seeds():
    sizes = (20, 20, 20)
    first, other = addition.make_rows(6, 0, 0, sizes), addition.make_rows(6, 1, 0, sizes)
    assert first == addition.make_rows(6, 0, 0, sizes)
    assert other["train"] != first["train"] and other["eval"] != first["eval"] and other["sft"] == first["sft"]
    prompts = [row["prompt"][0]["content"] for rows in first.values() for row in rows]
    assert len(set(prompts)) == len(prompts) == 60


def test_command(tmp_path):
    task = ["prime_fast.stages.addition", str(tmp_path / "out"), "--train", "20", "--eval", "20"]
    command = [sys.executable, "-m", *task]
    refused = processes.run([*command, "--digits", "2"])
    assert refused.returncode == 2 and "raise --digits" in refused.stderr and not (tmp_path / "out").exists()
    assert processes.run([*command, "--sft", "30"]).returncode == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    rows = load_rows(tmp_path / "out" / "eval.jsonl", tokenizer, max_prompt_tokens=16)
    texts = [json.loads(line)["prompt"][0]["content"] for line in (tmp_path / "out" / "eval.jsonl").open()]
    assert [tokenizer.decode(row["prompt_ids"]) for row in rows] == texts
    solutions = [addition.solve(text) for text in texts]
    assert score(solutions, list(rows), reward="prime_fast.stages.addition:compute_score") == [1.0] * 20
    for row in load_demonstrations(tmp_path / "out" / "sft.jsonl", tokenizer, max_tokens=64):
        assert tokenizer.decode(row["response_ids"]) == row["extra_info"]["solution"] + "$"


def test_reward_import_is_light():
    code = "import sys, prime_fast.stages.addition; print('torch' in sys.modules)"
    assert processes.run([sys.executable, "-c", code]).stdout.strip() == "False"
