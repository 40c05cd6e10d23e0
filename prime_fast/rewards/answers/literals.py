r"""Numbers as they are written: integers, decimals, fractions, mixed numbers, scientific notation."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

NOISE = Fraction(1, 10**6)  # by which a number may differ from a truth that is a decimal, relative to a truth below 1
MEASURED_DIGITS = 3  # a decimal truth of so many significant digits may be another number, rounded ...
ROUNDING = Fraction(1, 1000)  # ... if the two differ by no more than this, relative to the truth
MAX_EXPONENT = 5_000

SIGN = r"(?P<sign>[-+]?)\s*"
WHOLE = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+"
POWER = r"\^\s*(?:\{\s*(?P<braced>[-+]?[0-9]{1,5})\s*\}|(?P<bare>[-+]?[0-9]{1,5}))"
DECIMAL = re.compile(
    rf"{SIGN}(?:(?P<whole>{WHOLE})(?P<point>\.(?P<places>[0-9]*))?|\.(?P<only>[0-9]+))"
    rf"(?:\s*\\cdot\s*10\s*{POWER}|[eE](?P<e>[-+]?[0-9]{{1,5}}))?"
)
REPEATING = re.compile(
    rf"{SIGN}(?P<whole>[0-9]*)\.(?P<places>[0-9]*)\\overline\s*(?:\{{\s*(?P<period>[0-9]+)\s*\}}|(?P<digit>[0-9]))"
)
PART = rf"\(?\s*([-+]?\s*(?:{WHOLE})(?:\.[0-9]+)?)\s*\)?"
FRACTION = re.compile(rf"{SIGN}(?:\\frac\s*\{{\s*{PART}\s*\}}\s*\{{\s*{PART}\s*\}}|{PART}\s*/\s*{PART})")
MIXED = re.compile(
    rf"{SIGN}(?P<whole>[0-9]+)(?:\s*\\frac\s*\{{\s*([0-9]+)\s*\}}\s*\{{\s*([0-9]+)\s*\}}|\s+([0-9]+)\s*/\s*([0-9]+))"
)


class Literal(NamedTuple):
    """A number with what its spelling says of its accuracy."""

    value: Fraction
    decimal: bool = False  # it is a decimal that may stand for another number: it has places, or a point and a power
    digits: int = 0  # significant ones, as written
    unit: Fraction = Fraction(0)  # of the last digit


def read(text: str) -> Literal | None:
    """The number that a tidy `text` is; None if it is anything else."""
    if found := DECIMAL.fullmatch(text):
        return _decimal(found)
    if found := MIXED.fullmatch(text):
        over, under = (int(part) for part in found.groups()[2:] if part is not None)
        if 0 < over < under:
            return Literal(_signed(found, int(found["whole"]) + Fraction(over, under)))
        return None
    if found := FRACTION.fullmatch(text):
        over, under = (Fraction(re.sub(r"[\s,]", "", part)) for part in found.groups()[1:] if part is not None)
        return Literal(_signed(found, over / under)) if under else None
    if found := REPEATING.fullmatch(text):
        period = found["period"] or found["digit"]
        start = Fraction(int(found["whole"] + found["places"] or "0"), 10 ** len(found["places"]))
        rest = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(found["places"]))
        return Literal(_signed(found, start + rest))
    return None


def agrees(truth: Literal, value: Fraction) -> bool:
    """Whether `value` is the number that the ground truth stands for."""
    error, size = abs(value - truth.value), max(abs(value), abs(truth.value))
    if error == 0 or not truth.decimal:
        return error == 0
    rounded = truth.digits >= MEASURED_DIGITS and error <= min(truth.unit / 2, ROUNDING * size)
    return rounded or error <= NOISE * min(1, size)


def _decimal(found: re.Match) -> Literal | None:
    whole = re.sub(r"[ ,]", "", found["whole"] or "")
    places = found["places"] or found["only"] or ""
    power = next((power for power in (found["braced"], found["bare"], found["e"]) if power is not None), None)
    exponent = int(power or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    unit = Fraction(10) ** (exponent - len(places))
    value = _signed(found, int(whole + places or "0") * unit)
    scientific = power is not None and bool(places)
    return Literal(value, scientific or value.denominator != 1, len((whole + places).lstrip("0")), unit)


def _signed(found: re.Match, value: Fraction) -> Fraction:
    return -value if found["sign"] == "-" else value
