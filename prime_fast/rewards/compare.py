"""Whether what a program answered equals what was expected. The answer is hostile: every comparison takes linear time.

A value of a program arrives as JSON (`guest.encode`) and is read into plain data that has no methods of the program's:
numbers, text, lists, tuples, iterators, and Set and Map, which find their members by text, as Python hashes text with a
secret but numbers without: a program could choose numbers that all collide.
"""

import math
import re
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from typing import Any

REL_TOL = 1e-5  # of a decimal
WHOLE_TOL, WHOLE_REL_TOL = 1e-5, 1e-12  # of a decimal that is a whole number: 2.0 is not 3.0, however large both are
ZERO_TOL = 1e-8  # of 0.0
NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*+)(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")


class Set(dict):
    """key(item) -> item."""


class Map(dict):
    """key(item) -> (item, its value)."""


class Opaque:
    """What was no plain data: nothing can be said of it but that it is there."""

    def __eq__(self, other):
        raise TypeError("an object's equality is only its own word")

    def __bool__(self):
        raise TypeError("an object's truth is only its own word")

    __hash__ = None


def same_text(output: str, expected: str) -> bool:
    """Line by line, word by word; blank lines and spacing do not count. Whole numbers must be equal (1.0 and 1e0 are 1,
    01 is none); what was expected as a decimal may be off by the tolerances above."""
    if output == expected:
        return True
    found, wanted = ([line.split() for line in text.splitlines() if line.strip()] for text in (output, expected))
    if len(found) != len(wanted):
        return False
    return all(
        len(ours) == len(theirs) and all(map(_same_word, ours, theirs))
        for ours, theirs in zip(found, wanted, strict=True)
    )


def same_value(found: Any, expected: Any, strict: bool = False) -> bool:
    """Equality with tolerance where a float was expected; `strict`: a list is no tuple.

    Raises TypeError where it takes the word of an object of the program's.
    """
    return _same(plain(found), plain(expected), strict)


def read_value(value: Any) -> Any:
    """A value as `guest.encode` made it, or anything in its place; ValueError, TypeError, KeyError if it is not one."""
    if isinstance(value, list):
        return [read_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "tuple":
            return tuple(map(read_value, content))
        case "set":
            return as_set(map(read_value, content))
        case "dict":
            return as_map((read_value(item), read_value(its)) for item, its in content)
        case "int":
            return int(content, 16)
        case "iterator":
            return iter([read_value(item) for item in content])
        case "object":
            return Opaque()
    raise ValueError(f"a value of kind {kind!r:.60}")


def plain(value: Any) -> Any:
    """Python's sets and dicts as Set and Map, all the way down."""
    if isinstance(value, Set | Map):
        return value
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    if isinstance(value, set | frozenset):
        return as_set(map(plain, value))
    if isinstance(value, dict):
        return as_map((plain(item), plain(its)) for item, its in value.items())
    return value


def as_set(items) -> Set:
    return Set((key(item), item) for item in items)


def as_map(pairs) -> Map:
    return Map((key(item), (item, its)) for item, its in pairs)


def key(value: Any) -> Any:
    """Something hashable that is the same for equal values, and whose hash nobody can foretell."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return f"{value:x}"
    if isinstance(value, str):
        return "s" + value
    if isinstance(value, tuple):
        return tuple(map(key, value))
    if isinstance(value, Set):
        return frozenset(value)
    if value is None or isinstance(value, float):
        return repr(value)
    raise TypeError(f"a {type(value).__name__} cannot be in a set or a key")


def _same(found: Any, expected: Any, strict: bool) -> bool:
    if isinstance(expected, list | tuple):
        alike = type(found) is type(expected) if strict else isinstance(found, list | tuple)
        return alike and len(found) == len(expected) and all(map(_same, found, expected, [strict] * len(found)))
    if isinstance(expected, Set):
        return isinstance(found, Set) and found.keys() == expected.keys()
    if isinstance(expected, Map):
        same = isinstance(found, Map) and found.keys() == expected.keys()
        return same and all(_same(found[name][1], expected[name][1], strict) for name in expected)
    if isinstance(expected, float):
        return isinstance(found, int | float) and _close(found, expected)
    return bool(found == expected)


def _same_word(found: str, expected: str) -> bool:
    if found == expected:
        return True
    if not (NUMBER.fullmatch(found) and NUMBER.fullmatch(expected)):
        return found.casefold() == expected.casefold() == "nan"
    ours, theirs = (not set(word) & set(".eE") for word in (found, expected))  # whole numbers
    if ours and theirs:
        return found.lstrip("+") == expected.lstrip("+")
    with suppress(InvalidOperation):  # an exponent beyond all bounds
        if Decimal(found) == Decimal(expected):
            return True
    return not theirs and _close(float(found), float(expected))


def _close(found: float, expected: float) -> bool:
    if math.isnan(expected):
        return math.isnan(found)
    if math.isinf(expected):
        return found == expected
    if expected == 0:
        return abs(found) <= ZERO_TOL
    if expected.is_integer():
        return math.isclose(found, expected, rel_tol=WHOLE_REL_TOL, abs_tol=WHOLE_TOL)
    return math.isclose(found, expected, rel_tol=REL_TOL)
