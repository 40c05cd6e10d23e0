r"""The clauses of docs/rewards.md, in their order. Each says whether an answer says the truth; None: does not apply.

Texts are tidy (`notation.tidy`) wherever they come in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

import sympy

from prime_fast.rewards.answers import expressions, literals, units
from prime_fast.rewards.answers.notation import CLOSE, OPEN, closing_at, peel, split, squeeze, tidy
from prime_fast.rewards.answers.parsing import parse

ANSWER_CHARS = 1_000  # a longer answer is wrong unless it is the ground truth, character by character
MAX_ITEMS = 50
MAX_DEPTH = 6
INTEGER = re.compile(r"-?[0-9]+")


def says(truth: str, answer: str) -> bool:
    """Whether an answer, as it was written, says what the ground truth says."""
    if squeeze(answer).rstrip(".") == squeeze(truth).rstrip(".") != "":
        return True
    if max(len(answer), len(truth)) > ANSWER_CHARS:
        return False
    if INTEGER.fullmatch(truth) and INTEGER.fullmatch(answer):  # most are: no need to look further
        return int(truth) == int(answer)
    return same(tidy(truth), tidy(answer))


def same(truth: str, answer: str, depth: int = 0) -> bool:
    truth, answer = _condition(peel(truth)), _condition(peel(answer))
    if not truth or not answer or depth > MAX_DEPTH:
        return False
    if squeeze(truth) == squeeze(answer) or _same_time(truth, answer):
        return True
    for clause in (choice, collection, relation, brackets, words, quantity, numeral, number):
        verdict = clause(truth, answer, depth + 1)
        if verdict is not None:
            return verdict
    return bool(expressions.equal(truth, answer))


# 1. Multiple choice

LABEL = re.compile(r"(?:(?:option|choice|answer)\s+)?(?:\(([A-J])\)|([A-J])(?:[).:](?=\s|\Z)|\Z))\s*", re.IGNORECASE)
ANOTHER_LABEL = re.compile(
    r"\([A-J]\)|(?<![A-Za-z\\])[A-J](?:[).:]|\Z|(?=\s*,))|\A\s*(?:,|or\b|and\b|/|&|\\text\{\s*(?:or|and))"
)


def choice(truth: str, answer: str, depth: int) -> bool | None:
    """A letter is the option of that letter, with or without what it stands for, and never two of them."""
    (letter, meaning), (chosen, stated) = _labelled(truth), _labelled(answer)
    if letter and re.fullmatch("[a-j]", answer):
        chosen = answer.upper()
    if letter is None and (chosen is None or not stated):
        return None
    if stated and chosen and ANOTHER_LABEL.search(stated):
        return False
    if letter is None:
        return same(truth, stated, depth)
    if chosen is None:
        return bool(meaning) and same(meaning, answer, depth)
    return letter == chosen and (not (meaning and stated) or same(meaning, stated, depth))


def _labelled(text: str) -> tuple[str | None, str]:
    plain = peel(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1 ", text)) if len(text) > 1 else text
    inner = re.fullmatch(r"\(\s*([A-Ja-j])\s*\)\s*", text)
    found = LABEL.match(plain)
    if inner or found is None or (len(plain) == 1 and not plain.isupper()):
        return (inner[1].upper(), "") if inner else (None, "")
    if found.group().strip().islower() and found.end() < len(plain):
        return None, ""
    return (found[1] or found[2]).upper(), plain[found.end() :].strip()


# 2. Several values: lists, sets and unions in any order

CONJUNCTION = re.compile(
    r"\s*,?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\(?:lor|land|vee|wedge)(?![A-Za-z]))\s*"
)
THOUSANDS = re.compile(r"(?<![0-9.,A-Za-z_])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
UNION = re.compile(r"\\cup(?![A-Za-z])\s*")
MEMBER = re.compile(r"([^{}]+?)\\in(?![A-Za-z])\s*(\\\{.*\\\})")
NAMED = re.compile(r"([^=]+)=(.+)")


def collection(truth: str, answer: str, depth: int) -> bool | None:
    r"""As many values on both sides, each saying one of the other. \pm is two values; x = 1, 2 is a list of x."""
    if (ours := _numbered(truth)) and (theirs := _numbered(answer)):
        return ours.keys() == theirs.keys() and all(same(ours[one], theirs[one], depth) for one in ours)
    (name_of_truth, wanted), (name_of_answer, given) = items(truth), items(answer)
    if name_of_truth and name_of_answer and name_of_truth != name_of_answer:
        return False
    if len(wanted) != len(given):  # 100,200 may be one number or two
        wanted, given = _numbers(wanted, len(given)), _numbers(given, len(wanted))
    if len(wanted) == len(given) == 1:
        return None if (wanted, given) == ([truth], [answer]) else same(wanted[0], given[0], depth)
    if len(wanted) == 1 and given and all(same(truth, one, depth) for one in given):
        return True  # one value, given in several ways
    if len(wanted) != len(given):
        return _same_point(wanted, given, depth) if len(given) == 1 else _same_point(given, wanted, depth, named=True)
    if bool(_subjects(wanted)) != bool(_subjects(given)) and len(_subjects(wanted) | _subjects(given)) > 1:
        return False  # 4, 5 does not say which of x = 4, y = 5 is which
    return len(wanted) <= MAX_ITEMS and matched(wanted, given, depth)


def _numbered(text: str) -> dict[str, str]:
    """x_1 = 4, x_2 = 5: the values by name; empty if the text is no list of several such names."""
    if "_" not in text:
        return {}
    found = [NUMBERED.fullmatch(part) for part in split(CONJUNCTION.sub(";", text), ",;")]
    named = {re.sub(r"[{}]", "", squeeze(one[1])): one[2] for one in found if one and "_" in one[1]}
    return named if len(named) == len(found) > 1 else {}


def _subjects(parts: Sequence[str]) -> set[str]:
    """The names of which a list says something."""
    return {squeeze(found[1]) for part in parts if (found := NAMED.fullmatch(part)) and name(found[1])}


def matched(wanted: Sequence[str], given: Sequence[str], depth: int) -> bool:
    left = list(given)
    for one in wanted:
        found = next((other for other in left if same(one, other, depth)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _same_point(several: Sequence[str], point: Sequence[str], depth: int, named: bool = False) -> bool:
    """Whether (x, y) = (4, 5), or unless it must be `named` (4, 5), says x = 4 and y = 5."""
    if len(point) != 1:
        return False
    names, _, values = point[0].rpartition("=")
    coordinates = _bracketed(peel(values)) if values.strip() else None
    pairs = [part.split("=") for part in several]
    if all(re.fullmatch("[A-Za-z]", squeeze(pair[0])) for pair in pairs):
        pairs.sort(key=lambda pair: squeeze(pair[0]))  # a point's coordinates have the order of the alphabet
    if coordinates is None or len(coordinates[1]) != len(several) or any(len(pair) != 2 for pair in pairs):
        return False
    if not names:
        return (
            not named
            and all(SIMPLE_NAME.fullmatch(pair[0]) for pair in pairs)
            and all(same(value, one, depth) for (_, value), one in zip(pairs, coordinates[1], strict=True))
        )
    subjects = _bracketed(peel(names))
    if subjects is None or len(subjects[1]) != len(several):
        return False
    expanded = [f"{one}={value}" for one, value in zip(subjects[1], coordinates[1], strict=True)]
    return matched(several, expanded, depth)


def _numbers(parts: list[str], count: int) -> list[str]:
    """The `count` numbers that one with thousands separators may be instead."""
    several = parts[0].split(",") if len(parts) == 1 else []
    fits = several and len(several) == count and THOUSANDS.fullmatch(parts[0])
    return several if fits and not any(one.startswith("0") for one in several) else parts


def items(text: str) -> tuple[str | None, list[str]]:
    """(the name of which all of them are values, the values that a text lists)"""
    subject, thousands = None, False
    if (found := MEMBER.fullmatch(text)) and name(found[1]):
        subject, text = _family(found[1]), found[2]
    if text.startswith(r"\{") and closing_at(text, 1) == len(text) - 1:
        text, thousands = text[2:-2], True  # in braces a comma always separates
    protected = text if thousands else THOUSANDS.sub(lambda found: found.group().replace(",", ""), text)
    parts = split(CONJUNCTION.sub(";", protected), ",;")
    if len(parts) == 1:
        unions = split(UNION.sub("\0", protected), "\0")
        return subject, [text] if len(unions) == 1 and not _has_both_signs(text) else _signed(unions)
    parts = _signed(parts)
    names = [_family(found[1]) if (found := NAMED.fullmatch(part)) and name(found[1]) else None for part in parts]
    if (
        names
        and names[0]
        and all(one in (names[0], None) for one in names)
        and (None not in names or not any(names[1:]))
    ):
        return names[0], [part.partition("=")[2] if own else part for own, part in zip(names, parts, strict=True)]
    return subject, parts


def _has_both_signs(text: str) -> bool:
    return re.search(r"\\(?:pm|mp)(?![A-Za-z])", text) is not None


def _signed(parts: Sequence[str]) -> list[str]:
    both = []
    for part in parts:
        if _has_both_signs(part):
            both += [part.replace(r"\pm", one).replace(r"\mp", other) for one, other in (("+", "-"), ("-", "+"))]
        else:
            both.append(part)
    return both


def _family(text: str) -> str:
    return re.sub(r"_(?:\{[^{}]*\}|\w)", "", squeeze(text))


# 3. Equations and inequalities

RELATIONS = re.compile(r"\\(?:le|ge|ne|approx|in|equiv)(?![A-Za-z])|[=<>]")
FLIPPED = {">": "<", r"\ge": r"\le"}
GREEK = r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|varphi|omega|rho|sigma|Delta|Omega|ell|epsilon)(?![A-Za-z])"
SYMBOL = rf"(?:[A-Za-z]|{GREEK})'*(?:_(?:\{{[^{{}}]*\}}|\w))?"
SIMPLE_NAME = re.compile(
    rf"\s*(?:{SYMBOL}|\|?[A-Z]{{2,3}}\|?|\\?(?:angle|triangle|overline)\W*[A-Z]+\W*|"
    rf"{SYMBOL}(?:\^\{{?-1\}}?)?\s*\([^()=]*\)|"
    rf"\\text\s*\{{[^{{}}]*\}}|[A-Za-z][A-Za-z' ]+|{SYMBOL}(?::{SYMBOL})+|"
    rf"\\frac\s*\{{[A-Z]{{1,3}}\}}\s*\{{[A-Z]{{1,3}}\}}|\\overline\s*\{{[^{{}}]*\}})\s*"
)
NUMBERED = re.compile(rf"\s*({SYMBOL})\s*=([^=]+)")
NAMES = re.compile(rf"\s*\(\s*{SYMBOL}(?:\s*[,;]\s*{SYMBOL})+\s*\)\s*")
BUILDER = re.compile(rf"\\\{{\s*({SYMBOL})\s*(?:\\in\s*\\mathbb\{{R\}}\s*)?[|:](.*(?:[<>]|\\[lg]e(?![A-Za-z])).*)\\\}}")
EXPONENTS = re.compile(r"[_^]\s*(?:\{[^{}]*\}|\w)|(?<=[A-Za-z])\s*\([^()]*\)")


def _condition(text: str) -> str:
    r"""The inequality in \{x | x > 2\}."""
    found = BUILDER.fullmatch(text)
    return peel(found[2]) if found and closing_at(text, 1) == len(text) - 1 and found[1] in found[2] else text


def relation(truth: str, answer: str, depth: int) -> bool | None:
    """x = 5 says 5; an equation says a multiple of it; likewise an inequality, or the interval that it is."""
    wanted, given = sides(truth), sides(answer)
    if not wanted and not given:
        return None
    wanted, given = (one[0][1] if one and one[1] == [r"\in"] and name(one[0][0]) else one for one in (wanted, given))
    if isinstance(wanted, str) or isinstance(given, str):  # x \in (1, 2) says (1, 2)
        return same(wanted if isinstance(wanted, str) else truth, given if isinstance(given, str) else answer, depth)
    if not wanted:
        return _stated(truth, *given, depth)
    if not given:
        return _value_of(*wanted, answer, depth)
    if wanted[1] == given[1] == ["="] * len(given[1]) or (set(wanted[1]) == set(given[1]) == {"="}):
        return _same_equation(wanted[0], given[0], depth)
    return _same_inequality(wanted, given)


def sides(text: str) -> tuple[list[str], list[str]] | None:
    """([side, ...], [relation, ...]); what is only approximately so is left out; None if there is no relation."""
    found = [match for match in RELATIONS.finditer(text) if _depth(text, match.start()) == 0]
    if not found:
        return None
    starts, ends = [0, *(match.end() for match in found)], [*(match.start() for match in found), len(text)]
    parts, signs = [text[a:b].strip() for a, b in zip(starts, ends, strict=True)], [match.group() for match in found]
    if r"\approx" in signs:
        first = signs.index(r"\approx")
        keep = first + 1 if first or not name(parts[0]) else len(parts)
        if keep == len(parts) or not parts[0]:  # x is about 11: that is all it says
            signs, keep = ["=" if sign == r"\approx" else sign for sign in signs], len(parts)
        parts, signs = parts[:keep], signs[: keep - 1]
    parts = parts[1:] if parts and not parts[0] and set(signs) == {"="} else parts  # = 5
    return parts, signs[len(signs) - len(parts) + 1 :]


def name(text: str) -> bool:
    """Whether a side only names what is said of the other: x, f(2), AB, a + b; no number is part of it."""
    if re.search(r"\b(?:not|never)\b", text):
        return False
    if SIMPLE_NAME.fullmatch(text) or NAMES.fullmatch(text):
        return squeeze(text) not in (r"\pi",)
    bare = EXPONENTS.sub("", text)
    if re.search(r"[0-9\[\]{}:]", re.sub(r"\\(?:frac|sqrt)\s*|[{}]", "", bare)) or not re.search(r"[A-Za-z]", bare):
        return False
    value = parse(text)
    return not expressions.is_number(value) if value is not None else r"\pi" not in text


def _stated(truth: str, parts: list[str], signs: list[str], depth: int) -> bool:
    """Every side of a chain is a name or says the truth, and one does."""
    if set(signs) - {"="}:
        interval = _interval(parts, signs)
        return interval is not None and same(truth, interval, depth)
    said = [part for part in parts if same(truth, part, depth)]
    others = [part for part in parts if part not in said]
    return bool(said) and all(name(part) for part in others)


def _value_of(parts: list[str], signs: list[str], answer: str, depth: int) -> bool:
    """What an answer without a relation has to say: the value that the truth gives to one name."""
    if set(signs) == {"="} and (SIMPLE_NAME.fullmatch(parts[0]) or NAMES.fullmatch(parts[0])):
        return same(parts[-1], answer, depth)
    interval = _interval(parts, signs)
    return interval is not None and same(interval, answer, depth)


def _same_equation(wanted: list[str], given: list[str], depth: int) -> bool:
    subject = squeeze(wanted[0])
    if SIMPLE_NAME.fullmatch(wanted[0]) or NAMES.fullmatch(wanted[0]):
        others = [side for side in given if squeeze(side) != subject]
        if len(others) == len(given) - 1:
            return all(same(wanted[-1], side, depth) for side in others)
    if len(wanted) != 2 or len(given) != 2:
        return False
    return bool(expressions.proportional(*(_difference(*pair) for pair in (wanted, given))))


def _same_inequality(wanted: tuple, given: tuple) -> bool:
    ours, theirs = (_pairs(*one) for one in (wanted, given))
    if len(ours) != len(theirs):
        return False
    for sign, small, large in ours:
        found = next((pair for pair in theirs if pair[0] == sign and _same_order(sign, (small, large), pair[1:])), None)
        if found is None:
            return False
        theirs.remove(found)
    return True


def _same_order(sign: str, one: tuple[str, str], other: tuple[str, str]) -> bool:
    if list(map(squeeze, one)) == list(map(squeeze, other)):
        return True
    differences = [_difference(*pair) for pair in (one, other)]
    return expressions.proportional(*differences, positive=sign in ("<", r"\le"))


def _pairs(parts: list[str], signs: list[str]) -> list[tuple[str, str, str]]:
    pairs = []
    for one, sign, other in zip(parts, signs, parts[1:], strict=False):
        pairs.append((FLIPPED[sign], other, one) if sign in FLIPPED else (sign, one, other))
    return pairs


def _difference(one: str, other: str):
    values = parse(one), parse(other)
    return values[0] - values[1] if all(isinstance(value, sympy.Expr) for value in values) else None


def _interval(parts: list[str], signs: list[str]) -> str | None:
    r"""x < 3 as (-\infty, 3), 1 < x \le 2 as (1, 2]."""
    pairs = _pairs(parts, signs)
    if not 1 <= len(pairs) <= 2 or any(sign not in ("<", r"\le") for sign, *_ in pairs):
        return None
    pairs = sorted(pairs, key=lambda pair: bool(SIMPLE_NAME.fullmatch(pair[1])))
    (opening, low, subject), (closing, _, high) = pairs[0], pairs[-1]
    if len(pairs) == 1:
        if SIMPLE_NAME.fullmatch(low) and not SIMPLE_NAME.fullmatch(subject):
            return rf"(-\infty ,{subject}{')' if closing == '<' else ']'}"
        return rf"{'(' if opening == '<' else '['}{low},\infty )" if SIMPLE_NAME.fullmatch(subject) else None
    if not SIMPLE_NAME.fullmatch(subject) or squeeze(pairs[-1][1]) != squeeze(subject):
        return None
    return f"{'(' if opening == '<' else '['}{low},{high}{')' if closing == '<' else ']'}"


def _depth(text: str, end: int) -> int:
    return sum((sign in OPEN) - (sign in CLOSE) for sign in text[:end])


# 4. Points, vectors and intervals


def brackets(truth: str, answer: str, depth: int) -> bool | None:
    """The same brackets, and in them as many values, each saying the one at its place."""
    wanted, given = _bracketed(truth), _bracketed(answer)
    if squeeze(truth) in REALS and squeeze(answer) in REALS:
        return True
    if wanted is None and given is None:
        return None
    if wanted is None or given is None:
        return False
    (kind, coordinates), (form, values) = wanted, given
    if len(coordinates) != len(values) or (kind != form and len(values) == 2):
        return False
    return all(same(one, other, depth) for one, other in zip(coordinates, values, strict=True))


REALS = (
    *(r"(-\infty,\infty)", r"(-\infty,+\infty)", r"\mathbb{R}", r"\text{allrealnumbers}", "allrealnumbers"),
    *(r"\text{Allrealnumbers}", "Allrealnumbers", r"\text{allreals}", r"\text{realnumbers}"),
)


def _bracketed(text: str) -> tuple[str, list[str]] | None:
    if text[0] in "([" and closing_at(text, 0) == len(text) - 1 and text[-1] in ")]":
        parts = split(text[1:-1], ",;")
        return (text[0] + text[-1], parts) if len(parts) > 1 else None
    return None


# 5. Words

PRODUCT = re.compile(r"[A-Za-z]|[a-dk-np-tv-z]{2}|[b-df-hj-np-tv-z]{2}|[a-z][A-Z]|[B-DF-HJ-NP-TV-Z][b-df-hj-np-tv-z]")
WORDS = re.compile(r"(?:[A-Za-z]{2,}(?:-[A-Za-z]{2,}|'[A-Za-z]+)*|[A-Za-z](?=\s+[A-Za-z]{2}))(?:\s+[A-Za-z'-]+)*")


def words(truth: str, answer: str, depth: int) -> bool | None:
    """Words are compared as words, whatever their case; two letters may be a product."""
    wanted, given = (_plain(text) for text in (truth, answer))
    if not WORDS.fullmatch(wanted) or _is_product(truth):
        return None if not (WORDS.fullmatch(given) and len(given) > 2 and literals.read(truth)) else False
    if re.fullmatch("[A-Z]{2}", truth):  # a line from A to B
        return wanted == given
    return wanted.casefold() == given.casefold()


def _is_product(text: str) -> bool:
    """Unknowns: a letter alone, or two that are no word, name or line."""
    return PRODUCT.fullmatch(text) is not None


def _plain(text: str) -> str:
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\A(?:an?|the)\s+", "", re.sub(r"\s+", " ", text).strip(), flags=re.IGNORECASE)


# 6. Units and percentages


def quantity(truth: str, answer: str, depth: int) -> bool | None:
    """A unit that only one side has is left out; two must measure the same. 50% is 1/2, or 50 where that is asked."""
    (wanted, unit), (given, stated) = units.cut(truth), units.cut(answer)
    if (wanted, given) == (truth, answer):
        return None
    if unit is None or stated is None:
        if unit == units.PERCENT and stated is None:
            wanted = rf"\frac{{{wanted}}}{{100}}"
        elif stated == units.PERCENT and (bare := literals.read(wanted)) and abs(bare.value) <= 1:
            given = rf"\frac{{{given}}}{{100}}"
        return same(wanted, given, depth)
    if unit.words or stated.words:
        return bool(unit.words & stated.words) and same(wanted, given, depth)
    if unit.powers != stated.powers:
        return False
    factor = stated.factor / unit.factor
    if factor != 1:
        value = literals.read(given)
        given = (
            str(value.value * factor)
            if value
            else rf"({given})\cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}"
        )
    return same(wanted, given, depth)


# 7. Numbers in a base, and what has a colon

NUMERAL = re.compile(r"\(?([0-9]+)\)?\s*_\s*(?:\{\s*(?:\\text\s*\{)?\s*([0-9]+|[a-z]+)\s*\}*|([0-9]))")
NAMES_OF_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}


def numeral(truth: str, answer: str, depth: int) -> bool | None:
    """12_3 is 12_3; a base that only one side gives is left out."""
    if ":" in truth or ":" in answer:  # times and ratios
        return False
    wanted, given = (NUMERAL.fullmatch(text) for text in (truth, answer))
    if wanted is None and given is None:
        return None
    digits = [found[1] if found else squeeze(text) for found, text in ((wanted, truth), (given, answer))]
    bases = {
        str(NAMES_OF_BASES.get(base, base)) for base in (found[2] or found[3] for found in (wanted, given) if found)
    }
    fits = all(
        base.isdigit() and all(int(digit) < int(base) for digit in digits[0]) for base in bases if digits[0].isdigit()
    )
    return digits[0] == digits[1] and len(bases) == 1 and fits


CLOCK = re.compile(r"([0-9]{1,2}:[0-9]{2})\s*(?:\\text\s*\{\s*)?([AaPp])\.?\s*[Mm]\.?\s*\}?")


def _same_time(truth: str, answer: str) -> bool:
    """4:30 p.m. is 4:30 PM."""
    wanted, given = CLOCK.fullmatch(truth), CLOCK.fullmatch(answer)
    return bool(wanted and given) and (wanted[1], wanted[2].lower()) == (given[1], given[2].lower())


# 8. Numbers


def number(truth: str, answer: str, depth: int) -> bool | None:
    """Equal; a truth that is a decimal may be another number rounded."""
    wanted = literals.read(truth)
    if wanted is None:
        return None
    given = literals.read(answer)
    if given is None and not wanted.decimal:
        return None
    value: Fraction | None = given.value if given else expressions.number(answer)
    return value is not None and literals.agrees(wanted, value)
