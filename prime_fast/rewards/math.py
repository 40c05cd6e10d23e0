r"""Grading of a written answer against a ground truth, by math-verify.

It has no time-out of its own (math-verify's is an alarm signal): call it through `prime_fast.rewards`, whose workers
are killed at their deadline. Nothing the model wrote is evaluated as Python, but for bare arithmetic of digits and
operators inside math-verify.
"""

import logging
import re

from math_verify import parse, verify

# Only the end of a response is searched for its answer, so that the cost does not grow with the response.
BOX_TAIL_CHARS = 20_000  # for the last \boxed{}
TEXT_TAIL_CHARS = 1_000  # for an answer in plain text
ANSWER_CHARS = 1_000  # a longer answer is wrong unless it is the ground truth, character by character

logging.getLogger("math_verify").setLevel(logging.ERROR)


def grade(response: str, ground_truth: str | int | float, *, strict: bool = False) -> float:
    r"""1.0 if the answer of `response` equals `ground_truth`, else 0.0.

    response: the model's text. Its answer is the last complete \boxed{...} or \fbox{...}; failing that a last line
        `#### x`; failing that what math-verify finds ("answer is ...", the last LaTeX expression, the last number).
        With `strict` only a box counts.
    ground_truth: plain text, LaTeX, LaTeX in \boxed{}, or a number.
    """
    truth = str(ground_truth).strip()
    truth = last_box(truth) or truth
    tail = response[-TEXT_TAIL_CHARS:]
    answer = last_box(response[-BOX_TAIL_CHARS:])
    if answer is None and strict:
        return 0.0
    answer = answer or _last_hashes(tail)
    if answer is not None and _squeeze(answer) == _squeeze(truth):
        return 1.0
    if answer is not None and len(answer) > ANSWER_CHARS:
        return 0.0
    found = _parse(tail if answer is None else _boxed(answer))
    return float(verify(_parse(_boxed(truth)), found, timeout_seconds=None))


def last_box(text: str) -> str | None:
    r"""Content of the last \boxed{} or \fbox{} that has balanced braces and is not empty; None if there is none."""
    open_braces, last_start, content = [], -1, None
    for token in re.finditer(r"\\(?:f?boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):
        if token.group() == "}":
            start = open_braces.pop() if open_braces else None
            inner = text[start : token.start()].strip() if start is not None and start > last_start else ""
            if inner:
                last_start, content = start, inner
        elif token.group().endswith("{") and token.group() != r"\{":
            open_braces.append(token.end() if len(token.group()) > 1 else None)
    return content


def _last_hashes(text: str) -> str | None:
    """x of a last line `#### x`, as GSM8K's solutions end (x starts like a number or formula: not a heading)."""
    found = re.search(r"####[ \t]*([-+$\\(\[.\d][^\n]*)\s*\Z", text)
    return found.group(1).strip() if found else None


def _boxed(text: str) -> str:
    return rf"\boxed{{{text}}}"


def _parse(text: str) -> list:
    return parse(text, parsing_timeout=None)


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text).rstrip(".")
