r"""One spelling for what LaTeX, Unicode and plain text spell in many, and the cutting of texts outside of brackets."""

import re
import unicodedata

FRACTIONS = {
    "½": " 1/2",
    "⅓": " 1/3",
    "⅔": " 2/3",
    "¼": " 1/4",
    "¾": " 3/4",
    "⅕": " 1/5",
    "⅙": " 1/6",
    "⅚": " 5/6",
    "⅖": " 2/5",
    "⅗": " 3/5",
    "⅘": " 4/5",
    "⅐": " 1/7",
    "⅑": " 1/9",
    "⅒": " 1/10",
    "⅛": " 1/8",
    "⅜": " 3/8",
    "⅝": " 5/8",
    "⅞": " 7/8",
}
SIGNS = FRACTIONS | {
    **dict.fromkeys("−‐‑‒–—﹣", "-"),
    **dict.fromkeys("×·⋅∙•", r"\cdot "),
    "÷": "/",
    "⁄": "/",
    "∕": "/",
    "π": r"\pi ",
    "∞": r"\infty ",
    "√": r"\sqrt ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "°": r"\degree ",
    "θ": r"\theta ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "…": r"\dots ",
    "′": "'",
    "’": "'",
    "ℝ": r"\mathbb{R}",
}
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (r"\\\\\s*\[\s*-?[0-9.]+\s*(?:mm|cm|pt|em|ex|in)\s*\]", r"\\\\"),  # a row's end with a gap
        (r"\\\\(?=[A-Za-z])(?!.*matrix)", r"\\"),  # commands escaped twice
        (r"\\!\s*", ""),
        (r"(?<!\\)\\(?:[,;: ]|(?:qquad|quad|thinspace|enspace|hspace\{[^{}]*\})(?![A-Za-z]))|(?<!\\)~", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?|\\(?:displaystyle|textstyle|nolimits|limits)", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:(?:mathbf|mathit|boldsymbol|vec)\s*\{\s*([A-Za-z])\s*\}|mathrm\s*\{\s*([eid])\s*\})", r"\1\2"),
        (r"\\(?:math(?:rm|bf|it|sf|tt)|text(?:bf|it|rm|normal|sf|tt|sc)|mbox|hbox|emph|operatorname)\s*\{", r"\\text{"),
        (r"\\text\s*\{[\s.]*\}|\\color\s*\{[a-z]+\}|\\checkmark(?![A-Za-z])", ""),
        (r"\\text\s*\{((?:\\text\{[^{}]*\}|[^{}])*)\\text\{([^{}]*)\}([^{}]*)\}", r"\\text{\1\2\3}"),
        (r"\s*\\%|\s*\\text\{\s*(?:%|percent|percentage|pct)\s*\}|\s*\b(?:percent|percentage|pct)\b|\s+%", "%"),
        (r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree\s*", r"\\degree "),
        (r"(?<=[0-9}])\s*(?:\\text\{\s*degrees?\s*\}|degrees?\b)", r"\\degree "),
        (r"\\[()\[\]]", ""),
        (r"\\\$|\\text\{\s*\$\s*\}|\A([^$]*)(?<!\\)\$(?=[^$]*\Z)", lambda found: (found[1] or "") + r"\dollar "),
        (r"\$", ""),
        (r"\s*\{\s*,\s*\}\s*", ","),
        (r"\A\*\*|\*\*\Z", ""),
        (r"\*\*", "^"),
        (r"\\(?:cdot|times|ast)(?![A-Za-z])|\*", r"\\cdot "),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\(?:leqslant|leq|le)(?![A-Za-z])|<=|=<", r"\\le "),
        (r"\\(?:geqslant|geq|ge)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\(?:neq|ne)(?![A-Za-z])|!=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:approx|simeq|cong)(?![A-Za-z])|~=", r"\\approx "),
        (r"\\(?:[lr]?vert|mid)(?![A-Za-z])", "|"),
        (r"\\langle", "("),
        (r"\\rangle", ")"),
        (r"\\[lr]brace(?![A-Za-z])", lambda found: r"\{" if found.group()[1] == "l" else r"\}"),
        (r"[\[(]?\s*\\begin\{array\}\s*\{[^{}]*\}(.*?)\\end\{array\}\s*[\])]?", r"\\begin{pmatrix}\1\\end{pmatrix}"),
        (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"(?<=[0-9.])\\(?:bar|dot)(?![A-Za-z])(?=\s*\{?\s*[0-9])", r"\\overline"),
        (r"\\binom\s*([0-9A-Za-z])\s*([0-9A-Za-z])(?![0-9A-Za-z])", r"\\binom{\1}{\2}"),
        (r"\\binom\s*(\{[^{}]*\})\s*([0-9A-Za-z])(?![0-9A-Za-z])", r"\\binom\1{\2}"),
        (r"\\frac\s*\{\s*\\text\{([A-Za-z ]+)\}\s*\}\s*\{\s*\\text\{([A-Za-z ]+)\}\s*\}", r"\\text{\1/\2}"),
        (r"\\colon(?![A-Za-z])", ":"),
        (r"\\(?:ldots|cdots|dotsc|dots)(?![A-Za-z])|\.\.\.", r"\\dots "),
        (r"\\mathbb\s*(?:\{\s*([A-Z])\s*\}|([A-Z]))", r"\\mathbb{\1\2}"),
        (r"(?<![A-Za-z\\])(?:infinity|infty|inf|oo)(?![A-Za-z])", r"\\infty "),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![A-Za-z\\])sqrt(?![A-Za-z])", r"\\sqrt"),
        (r"(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp)(?![A-Za-z])", r"\\\1 "),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(\[[^\[\]]*\])?\s*([0-9]+(?:\.[0-9]+)?)", r"\\sqrt\1{\2}"),  # the root of 12, not of 1
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r"\\frac\s*([0-9])\s*([0-9])(?![0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9])\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*\{([^{}]*)\}\s*([0-9A-Za-z])", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s*(\\pi(?![A-Za-z])|\\frac\s*\{[^{}]*\}\s*\{[^{}]*\})", r"\\sqrt{\1}"),
        (r"(\}) (?=\{)", r"\1"),
        (r"\\log\s*_\s*([0-9])", r"\\log_{\1}"),
        (r"\s+", " "),
    )
]
PLAIN = re.compile(r"[-+0-9A-Z.,/() ]*")
OPEN, CLOSE = "([{", ")]}"
ENCLOSING = re.compile(r"\\boxed\s*\{|\\fbox\s*\{|\\text\s*\{|\{|\(")


