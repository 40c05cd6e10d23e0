"""What asserts compute on values of programs, as `compare.read_value` makes them: cheap, whatever these are."""

import ast
import math
import operator
from functools import partial
from typing import Any

from prime_fast.rewards.compare import Map, Set, as_set, key, same_value

MAX_BITS, MAX_POWER, MAX_RANGE = 1 << 16, 64, 1 << 20  # of numbers of a program's that are computed with


def as_list(*items):
    return list(items)


def as_tuple(*items):
    return items


def both(*values):
    return all(map(bool, values))


def either(*values):
    return any(map(bool, values))


def negation(value):
    return not value


def bounded(function):
    """Arithmetic that may be given a program's values: on numbers of a sensible size, and on sequences a sum."""

    def compute(left, right):
        if function is operator.add and type(left) is type(right) and isinstance(left, str | list | tuple):
            return left + right
        left, right = _small(left), _small(right)
        if function is operator.pow and abs(right) > MAX_POWER:
            raise OverflowError("a power beyond what is computed")
        return function(left, right)

    return compute


class Each(list):
    """What is true of each item, and of the whole of them, as in numpy, only where there is one."""

    def __bool__(self):
        if len(self) != 1:
            raise TypeError(f"the truth of {len(self)} items: ask for all(...)")
        return bool(self[0])


def _same(found, expected):
    return same_value(found, expected, strict=True)


def _is(left, right):
    """`is` of what there is one of; of anything else, equality."""
    return left is right if isinstance(right, bool | type | None) else _same(left, right)


def _in(item, items, same=_same):
    if isinstance(items, str):
        return isinstance(item, str) and item in items
    if isinstance(items, Set | Map):
        return key(item) in items
    return any(same(item, one) for one in _items(items))


def _either(one, other):
    """Of two values of the program's, or lists that hold some: exact where either side is."""
    return _same(one, other) and _same(other, one)


def _not(function):
    return lambda left, right: not function(left, right)


def _turned(function):
    """Who is compared with decides about the tolerance: where that stands on the left, the sides are exchanged."""
    return lambda left, right: function(right, left)


def _ordered(function):
    def compare(left, right):
        if not all(isinstance(one, int | float | str | list | tuple) for one in (left, right)):
            raise TypeError("these have no order here")
        return function(left, right)

    return compare


def _number(value: Any) -> int | float:
    if not isinstance(value, int | float):
        raise TypeError(f"a {type(value).__name__} is no number")
    return value


def _small(value: Any) -> int | float:
    if isinstance(_number(value), int) and value.bit_length() > MAX_BITS:
        raise OverflowError("a number beyond what is computed with")
    return value


def _items(value: Any) -> Any:
    if isinstance(value, Set):
        return list(value.values())
    if isinstance(value, Map):
        return [item for item, _ in value.values()]
    if isinstance(value, str | list | tuple) or hasattr(value, "__next__"):
        return value
    raise TypeError(f"a {type(value).__name__} has no items")


def _all(items):
    return all(map(bool, _items(items)))


def _any(items):
    return any(map(bool, _items(items)))


def _bool(value):
    return bool(value)


def _min(*values):
    return min(_items(values[0]) if len(values) == 1 else values)


def _max(*values):
    return max(_items(values[0]) if len(values) == 1 else values)


def _text(value):
    if not (value is None or isinstance(value, int | float | str)):
        raise TypeError(f"the text of a {type(value).__name__} is not computed")
    return str(value)


def _range(*bounds):
    found = range(*bounds)
    if len(found) > MAX_RANGE:
        raise OverflowError("a range beyond what is computed")
    return list(found)


def _isclose(a, b, *, rel_tol=1e-9, abs_tol=0.0):
    return math.isclose(_number(a), _number(b), rel_tol=rel_tol, abs_tol=abs_tol)


