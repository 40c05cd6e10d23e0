r"""Formulas: math-verify reads them, and what they say is compared exactly.

Two numbers are equal if their difference is zero to as many digits as it takes, two formulas with unknowns if they have
the same unknowns and are equal wherever they are evaluated. math-verify's own comparison decides where neither is
possible (functions without a definition, sets). Derivatives and integrals are not read.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, wraps
from itertools import accumulate

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify
from math_verify.parser import should_treat_as_complex
from sympy.core.function import AppliedUndef

from prime_fast.rewards.answers.notation import closing_at

MAX_DIGITS = 10_000  # of a number on the way to a value; what may be larger is not evaluated
MAX_CHARS = 400  # of a formula
MAX_NODES = 2_000
MAX_TERMS, MAX_UNKNOWN_TERMS = 1_000, 50  # of a sum or product, and of one with unknowns
MAX_SUMMED_DIGITS = 20_000  # terms times digits
MAX_DEGREE, MAX_SERIES = 5, 4  # of what is summed to an unknown end; the largest number in an infinite sum
MAX_SUBSCRIPTS = 40
MAX_NESTING = 12  # of brackets, and bars: each level costs the parser some multiple of the one outside
PRECISION = 200  # digits to which the difference of two numbers is followed
POINT_PRECISION = 30  # and that of formulas at a point
MIN_POINTS = 3
POINTS = [Fraction(*pair) for pair in ((7, 5), (13, 11), (3, 7), (-5, 3), (17, 6), (-11, 13), (23, 9), (-19, 4))]

NORMAL = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
)
CASES = ConversionConfig(lowercase_symbols=False)  # R is not r
COMMANDS = """
    frac sqrt pi infty cdot binom sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp lg alpha
    beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi
    chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega lfloor rfloor lceil rceil begin end sum prod int 
    degree overline mathbb emptyset varnothing ell max min gcd operatorname
