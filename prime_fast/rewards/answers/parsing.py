r"""Formulas are read as math-verify reads them, but for what it loses or computes on the way.

Derivatives and integrals are not read, nor what is too big (`bounds`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import lru_cache, wraps
from itertools import accumulate

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify.parser import should_treat_as_complex

from prime_fast.rewards.answers.bounds import digits_of
from prime_fast.rewards.answers.notation import closing_at

MAX_CHARS = 400  # of a formula
MAX_NODES = 2_000
MAX_SUBSCRIPTS = 40
MAX_NESTING = 12  # of brackets, and bars: each level costs the parser some multiple of the one outside

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
    r"[A-Za-z]\s*\^\s*\{\s*\(\s*[0-9A-Za-z]+\s*\)\s*\}|"  # x^{(1)}, a derivative, read as x
    r"[({][^(){}]*[0-9],[0-9][^(){}]*\}"  # 1,0 for 10
)
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,]|\.[0-9])")
COMPUTED = re.compile(r"\\(?:(?P<binom>binom)|gcd)(?![A-Za-z])")  # as it is read, however large
SMALL_POWER = re.compile(r"(?<=[A-Za-z])\^(?:[0-9]|\{[0-9]\})(?![0-9^])")
# A current is not i, ^T no transposition that is dropped, gamma no constant and d no differential: symbols like others,
# by names that no formula has, as COMMANDS lacks them
RENAMED = {"I": r"\Upsilon ", "T": r"\Xi ", r"\gamma": r"\varsigma ", r"\Gamma": r"\varpi ", "d": r"\varrho "}
TOKEN = re.compile(r"\\Gamma\s*\(|\\[A-Za-z]+|[IT]|d(?![A-Za-z])")  # with an argument it is the function

logging.getLogger("math_verify").setLevel(logging.ERROR)


def where_possible(function: Callable) -> Callable:
    """What SymPy cannot compute, of which it has many words, or `bounds` does not allow, is not equal to anything."""

    @wraps(function)
    def tried(*arguments, **options):
        try:
            return function(*arguments, **options)
        except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError, RecursionError):
            return None

    return tried


@lru_cache(maxsize=512)
@where_possible
def parse(text: str):
    """A tidy text as a SymPy object, decimals as fractions; None if math-verify cannot read it or it is too big."""
    text = THOUSANDS.sub(_joined, text)
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
        text = TOKEN.sub(lambda found: RENAMED.get(found[0], found[0]), text)
    found = _read(text)
    return _exact(found) if isinstance(found, sympy.Basic | sympy.MatrixBase) else None


def _joined(found: re.Match) -> str:
    """Without its commas, but in parentheses, where they may part arguments."""
    before = found.string[: found.start()]
    return found[0] if before.count("(") > before.count(")") else found[0].replace(",", "")


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
        known = all(re.fullmatch(r"[0-9]{1,4}(?:\s*[-+,]\s*[0-9]{1,4}){0,3}", part) for part in parts)
        if not known and any(re.search(r"\^|!|[0-9]{3}|\\(?:prod|sum)", part) for part in parts):
            return True
        if not found["binom"] and re.search(r"[A-Za-z]", parts[0]):
            return True  # of unknowns it is 1
    return False


def _nesting(text: str) -> int:
    return max(accumulate((sign in "([{") - (sign in ")]}") for sign in text), default=0)


def _known_commands(text: str) -> bool:
    words = re.findall(r"\\([A-Za-z]+)", text)
    return all(
        word in COMMANDS or any(word == name + word[-1] for name in ("cot", "sin", "cos", "tan")) for word in words
    )


def _exact(value):
    """Decimals become fractions, i the imaginary unit and symbols real; evaluated where that is no great work."""
    if isinstance(value, sympy.MatrixBase):
        cells = [_exact(cell) for cell in value]
        return None if any(cell is None for cell in cells) else sympy.ImmutableMatrix(*value.shape, cells)
    if sum(1 for _ in sympy.preorder_traversal(value)) > MAX_NODES or value.has(sympy.Derivative, sympy.Integral):
        return None
    digits_of(value)
    floats = {atom: sympy.Rational(str(atom)) for atom in value.atoms(sympy.Float)}
    symbols = {
        symbol: sympy.I if symbol.name == "i" else sympy.Symbol(symbol.name, real=True)
        for symbol in value.free_symbols
        if isinstance(symbol, sympy.Symbol)
    }
    value = value.xreplace(floats | symbols).doit()
    return None if any(one.has(sympy.oo) for one in value.atoms(sympy.Sum, sympy.Product)) else value