def _np_isclose(a, b, rtol=1e-5, atol=1e-8, equal_nan=False):
    """numpy's, of numbers, of lists of one shape, or of a list and a number; an empty list has none to compare with."""
    match [isinstance(one, list | tuple) for one in (a, b)]:
        case [True, True]:
            if len(a) != len(b) or [isinstance(x, list | tuple) for x in a] != [isinstance(x, list | tuple) for x in b]:
                raise TypeError("these are of two shapes")
            return Each(_np_isclose(x, y, rtol, atol, equal_nan) for x, y in zip(a, b, strict=True))
        case [True, False] if a:
            return Each(_np_isclose(x, b, rtol, atol, equal_nan) for x in a)
        case [False, True] if b:
            return Each(_np_isclose(a, y, rtol, atol, equal_nan) for y in b)
    a, b = _number(a), _number(b)
    if math.isnan(a) or math.isnan(b):
        return equal_nan and math.isnan(a) and math.isnan(b)
    return a == b or (math.isfinite(a) and math.isfinite(b) and abs(a - b) <= atol + rtol * abs(b))


def _allclose(a, b, rtol=1e-5, atol=1e-8, equal_nan=False):
    return _every(_np_isclose(a, b, rtol, atol, equal_nan))


def _every(found):
    return all(map(_every, found)) if isinstance(found, Each) else found


def _np_all(items):
    return _every(items) if isinstance(items, Each) else _all(items)


def _array(items):
    if not isinstance(items, list | tuple):
        raise TypeError(f"a {type(items).__name__} is no array here")
    return items


def _array_equal(a, b):
    return same_value(a, b) and same_value(b, a)


TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "tuple": tuple, "set": Set, "dict": Map}
NUMBERS = {"math.pi": math.pi, "math.e": math.e, "math.inf": math.inf, "math.nan": math.nan}
NUMBERS |= {f"{np}.{name}": getattr(math, name) for np in ("np", "numpy") for name in ("pi", "e", "inf", "nan")}
JUDGES = {
    "abs": lambda x: abs(_number(x)),
    "round": lambda number, ndigits=None: round(_number(number), ndigits),
    "len": lambda items: len(items),
    "sum": lambda items, start=0: sum(map(_number, _items(items)), start),
    "min": _min,
    "max": _max,
    "sorted": lambda items, reverse=False: sorted(_items(items), reverse=reverse),
    "list": lambda items=(): list(_items(items)),
    "tuple": lambda items=(): tuple(_items(items)),
    "set": lambda items=(): as_set(_items(items)),
    "frozenset": lambda items=(): as_set(_items(items)),
    "range": _range,
    "all": _all,
    "any": _any,
    "bool": _bool,
    "int": lambda x=0: int(x if isinstance(x, str) else _number(x)),
    "float": lambda x=0.0: float(x if isinstance(x, str) else _number(x)),
    "str": _text,
    "type": lambda value: type(value),
    "isinstance": lambda value, kinds: isinstance(value, kinds),
    "math.isclose": _isclose,
    "isclose": _isclose,
}
for np in ("np", "numpy"):
    JUDGES |= {f"{np}.array": _array, f"{np}.all": _np_all}
    JUDGES |= {f"{np}.allclose": _allclose, f"{np}.isclose": _np_isclose, f"{np}.array_equal": _array_equal}
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
UNARY = {ast.Not: negation, ast.USub: lambda x: -_number(x), ast.UAdd: lambda x: +_number(x)}
COMPARISONS = {  # of what was found with what is expected
    ast.Eq: _same,
    ast.NotEq: _not(_same),
    ast.Is: _is,
    ast.IsNot: _not(_is),
    ast.In: _in,
    ast.NotIn: _not(_in),
    ast.Lt: _ordered(operator.lt),
    ast.LtE: _ordered(operator.le),
    ast.Gt: _ordered(operator.gt),
    ast.GtE: _ordered(operator.ge),
}
SWAPPED = {op: _turned(COMPARISONS[op]) for op in (ast.Eq, ast.NotEq, ast.Is, ast.IsNot)}  # expected with found
SWAPPED[ast.In] = partial(_in, same=_turned(_same))
SWAPPED[ast.NotIn] = _not(SWAPPED[ast.In])
MIXED = {ast.Eq: _either, ast.NotEq: _not(_either)}  # of values of the program's
TRUTHS = (negation, both, either, _all, _np_all, _any, _bool)  # what asks of a value only whether it is true


def only_truths(value: Any) -> bool:
    """Whether who finds such a value may as well guess it."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(only_truths, value))
    return value is None or isinstance(value, bool)
