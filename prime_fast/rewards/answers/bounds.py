"""How much the value of a formula may take to compute."""

from __future__ import annotations

import math

import sympy

MAX_DIGITS = 10_000  # of a number on the way to a value; what may be larger is not evaluated
MAX_TERMS, MAX_UNKNOWN_TERMS = 1_000, 50  # of a sum or product, and of one with unknowns
MAX_SUMMED_DIGITS = 20_000  # terms times digits
MAX_DEGREE, MAX_SERIES = 5, 4  # of what is summed to an unknown end; the largest number in an infinite sum


class TooBig(ArithmeticError):
    """An expression whose value would have more than MAX_DIGITS digits on the way."""


def digits_of(value) -> float:
    """An upper bound of the digits of a value and of all that is computed for it; TooBig past MAX_DIGITS."""
    if value.is_Number:
        if not value.is_finite:
            return 1.0
        over, under = (abs(part) for part in sympy.Rational(value).as_numer_denom())
        digits = float(max(int(over).bit_length(), int(under).bit_length())) * math.log10(2)
    elif isinstance(value, sympy.Sum | sympy.Product):
        digits = digits_of(value.function) + 10
        counts = [high - low for one in value.atoms(sympy.Sum, sympy.Product) for _, low, high in one.limits]
        known = [int(count) + 1 for count in counts if count.is_Integer]
        terms = math.prod(known)
        unknown = any(not count.is_number for count in counts)
        if len(known) < len(counts) and not all(map(_has_closed_form, value.atoms(sympy.Sum, sympy.Product))):
            raise TooBig
        if terms > (MAX_UNKNOWN_TERMS if value.free_symbols and not unknown else MAX_TERMS):
            raise TooBig
        if known and terms * digits > MAX_SUMMED_DIGITS:
            raise TooBig
    else:
        parts = [digits_of(part) for part in value.args if isinstance(part, sympy.Basic)]
        digits = sum(parts) or 1.0
        if isinstance(value, sympy.Pow | sympy.exp):
            digits = (parts[0] if isinstance(value, sympy.Pow) else 1.0) * _bound(value.exp, parts[-1])
        elif isinstance(value, sympy.factorial | sympy.gamma | sympy.binomial | sympy.factorial2 | sympy.subfactorial):
            digits = _bound(value.args[0], parts[0]) * max(parts[0], 1.0)
    if digits > MAX_DIGITS:
        raise TooBig
    return digits


def _has_closed_form(value) -> bool:
    """Whether a sum to an end that is unknown or infinite is one that SymPy is quick with."""
    index, low, high = value.limits[0]
    if len(value.limits) > 1 or not isinstance(value, sympy.Sum):
        return False
    if (high - low).is_Integer:
        return True
    if high.is_infinite or low.is_infinite:
        return max((abs(one) for one in value.function.atoms(sympy.Rational)), default=0) <= MAX_SERIES
    return bool(value.function.is_polynomial(index)) and sympy.degree(value.function, index) <= MAX_DEGREE


def _bound(value, digits: float) -> float:
    """An upper bound of |value|, at least 1."""
    if value.is_Rational:
        return max(1.0, float(abs(value))) if digits < 300 else math.inf
    return 10.0**digits if digits < 300 else math.inf
