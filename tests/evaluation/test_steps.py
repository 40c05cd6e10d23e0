"""Rewards of tokens and steps, and the first wrong step: against plain forwards and a search over every threshold."""

import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prime_fast.cli import main
from prime_fast.config import save_config
from prime_fast.data.models import load_tokenizer
from prime_fast.evaluation import steps
from prime_fast.evaluation.step_files import Question, _summarise
from prime_fast.evaluation.steps import best_threshold, log_odds, pieces, predict, process_bench

STEPS = ["1+1=2,", "2+2=5,", "5"]


def made(seed, count=60):
    rng = random.Random(seed)
    records = []
    for _ in range(count):
        size = rng.randint(1, 6)
        records.append(
            {
                "step_reward": [rng.choice([-0.6, -0.2, 0.1, 0.3]) for _ in range(size)],
                "first_error": rng.choice([-1, *range(size)]),
            }
        )
    return records


@pytest.mark.parametrize("seed", range(4))
def test_no_threshold_is_better(seed):
    records = made(seed)
    odds = np.unique(np.concatenate([log_odds(record) for record in records]))
    every = [*odds, *(odds[1:] + odds[:-1]) / 2, odds[0] - 1, odds[-1] + 1]
    best = process_bench(records, best_threshold(records))["f1"]
    assert best == max(process_bench(records, threshold)["f1"] for threshold in every) > 0


def test_the_measure_is_processbenchs():
    records = [
        {"step_reward": [0.5, -1.0, 0.1], "first_error": 1},  # found
        {"step_reward": [-1.0, 0.0, 0.0], "first_error": 2},  # told too early
        {"step_reward": [0.5, 0.5, 0.5], "first_error": 0},  # missed
        {"step_reward": [0.5, -0.4], "first_error": -1},  # let pass: no sum is below 0
        {"step_reward": [-0.1], "first_error": -1},  # not
    ]
    assert [predict(record, 0.0) for record in records] == [1, 0, -1, -1, 0]
    found = process_bench(records, 0.0)
    accuracy = 1 / 3, 1 / 2
    assert (found["error_accuracy"], found["correct_accuracy"]) == pytest.approx(accuracy)
    assert found["f1"] == pytest.approx(2 * accuracy[0] * accuracy[1] / sum(accuracy))
    assert process_bench(records[:3], 0.0)["f1"] is None
    with pytest.raises(ValueError, match="all of one kind"):
        best_threshold(records[:3])


@pytest.fixture(scope="module")
def scored(workspace, other_prm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    rows = [
        {"problem": "1+1:", "steps": STEPS, "final_answer_correct": False, "label": 1},
        {"problem": "2+1:", "steps": ["3", "4"], "final_answer_correct": True, "label": -1},
        {"prompt": [{"role": "user", "content": "3:"}], "responses": ["7,\n8", "9"]},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prm = other_prm.partition("=")[2]
    words = ["score-steps", prm, f"{folder}/rows.jsonl", "--reference", f"{workspace}/model", "--beta", "0.5"]
    assert main([*words, "--out", f"{folder}/out.jsonl"]) == 0
    records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    return words, records, json.loads((folder / "out.summary.json").read_text()), prm


def test_rewards_are_those_of_plain_forwards(scored, workspace):
    _, records, _, prm = scored
    tokenizer = load_tokenizer(prm)
    models = [AutoModelForCausalLM.from_pretrained(path).double() for path in (prm, workspace / "model")]
    for record in records:
        prompt = tokenizer(record["prompt"])["input_ids"]
        response = [*tokenizer(record["response"])["input_ids"], tokenizer.eos_token_id]
        ids, start = torch.tensor([prompt + response]), len(prompt)
        with torch.no_grad():
            logits = [model(input_ids=ids).logits[0, start - 1 : -1] for model in models]
        ours, theirs = (x.log_softmax(-1).gather(1, ids[0, start:, None]) for x in logits)
        expected = (0.5 * (ours - theirs))[:, 0]
        torch.testing.assert_close(torch.tensor(record["reward"]), expected, atol=2e-5, rtol=0, check_dtype=False)
        assert record["score"] == pytest.approx(sum(record["reward"]))
        # line breaks are no tokens of this vocabulary
        assert "".join(record["pieces"]) == record["response"].replace("\n", "") + tokenizer.eos_token
        sums = [sum(record["reward"][start:end]) for start, end in record["steps"]]
        assert record["step_reward"] == pytest.approx(sums)
        assert sum(end - start for start, end in record["steps"]) == len(record["reward"])


def test_steps_and_labels(scored):
    _, records, summary, _ = scored
    texts = [["".join(record["pieces"][start:end]) for start, end in record["steps"]] for record in records]
    assert texts[0] == [*STEPS[:2], STEPS[2] + "$"] and texts[2:] == [["7,", "8$"], ["9$"]]
    assert [record.get("first_error") for record in records] == [1, -1, None, None]
    assert [record.get("outcome") for record in records] == [0, 1, None, None]
    (numbers,) = summary["files"].values()
    assert numbers["responses"] == 2 and summary["f1"] == numbers["f1"] and summary["threshold_from"] == "these rows"


def test_a_given_threshold_and_what_is_missing(scored, tmp_path, monkeypatch, capsys):
    words, records, *_ = scored
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--threshold", "0.5"]) == 0
    again = [json.loads(line) for line in next(tmp_path.glob("runs/steps/*-prm.jsonl")).read_text().splitlines()]
    assert [record["reward"] for record in again] == [record["reward"] for record in records]
    assert again[0]["predicted"] == predict(records[0], 0.0)
    assert main(words[:3]) == 2
    assert "give --reference" in capsys.readouterr().err
    assert main([*words, "--threshold", "1"]) == 2
    assert "--threshold 1 is no chance between 0 and 1" in capsys.readouterr().err


def test_rows_that_give_no_threshold_are_told_before_they_are_scored(scored, tmp_path, monkeypatch, capsys):
    rows = [{"problem": "1+1:", "steps": STEPS, "final_answer_correct": False, "label": label} for label in (0, 2)]
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words, wrong = scored[0], str(tmp_path / "wrong.jsonl")
    monkeypatch.setattr(steps, "score_steps", None)
    for more in ([*words[:2], wrong, *words[3:]], [*words, "--threshold-from", wrong]):
        assert main(more) == 2
        assert "a threshold needs responses with a wrong step and responses without" in capsys.readouterr().err
    for beta in ("nan", "inf", "0"):
        assert main([*words, "--beta", beta]) == 2
        assert f"--beta {beta} must be a number above 0" in capsys.readouterr().err


def test_a_run_whose_reference_moved_names_none(configure, tmp_path, capsys):
    told = {"policy": "was the policy of each step; give --reference", "sft": "no tokenizer at"}  # there is no PRM yet
    for reference in told:
        save_config(configure(f"prime.reference={reference}"), tmp_path / "config.yaml")
        assert main(["score-steps", str(tmp_path), "rows.jsonl"]) == 2
        assert told[reference] in capsys.readouterr().err


def test_a_threshold_far_out_is_a_chance(tmp_path):
    records = [{"step_reward": [-2000.0], "first_error": -1}, {"step_reward": [-3000.0], "first_error": 0}]
    summary = _summarise(Question("prm", ["rows"], tmp_path / "out"), {"rows": records})
    assert summary["threshold"] == 0.0 and summary["f1"] == 1.0


def test_pieces_of_characters_that_tokens_share(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer("é = 1")["input_ids"]
    assert pieces(ids, tokenizer) == ["", "é", " ", "=", " ", "1"]