def tidy(text: str) -> str:
    """`text` in the one spelling, without what only encloses or ends it."""
    if PLAIN.fullmatch(text):
        return peel(text)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda found: f"^{{{found.group().translate(SUPERSCRIPTS)}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda found: f"_{{{found.group().translate(SUBSCRIPTS)}}}", text)
    text = "".join(SIGNS.get(sign, sign) for sign in text)
    text = "".join(sign for sign in unicodedata.normalize("NFKC", text) if unicodedata.category(sign) != "Cf")
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    return peel(text)


def peel(text: str) -> str:
    r"""Without spaces, a final stop and the braces, parentheses, \text{} and \boxed{} that hold all of it."""
    while True:
        before, text = text, text.strip().rstrip(".,;:").strip()
        opening = ENCLOSING.match(text)
        if opening and closing_at(text, opening.end() - 1) == len(text) - 1:
            inner = text[opening.end() : -1]
            if opening.group() != "(" or len(split(inner, ",;")) == 1:
                text = inner
        if text == before:
            return text


def squeeze(text: str) -> str:
    """Without spaces, but for those that part two digits."""
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)


def closing_at(text: str, opening: int) -> int | None:
    """Where the bracket at `opening` is closed, by whatever bracket: half-open intervals mix them."""
    depth = 0
    for index, sign in outside_escapes(text, opening):
        depth += (sign in OPEN) - (sign in CLOSE)
        if depth == 0:
            return index
    return None


def split(text: str, separators: str) -> list[str]:
    """Cut at each separator (one character) outside of brackets; empty parts are dropped."""
    parts, depth, start = [], 0, 0
    for index, sign in outside_escapes(text):
        depth += (sign in OPEN) - (sign in CLOSE)
        if depth == 0 and sign in separators:
            parts.append(text[start:index])
            start = index + 1
    return [part for part in map(str.strip, [*parts, text[start:]]) if part]


def outside_escapes(text: str, start: int = 0):
    r"""(index, character); \{ and \} count as the brackets that they show."""
    index = start
    while index < len(text):
        if text[index] == "\\" and text[index + 1 : index + 2] not in ("{", "}"):
            index += 2
            continue
        index += text[index] == "\\"
        yield index, text[index]
        index += 1
