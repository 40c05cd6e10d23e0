r"""Formulas are compared exactly.

Two numbers are equal if their difference is zero to as many digits as it takes, two formulas with unknowns if they have
the same unknowns and are equal wherever they are evaluated. math-verify's own comparison decides where neither is
possible (functions without a definition, sets).
"""

from __future__ import annotations

from fractions import Fraction

import sympy
from math_verify import verify
from sympy.core.function import AppliedUndef

from prime_fast.rewards.answers.parsing import parse, where_possible

PRECISION = 200  # digits to which the difference of two numbers is followed
POINT_PRECISION = 30  # and that of formulas at a point
MIN_POINTS = 3
POINTS = [Fraction(*pair) for pair in ((7, 5), (13, 11), (3, 7), (-5, 3), (17, 6), (-11, 13), (23, 9), (-19, 4))]


@where_possible
def equal(truth: str, answer: str) -> bool | None:
    one, other = parse(truth), parse(answer)
    return one is not None and other is not None and same(one, other)


def same(truth, answer) -> bool:
    if any(isinstance(value, sympy.Basic) and value.has(sympy.nan, sympy.zoo) for value in (truth, answer)):
        return False
    if isinstance(truth, sympy.MatrixBase) or isinstance(answer, sympy.MatrixBase):
        return (
            isinstance(truth, sympy.MatrixBase)
            and isinstance(answer, sympy.MatrixBase)
            and truth.shape == answer.shape
            and all(map(same, truth, answer))
        )
    if truth == answer:
        return truth is not sympy.nan
    if not (isinstance(truth, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return type(truth) is type(answer) and verify(truth, answer, timeout_seconds=None)
    if is_number(truth) or is_number(answer):
        return is_number(truth) and is_number(answer) and _same_number(truth, answer)
    if truth.free_symbols != answer.free_symbols:
        return False
    met = [_same_number(*values, POINT_PRECISION) for values in _values(truth, answer)]
    if len(met) < MIN_POINTS:
        return verify(truth, answer, timeout_seconds=None)
    return all(met)


@where_possible
def proportional(truth, answer, positive: bool = False) -> bool | None:
    """Whether one is the other times a constant that is not zero, or above it: as sides' differences of equations."""
    if not (isinstance(truth, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return False
    if not truth.free_symbols or truth.free_symbols != answer.free_symbols:
        return False
    values = [pair for pair in _values(truth, answer) if not _same_number(pair[0], sympy.Integer(0))]
    if len(values) < MIN_POINTS:
        return False
    (first, image), *rest = values
    if _same_number(image, sympy.Integer(0)) or not all(
        _same_number(one * image, first * other, POINT_PRECISION) for one, other in rest
    ):
        return False
    return not positive or bool(sympy.re(sympy.N(first / image)) > 0)


@where_possible
def number(text: str) -> Fraction | None:
    """The value of a real number written as a formula, to 40 digits if it is no fraction."""
    value = parse(text)
    if not isinstance(value, sympy.Expr) or not is_number(value) or not value.is_finite:
        return None
    approximate = value if value.is_Rational else sympy.N(value, 40)
    if not (approximate.is_Rational or approximate.is_Float):
        return None
    exact = sympy.Rational(approximate)
    return Fraction(int(exact.p), int(exact.q))


def is_number(value) -> bool:
    return isinstance(value, sympy.Expr) and not value.free_symbols and not value.atoms(AppliedUndef)


def _same_number(one, other, digits: int = PRECISION) -> bool:
    if one == other:
        return True
    if one.is_Rational and other.is_Rational or not (one.is_finite and other.is_finite):
        return False
    rest = (one - other).evalf(2, maxn=digits)
    if not rest.is_number:
        return False
    lost = lambda part: part == 0 or getattr(part, "_prec", 2) == 1  # noqa: E731  in rounding, at all digits
    return all(part.is_Number and lost(part) for part in rest.as_real_imag())


def _values(one, other) -> list[tuple]:
    """The values of both at the points where both have one."""
    symbols = sorted(one.free_symbols, key=str)
    values = []
    for index in range(len(POINTS)):
        point = {
            symbol: sympy.Rational(*POINTS[(index + place) % len(POINTS)].as_integer_ratio()) + place
            for place, symbol in enumerate(symbols)
        }
        pair = tuple(side.xreplace(point).doit() for side in (one, other))
        if all(is_number(side) and side.is_finite for side in pair):
            values.append(pair)
    return values
