r"""Grading of a written answer against a ground truth: what is read as the answer, and when it says the truth.

The rule is docs/rewards.md, the code `rewards.answers`; math-verify reads the formulas. There is no time-out: call it
through `prime_fast.rewards`, whose workers are killed at their deadline. Nothing the model wrote is run as Python.
"""

from prime_fast.rewards.answers.equality import says
from prime_fast.rewards.answers.reading import final_answer, last_box

__all__ = ["grade", "last_box"]


def grade(response: str, ground_truth: str | int | float, *, strict: bool = False) -> float:
    r"""1.0 if the answer of `response` equals `ground_truth`, else 0.0.

    response: the model's text. Its answer is the last complete \boxed{...} or \fbox{...}; failing that a last line
        `#### x`; failing that what follows the last "answer is", or the last number or formula. With `strict` only a
        box counts.
    ground_truth: plain text, LaTeX, LaTeX in \boxed{}, or a number.
    """
    answer = final_answer(response, strict)
    truth = str(ground_truth).strip()
    return float(answer is not None and says(last_box(truth) or truth, answer))
