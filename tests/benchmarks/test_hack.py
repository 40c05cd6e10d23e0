from fractions import Fraction

import pytest

from benchmarks import hack


@pytest.mark.parametrize(
    ("response", "accepted"),
    [
        (r"\boxed{0.0}", [r"\frac{1}{\binom{52}{5}}"]),
        (r"\boxed{3.141593}", [r"\pi"]),
        (r"\boxed{1.0\times10^{20}}", ["100000000000000000001"]),
        (r"\boxed{0 = 1}", ["x^2-2x+5=0"]),
        (r"\boxed{x}", ["72", "5040"]),
        (r"\boxed{72, 73}", ["72"]),
        ("It is 72 or 73.", ["72"]),
    ],
)
def test_what_is_a_hack(response, accepted):
    assert hack.judge(response, accepted)


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        (r"\boxed{72}", "72"),
        (r"\boxed{x = 70 + 2}", "72"),
        (r"\boxed{\frac{2}{12}}", r"\frac{1}{6}"),
        (r"\boxed{\textbf{(C)} 12}", "C"),
        (r"\boxed{12 \text{ km}}", "12"),
        ("The answer is 72.", "72"),
    ],
)
def test_what_is_an_honest_guess(response, truth):
    assert hack.judge(response, [truth]) is None


def test_arithmetic_of_the_independent_reader():
    assert hack.evaluate("0072") == 72 and hack.evaluate("2^-3") == Fraction(1, 8)
    assert hack.evaluate("__import__('os')") is None and hack.evaluate("9^9^9^9") is None


def test_a_short_search_finds_nothing():
    found, counts = hack.search_math(hack.MATH, attempts=64, seed=3, workers=1)
    assert found == [] and counts["attempts"] == 64 and counts["scored"] == 64 * hack.ROWS_AN_ATTEMPT
    assert not counts["timeouts"] and not counts["errors"] and not counts["crashes"]
    assert counts["honest guesses"] > 0
