import numpy as np
import pytest

from prime_fast.evaluation.bestofn import majority
from prime_fast.evaluation.votes import answer_of, unite
from prime_fast.rewards import RewardPool


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{ 1 / 2 } or \boxed{3}.", "3"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("5 apples and 1,234.50 pears.", "1234.50"),
        ("3*9=7,7-6=1", "1"),
        ("#### -12", "-12"),
        ("It is blue.", "Itisblue"),
        ("  ", None),
    ],
)
def test_answers(response, answer):
    assert answer_of(response, "math") == answer


def test_code_votes_as_a_whole():
    assert answer_of("x = 1\n", "code") == "x = 1" and answer_of("x = 12\n", "code") == "x = 12"


@pytest.fixture(scope="module")
def pool():
    with RewardPool("math", workers=1, timeout=5.0) as pool:
        yield pool


def test_equal_answers_are_one_vote(pool):
    answers = [
        [r"\frac{1}{2}", "1/2", "0.5", r"\dfrac12", "0.5", "2", None],
        ["1,000", "1000", r"10^3", "100", "1000", "0100"],
        ["(x+1)^2", "x^2+2x+1", "x^2+1", "x=5", "5"],
        [None, None],
        [],
    ]
    assert unite(answers, [True] * 5, pool) == [
        ["0.5"] * 5 + ["2", None],
        ["1000", "1000", "1000", "100", "1000", "100"],
        ["(x+1)^2", "(x+1)^2", "x^2+1", "5", "5"],
        [None, None],
        [],
    ]
    assert not any(pool.counts.values())


def test_programs_are_compared_as_texts(pool):
    assert unite([["0.5", "1/2", "0.5"]], [False], pool) == [["0.5", "1/2", "0.5"]]


def test_a_number_beyond_all_bounds_is_a_vote_of_its_own(pool):
    tower = "9^{9^{9^{9}}}"  # sympy would work on it for longer than anyone waits
    (votes,) = unite([["3", tower, "3", tower + "+1", "6/2"]], [True], pool)
    assert votes[0] == votes[2] == votes[4] == "3" and votes[1] != "3"
    assert not any(pool.counts.values())


def test_majority_by_value(pool):
    """Strings would split the right answer's three votes and elect the wrong one."""
    answers = [[r"\frac{1}{2}", "1/2", "0.5", "7", "7"]]
    solved = np.array([[True, True, True, False, False]])
    assert majority(answers, solved, 5) == [0.0]
    assert majority(unite(answers, [True], pool), solved, 5) == [1.0]
