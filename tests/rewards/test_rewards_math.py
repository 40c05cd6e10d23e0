import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_fast.rewards import RewardPool, score
from prime_fast.rewards.answers.reading import TEXT_TAIL_CHARS
from prime_fast.rewards.math import grade, last_box

ROW = {"data_source": "test", "ability": "math", "reward_model": {"ground_truth": "7"}}


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        (r"so \boxed{72}.", "72"),
        (r"first \boxed{3}, then \boxed{72}", 72),
        (r"\boxed{72} and an unfinished \boxed{7", "72"),
        (r"$\boxed{\dfrac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{0.5}", "1/2"),
        (r"\boxed{1,234}", "1234"),
        (r"\boxed{\$18}", "18"),
        (r"\boxed{18 \text{ dollars}}", "18"),
        (r"\boxed{x^2+2x+1}", "(x+1)^2"),
        (r"\boxed{\text{Tuesday}}", r"\text{Tuesday}"),
        (r"\boxed{(3,\frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{7}", r"\boxed{7}"),
        ("48+24 = 72 clips.\n#### 72", "72"),
        ("The answer is 5 apples at first.\n#### 1,072\n", "1072"),
        ("#### Step 1\nWe add. The answer is 72.", "72"),
        ("The final answer is $72$.", "72"),
        ("Altogether she has 72 apples.", "72"),
        ("#### -3.5", -3.5),
    ],
)
def test_right(response, truth):
    assert grade(response, truth) == 1.0


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        (r"\boxed{73}", "72"),
        (r"\boxed{72} no, \boxed{73}", "72"),
        (r"72, that is \boxed{7.2}", "72"),
        ("#### 73", "72"),
        ("", "72"),
        ("no number here", "72"),
        (r"\boxed{}", "72"),
        (r"\boxed{-72}", "72"),
        (r"\boxed{__import__('os').system('true')}", "72"),
    ],
)
def test_wrong(response, truth):
    assert grade(response, truth) == 0.0


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
@settings(max_examples=50, deadline=None)
def test_integers(answer, truth):
    for response in (rf"so \boxed{{{answer}}}", f"so\n#### {answer}"):
        assert grade(response, str(truth)) == float(answer == truth)


@given(st.text(alphabet="{}\\boxedf 1", max_size=60))
@settings(max_examples=200, deadline=None)
def test_last_box_is_balanced(text):
    box = last_box(text)
    assert box is None or (box.strip() and box in text)


def test_real_rows():
    """Worked solutions of 10 GSM8K and 30 MATH-500 rows (both MIT licensed) score 1, and 0 against others."""
    lines = (Path(__file__).parents[1] / "data" / "math_rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    solutions = [row["extra_info"]["solution"] for row in rows]
    others = rows[1:] + rows[:1]
    with RewardPool(workers=1) as pool:
        assert pool.score(solutions, rows) == [1.0] * len(rows)
        assert sum(pool.score(solutions, others)) == 0.0
        assert not any(pool.counts.values())


@pytest.mark.parametrize("piece", ["$", "answer ", "1 + ", "(1", r"\boxed{", r"\boxed{1}", "$1$ and ", "#### ", "{}"])
def test_long_responses_are_cheap(piece):
    start = time.process_time()
    grade(piece * (100_000 // len(piece)), "72")
    assert time.process_time() - start < 2.0


def test_only_the_end_counts_without_a_box():
    assert grade("The answer is 72." + " and so on" * TEXT_TAIL_CHARS, "72") == 0.0


LATEX = r"\boxed{ \frac{ } { ( ) [ ] \{ \left( \right) \sqrt \pi ^ _ 7 -3 0.5 , 1,000 x = + - * / % $ \infty #### .. !"
PIECES = LATEX.split(" ")


def test_fuzz(fuzz_pool):
    """Whatever a model writes is graded in time: no crash, no error, no other outcome than 0 or 1."""

    @given(
        st.lists(st.lists(st.sampled_from(PIECES), max_size=25), min_size=2, max_size=2)
        | st.lists(st.text(), min_size=2, max_size=2)
    )
    @settings(max_examples=250, deadline=None, derandomize=True)
    def check(texts):
        response, truth = (text if isinstance(text, str) else " ".join(text) for text in texts)
        rows = [{"reward_model": {"ground_truth": truth}}] * 2
        assert set(fuzz_pool.score([response, rf"\boxed{{{response}}}"], rows)) <= {0.0, 1.0}

    check()
    assert fuzz_pool.counts["crashes"] == 0 and fuzz_pool.counts["errors"] == 0


@pytest.fixture
def fuzz_pool():
    with RewardPool(workers=1, timeout=10.0) as pool:
        yield pool


@pytest.mark.parametrize(
    ("response", "strict", "outcome"),
    [(r"\boxed{7}", True, 1.0), ("#### 7", True, 0.0), ("The answer is 7.", True, 0.0), ("#### 7", False, 1.0)],
)
def test_strict_wants_a_box(response, strict, outcome):
    assert grade(response, "7", strict=strict) == outcome
    assert score([response], [ROW], reward="math-strict" if strict else "math", workers=1) == [outcome]


def test_hard_sympy_ends_at_the_deadline():
    start = time.monotonic()
    with RewardPool(workers=1, timeout=1.0) as pool:
        bomb = r"\boxed{" + "(" * 12 + "x+1" + ")^{7^{7^{7}}}" * 12 + "}"
        truth = {"reward_model": {"ground_truth": "(x-1)^{7^{7^{7}}}"}}
        assert pool.score([bomb, r"\boxed{7}"], [truth, ROW]) == [0.0, 1.0]
    assert time.monotonic() - start < 60.0  # of which the deadline is 1: the rest is the start of two workers


def test_other_abilities_are_refused():
    with pytest.raises(
        ValueError, match='row 1 has ability "code", which reward "math" cannot score: use "code" or "auto"'
    ):
        score(["x", "x"], [ROW, ROW | {"ability": "code"}])


def test_row_without_ground_truth():
    with pytest.raises(ValueError, match="row 0 has no reward_model.ground_truth"):
        score(["x"], [{"ability": "math"}])