""".split()  # noqa: SIM905
FORBIDDEN = re.compile(
    r"[0-9]\s*_|[?@#\"';:=<>~!](?<!!)|[^\x00-\x7f]|\\\\(?!.*matrix)|[0-9]\s+[0-9]|[0-9]\.(?![0-9])|\.\.|__|"
    r"(?<![A-Za-z\\])[fghFGH]\s*\^\s*(?:\{\s*-\s*1\s*\}|-\s*1)\s*\(|"  # an inverse function, read as one over it
    r"\^\s*\{?\s*\(|"  # x^{(1)}, read as x
    r"[({][^(){}]*[0-9],[0-9][^(){}]*\}"  # 1,0 for 10
)
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,]|\.[0-9])")
COMPUTED = re.compile(r"\\(?:(?P<binom>binom)|gcd)(?![A-Za-z])")  # as it is read, however large
SMALL_POWER = re.compile(r"(?<=[A-Za-z])\^(?:[0-9]|\{[0-9]\})(?![0-9^])")
# A current is not i, ^T no transposition that is dropped, gamma no constant and d no differential: symbols like others,
# by names that no formula has, as COMMANDS lacks them
RENAMED = {"I": r"\Upsilon ", "T": r"\Xi ", r"\gamma": r"\varsigma ", r"\Gamma": r"\varpi ", "d": r"\varrho "}
TOKEN = re.compile(r"\\Gamma(?![A-Za-z])(?!\s*\()|\\[A-Za-z]+|[IT]|d(?![A-Za-z])")

logging.getLogger("math_verify").setLevel(logging.ERROR)


def _where_possible(function: Callable) -> Callable:
    """What SymPy cannot compute, of which it has many words, is not equal to anything."""

    @wraps(function)
    def tried(*arguments, **options):
        try:
            return function(*arguments, **options)
        except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError, RecursionError):
            return None

    return tried


@_where_possible
def equal(truth: str, answer: str) -> bool | None:
    one, other = parse(truth), parse(answer)
    return one is not None and other is not None and same(one, other)


@lru_cache(maxsize=512)
@_where_possible
def parse(text: str):
    """A tidy text as a SymPy object, decimals as fractions; None if math-verify cannot read it or it is too big."""
    if "(" not in text:  # where a comma may part arguments
        text = THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    if (
        len(text) > MAX_CHARS
        or FORBIDDEN.search(re.sub(r"_\{\s*[A-Za-z]\s*=", "_{", text))
        or not _known_commands(text)
        or max(_nesting(text), text.count("|")) > MAX_NESTING
        or text.count("_") > MAX_SUBSCRIPTS
        or _stacked(text)
        or _computes(text)
    ):
        return None
    if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)[^A-Za-z]*\\degree", text):
        text = re.sub(r"([0-9.]+)\s*\\degree\s*", r"(\\frac{\1\\pi}{180})", text)
    if r"\degree" in text:
        return None
    text = re.sub(r"(?<![\^_0-9.])([0-9]+(?:\.[0-9]+)?)\s*\(", r"\1\\cdot (", text)  # 2(3) is no mixed number
    if not re.search(r"\\int(?![A-Za-z])|\\frac\s*\{\s*d", text):
        text = TOKEN.sub(_renamed, text)
    found = _read(text)
    return _exact(found) if isinstance(found, sympy.Basic | sympy.MatrixBase) else None


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


@_where_possible
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


@_where_possible
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


def _read(text: str):
    """As math-verify reads it, but for the case of letters; None where it cannot, of which it has many words."""
    try:
        real = not should_treat_as_complex(text)
        return latex2sympy(text, is_real=real, normalization_config=NORMAL, conversion_config=CASES)
    except Exception:
        return None


def _stacked(text: str) -> bool:
    """An exponent on an exponent without braces, which LaTeX refuses and math-verify reads as it likes."""
    for found in re.finditer(r"\^\s*", text):
        end = found.end()
        if text[end : end + 1] == "{":
            end = closing_at(text, end) or end
        if text[end + 1 :].lstrip().startswith("^"):
            return True
    return False


def _computes(text: str) -> bool:
    """A number that may be large in what is computed while it is read."""
    for found in COMPUTED.finditer(text):
        end, parts = found.end(), []
        for opening in ("{", "{") if found["binom"] else ("(",):
            start = re.compile(rf"\s*\{opening}").match(text, end)
            close = start and closing_at(text, start.end() - 1)
            if not close:
                return True
            parts.append(SMALL_POWER.sub("", text[start.end() : close]).strip())
            end = close + 1
        known = all(re.fullmatch(r"[0-9]{1,4}", part) for part in parts)
        if not known and any(re.search(r"\^|!|[0-9]{3}|\\(?:prod|sum)", part) for part in parts):
            return True
        if not found["binom"] and re.search(r"[A-Za-z]", parts[0]):
            return True  # of unknowns it is 1
    return False


def _renamed(found: re.Match) -> str:
    plain = found[0] == r"\Gamma" and found.string[found.end() :].lstrip().startswith("(")
    return found[0] if plain else RENAMED.get(found[0], found[0])


def _nesting(text: str) -> int:
    return max(accumulate((sign in "([{") - (sign in ")]}") for sign in text), default=0)


def _known_commands(text: str) -> bool:
    words = re.findall(r"\\([A-Za-z]+)", text)
    return all(
        word in COMMANDS or any(word == name + word[-1] for name in ("cot", "sin", "cos", "tan")) for word in words
    )


def _exact(value):
    """Decimals become fractions, i the imaginary unit and symbols real; evaluated where that is no great work."""
    try:
        if isinstance(value, sympy.MatrixBase):
            cells = [_exact(cell) for cell in value]
            return None if any(cell is None for cell in cells) else sympy.ImmutableMatrix(*value.shape, cells)
        if sum(1 for _ in sympy.preorder_traversal(value)) > MAX_NODES or value.has(sympy.Derivative, sympy.Integral):
            return None
        _digits(value)
        floats = {atom: sympy.Rational(str(atom)) for atom in value.atoms(sympy.Float)}
        symbols = {
            symbol: sympy.I if symbol.name == "i" else sympy.Symbol(symbol.name, real=True)
            for symbol in value.free_symbols
            if isinstance(symbol, sympy.Symbol)
        }
        value = value.xreplace(floats | symbols).doit()
        return None if any(one.has(sympy.oo) for one in value.atoms(sympy.Sum, sympy.Product)) else value
    except TooBig:
        return None


class TooBig(Exception):
    """An expression whose value would have more than MAX_DIGITS digits on the way."""


def _digits(value) -> float:
    """An upper bound of the digits of a value and of all that is computed for it; TooBig past MAX_DIGITS."""
    if value.is_Number:
        if not value.is_finite:
            return 1.0
        over, under = (abs(part) for part in sympy.Rational(value).as_numer_denom())
        digits = float(max(int(over).bit_length(), int(under).bit_length())) * math.log10(2)
    elif isinstance(value, sympy.Sum | sympy.Product):
        digits = _digits(value.function) + 10
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
        parts = [_digits(part) for part in value.args if isinstance(part, sympy.Basic)]
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
