r"""Units behind and before numbers: which text is one, and when two are the same quantity."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from prime_fast.rewards.answers import literals

PREFIXES = {"p": -12, "n": -9, "µ": -6, "μ": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9}
METRIC = (
    "m",
    "g",
    "s",
    "A",
    "K",
    "mol",
    "L",
    "l",
    "J",
    "N",
    "W",
    "V",
    "C",
    "Hz",
    "Pa",
    "eV",
    "T",
    "F",
    "Wb",
    "H",
    "cal",
)
SAME = {"l": "L"}
WORDS = {  # name: (how many, of what)
    **dict.fromkeys(("meter", "metre"), (1, "m")),
    **dict.fromkeys(("kilometer", "kilometre"), (1000, "m")),
    **dict.fromkeys(("centimeter", "centimetre"), (Fraction(1, 100), "m")),
    **dict.fromkeys(("millimeter", "millimetre"), (Fraction(1, 1000), "m")),
    **dict.fromkeys(("inch", "inche", "in"), (1, "inch")),
    **dict.fromkeys(("foot", "feet", "ft"), (12, "inch")),
    **dict.fromkeys(("yard", "yd"), (36, "inch")),
    **dict.fromkeys(("mile", "mi"), (63360, "inch")),
    "gram": (1, "g"),
    "kilogram": (1000, "g"),
    "milligram": (Fraction(1, 1000), "g"),
    **dict.fromkeys(("pound", "lb"), (16, "ounce")),
    **dict.fromkeys(("ounce", "oz"), (1, "ounce")),
    **dict.fromkeys(("second", "sec"), (1, "s")),
    **dict.fromkeys(("minute", "min"), (60, "s")),
    **dict.fromkeys(("hour", "hr", "h"), (3600, "s")),
    "day": (86400, "s"),
    "week": (604800, "s"),
    "month": (1, "month"),
    **dict.fromkeys(("year", "yr"), (12, "month")),
    **dict.fromkeys(("liter", "litre"), (1, "L")),
    **dict.fromkeys(("milliliter", "millilitre"), (Fraction(1, 1000), "L")),
    **dict.fromkeys(("gallon", "gal"), (4, "quart")),
    **dict.fromkeys(("quart", "qt"), (1, "quart")),
    **dict.fromkeys(("cent", "¢"), (Fraction(1, 100), "dollar")),
    **dict.fromkeys(("dollar", "usd", r"\dollar"), (1, "dollar")),
    **dict.fromkeys(("euro", "€", "eur"), (1, "euro")),
    **dict.fromkeys(("£", "gbp"), (1, "gbp")),
    **dict.fromkeys(("¥", "yen"), (1, "yen")),
    **dict.fromkeys(("rupee", "₹", "rs"), (1, "rupee")),
    "yuan": (1, "yuan"),
    **dict.fromkeys((r"\degree", "degree", "deg"), (1, "degree")),
    **dict.fromkeys(("radian", "rad"), (1, "radian")),
    "joule": (1, "J"),
    "newton": (1, "N"),
    "watt": (1, "W"),
    "volt": (1, "V"),
    "coulomb": (1, "C"),
    "kelvin": (1, "K"),
    "hertz": (1, "Hz"),
    "ampere": (1, "A"),
    "mole": (1, "mol"),
    "erg": (1, "erg"),
    **dict.fromkeys(("ohm", r"\Omega", "Ω"), (1, "ohm")),
    **dict.fromkeys((r"\mathring{A}", r"\AA", "Å", "angstrom"), (Fraction(1, 10**10), "m")),
    "%": (1, "%"),
}
SPEEDS = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "fps": "ft/s"}
SCALES = {"hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12}
SCALES |= {"quadrillion": 15, "quintillion": 18}
# Words that make another number of it, or no answer: no unit, in the singular
DENIALS = set(
    """or and not is to times plus minus than between maybe equals unless except factorial half halve
    percentile""".split()  # noqa: SIM905
)
FIRST_DENIALS = {"below", "under", "most", "least", "at"}  # 5 below zero; 12 feet below the sea are 12 feet
# Where nothing stands behind them that they tell more of, as in "third graders"
LAST_DENIALS = set(
    """third fourth fifth sixth seventh eighth ninth tenth hundredth thousandth millionth billionth equal grand squared
    cubed""".split()  # noqa: SIM905
)

CURRENCY = re.compile(
    r"(?P<sign>[-+]?)\s*(?:US|AU|CA)?(?P<unit>\\dollar|[€£¥₹]|(?:\\text\s*\{\s*)?(?:USD|EUR|GBP|Rs)\.?\s*\}?)\s*(?P<body>.+)"
)
NUMBER = rf"[-+]?\s*(?:(?:{literals.WHOLE})(?:\.[0-9]+)?|\.[0-9]+)(?:\s*\\cdot\s*10\s*\^\s*(?:\{{[^{{}}]*\}}|[0-9]+))?"
RATIO = r"[-+]?\s*[0-9]*\s*(?:\\frac\s*\{[^{}]*\}\s*\{[^{}]*\}|[0-9]+\s*/\s*[0-9]+)"
BARE = re.compile(rf"(?P<body>{RATIO}|{NUMBER})(?P<gap>\s*)(?P<unit>[A-Za-zµμΩÅ¢€£¥₹].*|\\(?:dollar|Omega|AA).*)")
MARKED = re.compile(
    r"(?P<body>(?!.*\\(?:sin|cos|tan|cot|sec|csc)).+?)\s*(?P<unit>%|\\degree)(?:\s*(?P<scale>[CFK]|\\text\{\s*[CFK]\s*\}))?"
)
SCALE = re.compile(rf"(?:\\text)?[\s{{]*({'|'.join(SCALES)})s?\b", re.IGNORECASE)
NAME = r"\\?[A-Za-zµμΩÅ¢€£¥₹%'-]++"
UNIT = re.compile(rf"(?:\s*+(?:/\s*+)?{NAME}(?:\^-?[0-9]{{1,2}})?(?![A-Za-z0-9]))++\s*+")
TOKEN = re.compile(rf"(/?)\s*({NAME})(?:\^(-?[0-9]{{1,2}}))?")


class Unit(NamedTuple):
    """factor of base units to their powers; or, of one that is not known, its words."""

    factor: Fraction = Fraction(1)
    powers: frozenset = frozenset()
    words: frozenset = frozenset()


PERCENT = Unit(powers=frozenset({("%", 1)}))


def cut(text: str) -> tuple[str, Unit | None]:
    """(the number, its unit or None) of a tidy text. What denies ("5 or more") or is no unit stays with the number."""
    if found := CURRENCY.fullmatch(text):
        body, more = cut(found["body"])
        return (text, None) if more and more.words else (found["sign"] + body, parse(found["unit"]))
    if found := MARKED.fullmatch(text):
        scale = re.sub(r"\\text|[{}\s]", "", found["scale"] or "")  # of a temperature
        return found["body"], Unit(words=frozenset({scale})) if scale else parse(found["unit"])
    tag = text.find(r"\text")
    if tag > 0:
        return _cut_at(text, text[:tag].strip(), text[tag:])
    found = BARE.fullmatch(text)
    if found is None:
        return text, None
    first, *_ = names = re.findall(r"[^\W\d_]+|\\[A-Za-z]+|[¢€£¥₹]", found["unit"])
    unknown = [name for name in names if not _known(name) and name not in ("sq", "cu")]
    glued = not found["gap"] and len(first) == 1 and first.isalpha()
    if glued or any(len(name) == 1 for name in unknown) or (first in unknown and len(first) == 2):
        return text, None  # 5m may be five times m, and 5 x is
    return _cut_at(text, found["body"].strip(), found["unit"])


def _cut_at(text: str, body: str, rest: str) -> tuple[str, Unit | None]:
    if scale := SCALE.match(rest):  # 2.5 million people
        number = literals.read(body)
        if number is None:
            return text, None
        body, rest = str(number.value * 10 ** SCALES[scale[1].casefold()]), rest[scale.end() :]
        if not re.search(r"[^\s{}]", rest):
            return body, None
    unit = parse(rest)
    return (body, unit) if unit and body.count("{") == body.count("}") else (text, None)


def parse(text: str) -> Unit | None:
    """The unit that `text` names; None if it is none."""
    plain = re.sub(r"\\text\s*|\\cdot|[{}()~.]", " ", re.sub(r"\^\s*\{\s*(-?[0-9]+)\s*\}", r"^\1", text))
    plain = re.sub(r"\b(?:square|sq)\s+([A-Za-z]+)", r"\1^2", plain)
    plain = re.sub(r"\b(?:cubic|cu)\s+([A-Za-z]+)", r"\1^3", plain)
    plain = re.sub(r"\s+squared\b", "^2", re.sub(r"\s+cubed\b", "^3", re.sub(r"\bper\b", "/", plain)))
    plain = re.sub(r"\s+\^", "^", plain)
    plain = SPEEDS.get(plain.strip().casefold(), plain)
    if not UNIT.fullmatch(plain):
        return None
    tokens = TOKEN.findall(plain)
    names = [name.casefold() for _, name, _ in tokens]
    if not names or names[0] in FIRST_DENIALS or any(map(_denies, names, [*names[1:], ""])):
        return None
    if not all(_known(name) for _, name, _ in tokens):
        return Unit(words=frozenset(map(_singular, names)))
    factor, powers = Fraction(1), Counter()
    for over, name, power in tokens:
        size, base = _known(name)
        exponent = int(power or 1) * (-1 if over else 1)
        factor *= Fraction(size) ** exponent
        powers[base] += exponent
    return Unit(factor, frozenset(powers.items()))


def _denies(word: str, following: str) -> bool:
    one = _singular(word)
    if {word, one} & (DENIALS | SCALES.keys()):
        return True
    return one in LAST_DENIALS and (word != one or following in ("", "of", "to", "or"))


def _known(name: str) -> tuple[Fraction | int, str] | None:
    if name in METRIC:
        return 1, SAME.get(name, name)
    for word in (name, name.casefold(), _singular(name.casefold())):
        if word in WORDS:
            return WORDS[word]
    if name[0] in PREFIXES and name[1:] in METRIC:
        return Fraction(10) ** PREFIXES[name[0]], SAME.get(name[1:], name[1:])
    return None


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 2 and word.endswith("s") else word
