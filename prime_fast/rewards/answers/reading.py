r"""What is read as the answer of a response; in time linear in what is looked at.

The last complete \boxed{}; without one (and not `strict`) a last line `#### x`, else what follows the last "answer is",
else the last number or formula. Only the end of a response is looked at, so that the cost does not grow with it.
"""

import re

from prime_fast.rewards.answers.notation import FRACTIONS
from prime_fast.rewards.answers.units import LAST_DENIALS, SCALES

BOX_TAIL_CHARS = 20_000  # for the last \boxed{}
TEXT_TAIL_CHARS = 1_000  # for an answer in plain text

NUMBER = r"(?:[0-9]+(?:,[0-9]{3}| [0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+)"
ARITHMETIC = rf"{NUMBER}(?:\s?[-+*/^×÷]\s?{NUMBER}|:{NUMBER}| {NUMBER}/{NUMBER})*"
BEFORE = r"(?:(?:minus|negative|log|ln)\s|(?:[0-9]+(?:\.[0-9]+)?\s?)?√\s?)?"  # what makes another number of it
PARTS = r"(?:half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|eighths?|tenths?|hundredths?|thousandths?)"
BEHIND = (
    rf"(?:\s?[{''.join(FRACTIONS)}]|[⁰¹²³⁴⁵⁶⁷⁸⁹]+|\sand\s(?:an?|one|two|three)[\s-]{PARTS}\b|\s?(?:π|\\pi\b)|"
    rf"\s?\\sqrt\s*\{{[0-9]+\}}|\s(?:{'|'.join(SCALES)})s?\b|\s(?:{PARTS}|squared|cubed|factorial)\b(?![\s-]+[A-Za-z]))?"
)
NO_UNIT = r"(?:or|and|to|is|are|was|in|of|if|so|by|at|as|but)\b"
UNIT = (
    rf"\s?(?!{NO_UNIT})(?!(?:{'|'.join(sorted(LAST_DENIALS))})\b[\s-]+[A-Za-z])"  # 25 third graders are 25
    r"(?:%|percent|°|degrees?|[A-Za-zµ]{1,6}(?:\^?[23²³])?(?:/[A-Za-z]{1,3}[23²³]?)?(?![A-Za-z]))"
)
PERCENT = r"(?:\\?%|percent\b|pct\b)"
FORMULA = r"(?:\$\$[^$]+\$\$|\$[^$\n]+\$|\\\([^\n]*?\\\)|\\\[.*?\\\]|-?\\frac\{[0-9]+\}\{[0-9]+\})"
CANDIDATE = re.compile(
    rf"(?P<formula>{FORMULA}(?:\s*{PERCENT})?)|(?<![\w.])(?<![0-9],)(?P<number>{BEFORE}[-−]?[$€£]?{ARITHMETIC}(?![0-9]){BEHIND}(?:{UNIT})?)",
    re.DOTALL,
)
ANNOUNCED = re.compile(r"\banswer\b(?:\s+to\s[^.\n:]{1,100})?(?:\s+(?:is|are|equals)\b|\s*[:=])[\s:*]*", re.IGNORECASE)
FILLER = re.compile(r"(?:\s|\*\*|:|(?:therefore|thus|hence|simply|just|exactly|equal to|given by)\b)*", re.IGNORECASE)
SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)|,\s+(?=(?:because|since|as|which|so|where|with|i)\b)|\*\*", re.IGNORECASE)
JOINED = re.compile(r"\s*(?:,|&|/|-|–|to|through|,?\s*(?:and|or|and/or)\b[^\n]{0,30}?|,?\s*perhaps|,?\s*maybe)\s*\Z")
BETWEEN_BOXES = re.compile(r"(?:[\s$,;]|\\[,;:()\[\]]|\\q?quad|\\text\s*\{|\}|\band\b|\bor\b)*+")
UNFINISHED = re.compile(r"\\(?:boxed|fbox)\s*\{(?!\s*\})")
PERCENT_SIGN = re.compile(rf"[\s$]*{PERCENT}")
DENIED = re.compile(  # what is said of the number makes another of it, or none
    r"(?:(?:\b(?:can)?not|n't|\bnever|\bno)\s+(?:\w+\s+)?|(?<=[\w)\]}$])\s*[<>]\s*|[≠≤≥±^]\s*|"
    r"\b(?:sin|cos|tan|ln|log(?:_?\w+)?)\s*\(?|\blog\s+of\s+|[0-9)}$]\s+(?:mod|base|over)\s+)\Z"
)
# <answer>72</answer> begins and ends a statement, <b>72</b> does not, and GSM8K's <<48+24=72>> says nothing
TAGS = re.compile(r"(?P<inline></?(?:b|i|u|em|strong|span|sub|sup)>)|(?P<block></?[A-Za-z|][^<>\n]*>)|<<[^<>\n]*>>")


