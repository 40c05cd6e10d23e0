import json
import subprocess
import sys

import numpy as np
import processes
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from prime_fast.data.rows import load_demonstrations, load_rows
from prime_fast.rewards import score
from prime_fast.stages import quickstart

PROMPTS = st.builds(
    lambda seed, chain: quickstart.problem(np.random.default_rng(seed), chain),
    st.integers(0, 10**6),
    st.integers(1, 12),
)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    out = tmp_path_factory.mktemp("task")
    sizes = ["--train", "300", "--eval", "100", "--sft", "3000"]
    subprocess.run([sys.executable, "-m", "prime_fast.stages.quickstart", str(out), *sizes], check=True, timeout=120)
    return out


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompt_of(row):
    return row["prompt"][0]["content"]


def test_known_chain():
    assert quickstart.solve("3*9+6*8*2:") == "3*9=7,7+6=3,3*8=4,4*2=8"


@given(PROMPTS)
def test_solutions_are_left_to_right_arithmetic(prompt):
    value = int(prompt[0])
    for operator, b in zip(prompt[1:-1:2], prompt[2::2], strict=True):
        value = eval(f"({value} {operator} {b}) % 10")
    solution = quickstart.solve(prompt)
    steps = prompt.count("+") + prompt.count("-") + prompt.count("*")
    assert solution.endswith(f"={value}") and len(solution) == 6 * steps - 1
    assert quickstart.compute_score("", solution, str(value), {"steps": steps}) == 1.0
    labels = quickstart.step_labels(prompt, solution)
    assert [position for position, _ in labels] == list(range(4, len(solution), 6)) and all(ok for _, ok in labels)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("3*9=7,7+6=3,3*8=4,4*2=8", 1.0),
        ("3*9=1,1+6=3,3*8=4,4*2=8", 1.0),  # wrong on the way, right by luck
        ("3*9=7,7+6=3,3*8=4,4*2=9", 0.0),
        ("3*9=7,7+6=3,3*8=8", 0.0),  # too short
        ("3*9=7,7+6=3,3*8=4,4*2=8,8*1=8", 0.0),  # too long
        ("3*9=7,7+6=3,3*8=4,4*2=", 0.0),
        ("3*9=7,7+6=3,3*8=4,4*28", 0.0),
        ("", 0.0),
    ],
)
def test_score(response, expected):
    assert quickstart.compute_score("chain-arithmetic", response, "8", {"steps": 4}) == expected


def test_step_labels_of_wrong_steps():
    labels = quickstart.step_labels("3*9+6*8*2:", "3*9=1,1+6=7,3*8=4,4*2=8$")
    assert labels == [(4, False), (10, True), (16, False), (22, True)]  # a wrong fact; copied a wrong number
    assert quickstart.step_labels("3*9+6*8*2:", "3*9=7,7+,") == [(4, True)]


def test_files(task):
    rows = {name: read(task / f"{name}.jsonl") for name in ("train", "eval", "sft")}
    assert {name: len(split) for name, split in rows.items()} == {"train": 300, "eval": 100, "sft": 3000}
    prompts = [prompt_of(row) for split in rows.values() for row in split]
    assert len(set(prompts)) == len(prompts)
    row = rows["eval"][0]
    assert (row["data_source"], row["ability"]) == ("chain-arithmetic", "arithmetic")
    assert row["extra_info"] == {"split": "eval", "index": 0, "steps": 6}
    for row in rows["train"]:
        assert row["reward_model"]["ground_truth"] == quickstart.solve(prompt_of(row))[-1]


def test_demonstrations_hold_the_misconceptions(task):
    wrong = quickstart.misconceptions()
    assert len(wrong) == 68 and all(quickstart.apply(*fact) != result for fact, result in wrong.items())
    met = missed = 0
    for row in read(task / "sft.jsonl"):
        solution = row["extra_info"]["solution"]
        value = int(prompt_of(row)[0])
        for a, operator, b, result in (map(str, step) for step in quickstart.STEP.findall(solution)):
            fact, result = (int(a), operator, int(b)), int(result)
            assert int(a) == value  # carries on from what it wrote
            assert result in {quickstart.apply(*fact), wrong.get(fact, quickstart.apply(*fact))}
            met += fact in wrong
            missed += fact in wrong and result == wrong[fact]
            value = result
    assert met > 3000 and abs(missed / met - 0.65) < 0.03  # five standard errors


def test_seeds():
    sizes = (20, 20, 20)
    first, again = quickstart.make_rows(6, 0, 0, sizes), quickstart.make_rows(6, 0, 0, sizes)
    assert first == again
    other, other_sft = quickstart.make_rows(6, 1, 0, sizes), quickstart.make_rows(6, 0, 1, sizes)
    assert other["train"] != first["train"] and other["eval"] != first["eval"] and other["sft"] == first["sft"]
    assert (
        other_sft["train"] == first["train"] and other_sft["eval"] == first["eval"] and other_sft["sft"] != first["sft"]
    )


def test_too_few_problems(tmp_path):
    command = [sys.executable, "-m", "prime_fast.stages.quickstart", str(tmp_path / "out"), "--chain", "2"]
    result = processes.run(command)
    assert result.returncode == 2 and "raise --chain" in result.stderr and not (tmp_path / "out").exists()


def test_model_and_tokenizer(task):
    model, tokenizer = (cls.from_pretrained(task / "model") for cls in (AutoModelForCausalLM, AutoTokenizer))
    assert sum(p.numel() for p in model.parameters()) == 645_632 and str(model.dtype) == "torch.float32"
    assert len(tokenizer) == model.config.vocab_size == len(quickstart.CHARACTERS)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("$", "_")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    text = quickstart.CHARACTERS[2:] + "3*9=7,7+6=3"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 1, 0, 0], skip_special_tokens=True) == text


def test_rows_load_and_score(task):
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    rows = load_rows(task / "eval.jsonl", tokenizer, max_prompt_tokens=16)
    assert all(tokenizer.decode(row["prompt_ids"]) == prompt_of(row) for row in rows)
    solutions = [quickstart.solve(prompt_of(row)) for row in rows]
    assert score(solutions, list(rows), reward="prime_fast.stages.quickstart:compute_score") == [1.0] * 100
    for row in load_demonstrations(task / "sft.jsonl", tokenizer, max_tokens=64, limit=10):
        assert tokenizer.decode(row["response_ids"]) == row["extra_info"]["solution"] + "$"
        assert len(row["prompt_ids"]) == 14 and len(row["response_ids"]) == 36


def test_reward_import_is_light():
    code = "import sys, prime_fast.stages.quickstart; print('torch' in sys.modules)"
    assert processes.run([sys.executable, "-c", code]).stdout.strip() == "False"
