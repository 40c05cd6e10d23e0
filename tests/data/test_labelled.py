"""Labelled responses: every shape they come in, what is said of broken ones, and cutting at steps."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prime_fast.data.labelled import Reading, load_labelled, steps_of
from prime_fast.data.models import load_tokenizer


def asked(text):
    return [{"role": "user", "content": text}]


def answered(text, answer):
    return [*asked(text), {"role": "assistant", "content": answer}]


SHAPES = {
    "response": ({"prompt": asked("1+1:"), "response": "1+1=2", "label": 1}, [("1+1=2", 1.0)]),
    "responses": ({"prompt": asked("1+1:"), "responses": ["2", "3"], "label": [1, 0.5]}, [("2", 1.0), ("3", 0.5)]),
    "labels": ({"question": "1+1:", "responses": ["2", "3"], "labels": [True, False]}, [("2", 1.0), ("3", 0.0)]),
    "eurusprm": (
        {"response": answered("1+1:", "7"), "label": 0, "instruction dataset": "MATH", "generator model": "x"},
        [("7", 0.0)],
    ),
    "messages": ({"messages": answered("1+1:", "7"), "label": 0}, [("7", 0.0)]),
    "implicitprm": (
        {"prompt": "1+1:", "completions": ["2", "3"], "correctness": [True, False], "dataset": "x"},
        [("2", 1.0), ("3", 0.0)],
    ),
    "pairs": (
        {"chosen": answered("1+1:", "2"), "rejected": answered("1+1:", "3")},
        [("2", 1.0), ("3", 0.0)],
    ),
    "pairs of texts": ({"prompt": asked("1+1:"), "chosen": "2", "rejected": "3"}, [("2", 1.0), ("3", 0.0)]),
    "processbench": (
        {"id": "gsm8k-0", "problem": "1+1:", "steps": ["1", "2", "3"], "final_answer_correct": False, "label": 1},
        [("1\n\n2\n\n3", 0.0)],
    ),
}


@pytest.fixture(scope="module")
def tokenizer(workspace):
    return load_tokenizer(str(workspace / "model"))


@pytest.fixture
def load(tokenizer, tmp_path):
    def make(*rows, cut=False, separators="\n", unlabelled=False, numbered=False, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        reading = Reading(cut, separators, unlabelled, numbered)
        return load_labelled(str(path), tokenizer, max_tokens=60, reading=reading, **options)

    return make


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape(shape, load, tokenizer):
    row, expected = SHAPES[shape]
    found = load(row)
    assert [(found.rows[i]["response"], found.label[i]) for i in range(len(found))] == expected
    for i in range(len(found)):
        ids = found.rows[i]
        assert tokenizer.decode(ids["prompt_ids"]) == "1+1:"
        expected = [*tokenizer(ids["response"])["input_ids"], tokenizer.eos_token_id]
        assert ids["response_ids"] == expected and found.tokens[i] == len(expected)
    assert set(found.group) == {0}


def test_parquet_and_groups_across_shapes(tokenizer, tmp_path):
    rows = [SHAPES[name][0] for name in ("eurusprm", "eurusprm")]
    rows[1] = rows[1] | {"response": answered("2+1:", "3"), "label": 1}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    other = tmp_path / "more.jsonl"
    other.write_text("".join(json.dumps(SHAPES[name][0]) + "\n" for name in ("pairs", "implicitprm")))
    found = load_labelled([str(tmp_path / "rows.parquet"), str(other)], tokenizer, max_tokens=60)
    assert found.label.tolist() == [0, 1, 1, 0, 1, 0]
    assert found.group.tolist() == [0, 1, 0, 0, 0, 0]
    part = found.select([1, 3])
    assert part.label.tolist() == [1, 0] and part.rows[0]["response"] == "3" and part.digest() != found.digest()
    assert found.sample(1).group.tolist() in ([1], [0] * 5) and len(found.sample(100)) == 6


def test_truncated_responses_do_not_end(load, tokenizer):
    found = load({"prompt": asked("1+1:"), "responses": ["2", "3"], "label": [1, 0], "truncated": [False, True]})
    assert [found.rows[i]["response_ids"][-1] == tokenizer.eos_token_id for i in (0, 1)] == [True, False]


def test_labelled_steps_cut_a_response(load, tokenizer):
    row = {"prompt": asked("1+1:"), "response": "1+1=2,2+2=5,5", "step_labels": [1, 0, 1], "label": 1}
    found = load(
        row, row | {"response": "1,2,3"}, row | {"response": "9", "step_labels": None}, cut=True, separators=","
    )
    texts = [found.rows[i]["response"] for i in range(len(found))]
    assert texts == ["1+1=2,", "1+1=2,2+2=5,", "1+1=2,2+2=5,5", "1,", "1,2,", "1,2,3", "9"]
    assert found.label.tolist() == [1, 0, 0, 1, 0, 0, 1]
    assert found.group.tolist() == [0, 1, 2, 0, 1, 2, 3]  # prefixes of as many steps are compared
    ends = [found.rows[i]["response_ids"][-1] == tokenizer.eos_token_id for i in range(len(found))]
    assert ends == [False, False, True, False, False, True, True]
    whole = load(row, separators=",")
    assert whole.rows[0]["step_ends"] == [6, 12, 13] and whole.rows[0]["step_labels"] == [1, 0, 1]


def test_an_empty_step_at_the_beginning_is_told(load):
    """A response of no token has no loss; scored whole it may have one."""
    row = {"prompt": asked("1+1:"), "response": "2", "steps": ["", "2"], "step_labels": [1, 1], "label": 1}
    with pytest.raises(ValueError, match="row 1 has an empty first step, of which there is nothing to learn"):
        load(row, cut=True)
    assert load(row).rows[0]["step_ends"] == [0, 1]


def test_processbench_steps(load):
    row = SHAPES["processbench"][0]
    found = load(row, row | {"label": -1, "final_answer_correct": True}, numbered=True)
    assert found.rows[0]["response"] == "Step 1: 1\n\nStep 2: 2\n\nStep 3: 3"
    assert [found.rows[i]["step_labels"] for i in (0, 1)] == [[1, 0, 0], [1, 1, 1]]
    assert found.rows[0]["step_ends"] == [11, 22, 31] and found.label.tolist() == [0, 1]


def test_steps_of():
    assert steps_of("a\n\n\nb\n", "\n") == ["a\n\n\n", "b\n"]
    assert steps_of("abc", "\n") == ["abc"] and steps_of("\na", "\n") == ["\n", "a"]
    assert steps_of("1=2,3:4", "[,:]") == ["1=2,", "3:", "4"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"label": 2}, "has label 2, which is no number from 0 to 1"),
        ({"label": "good"}, "has label 'good', which"),
        ({"label": None}, "has a response without a label"),
        ({"response": ""}, "has a response that is no text or an empty one"),
        ({"response": asked("1+1:")}, "whose last turn is not the assistant's"),
        ({"response": None}, "has no response: it has none of response, responses, completions"),
        ({"responses": ["2", "3"]}, "has several responses, whose labels must be a list, not 1"),
        ({"responses": ["2", "3"], "label": [1]}, "has 2 responses and 1 labels"),
        ({"prompt": None}, "has no prompt"),
        ({"step_labels": [1, 0]}, "has 2 step_labels for a response of 1 steps"),
        ({"response": None, "steps": ["1"], "final_answer_correct": True, "label": 1}, "which is neither -1 nor"),
        (
            {"response": None, "steps": ["1"], "final_answer_correct": "False", "label": -1},
            "label 'False', which is no",
        ),
        ({"truncated": "false"}, "has truncated 'false', which is neither true nor false"),
    ],
    ids=str,
)
def test_a_broken_row_is_told(change, told, load):
    row = SHAPES["response"][0]
    with pytest.raises(ValueError, match=r"rows.jsonl, row 2 ") as caught:
        load(row, row | change)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert len(load(row, row | change, drop=["broken"])) == 1


def test_responses_without_a_label_can_be_taken(load):
    found = load({"prompt": asked("1+1:"), "response": "2"}, unlabelled=True)
    assert np.isnan(found.label).all()