def final_answer(response: str, strict: bool = False) -> str | None:
    """The text of the answer that a response gives; None if it gives none."""
    box = _last_boxes(response[-BOX_TAIL_CHARS:])
    if box is not None or strict or UNFINISHED.search(response[-BOX_TAIL_CHARS:]):
        return box
    tail = TAGS.sub(lambda tag: ".\n" if tag["block"] else "", response[-TEXT_TAIL_CHARS:])
    return _last_hashes(tail) or _announced(tail) or _last_candidate(tail)


def last_box(text: str) -> str | None:
    r"""Content of the last \boxed{} or \fbox{} that has balanced braces and is not empty; None if there is none.

    Of boxes in a box it is the outer one that counts.
    """
    found = boxes(text)
    return found[-1][2] if found else None


def boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every balanced box that is not empty, without those inside of another."""
    open_braces, found = [], []
    for token in re.finditer(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):
        if token.group() == "}":
            opening = open_braces.pop() if open_braces else None
            if opening and (content := text[opening[1] : token.start()].strip()):
                while found and found[-1][0] > opening[0]:
                    found.pop()
                found.append((opening[0], token.end(), content))
        elif token.group().endswith("{") and token.group() != r"\{":
            open_braces.append(token.span() if len(token.group()) > 1 else None)
    return found


def _last_boxes(text: str) -> str | None:
    """The last box; together with those before it that only a comma, "and" or "or" parts from it."""
    found = boxes(text)
    if not found:
        return None
    start, end, content = found.pop()
    parts = [content + ("%" if PERCENT_SIGN.match(text, end) else "")]
    while found and BETWEEN_BOXES.fullmatch(text, found[-1][1], start):
        start, _, content = found.pop()
        if content not in parts:
            parts.insert(0, content)
    return ", ".join(parts)


def _last_hashes(text: str) -> str | None:
    """x of a last line `#### x`, as GSM8K's solutions end (x starts like a number or formula: not a heading)."""
    found = re.search(r"####[ \t]*([-+$\\(\[.\d][^\n]*)\s*\Z", text)
    return found.group(1).strip() if found else None


def _announced(text: str) -> str | None:
    """What follows the last "answer is" or "answer:", to the end of its sentence."""
    announced = list(ANNOUNCED.finditer(text))
    if not announced:
        return None
    start = FILLER.match(text, announced[-1].end()).end()
    end = SENTENCE_END.search(text, start)
    statement = text[start : end.start() if end else len(text)].strip()
    if re.search(r"\b(?:is|are|equals)\b", statement):  # Final answer: the largest n is 34
        return _last_candidate(statement)
    return statement or None


def _last_candidate(text: str) -> str | None:
    """The last number or formula; with the one before it where the two are alternatives; None where it is denied."""
    previous, last = None, None
    for found in CANDIDATE.finditer(text):
        previous, last = last, found
    if last is None or DENIED.search(text, max(0, last.start() - 20), last.start()):
        return None
    stated = last.group()
    if last["number"]:
        stated = re.sub(r"(?<=[0-9])(?=[A-Za-zµ])", " ", re.sub(r"\A(?:minus|negative)\s", "-", stated))
    if previous is not None and JOINED.fullmatch(text, previous.end(), last.start()):
        return f"{previous.group()}, {stated}"
    return stated
