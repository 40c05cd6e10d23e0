"""What the samples of a problem vote for: answers that the math reward calls equal are one vote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from prime_fast.rewards import RewardPool
from prime_fast.rewards.math import last_box

SECONDS = 2.0  # a comparison may take; past it the two answers count as different
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
INTEGER = re.compile(r"-?\d{1,18}")


def answer_of(response: str, ability: str | None) -> str | None:
    r"""What a response votes for: its last \boxed{}, else its last number, else all of it; all of it if it is code."""
    text = response.strip()
    if ability == "code":
        return text or None
    numbers = NUMBER.findall(text)
    answer = last_box(text) or (numbers[-1].replace(",", "") if numbers else text)
    return re.sub(r"\s+", "", answer).rstrip(".") or None


def unite(
    answers: Sequence[Sequence[str | None]],
    comparable: Sequence[bool],
    pool: RewardPool,
    tick: Callable[[], None] = lambda: None,
) -> list[list]:
    r"""Each problem's answers with equal ones (\frac{1}{2}, 1/2, 0.5) replaced by the one that was given most often.

    comparable: whether a problem's answers are math; else they are equal only as texts. pool: of the reward "math", in
    whose workers they are compared. An answer joins the most frequent one that it equals, as a response would score 1
    with that one for ground truth. `tick` is called after each comparison.
    """
    stands_for = [{} for _ in answers]
    waiting = [_by_frequency(row) if math else [] for row, math in zip(answers, comparable, strict=True)]
    while any(waiting):  # in each round the most frequent answer left of every problem takes in its equals
        pairs = [(i, row[0], other) for i, row in enumerate(waiting) for other in row[1:] if _may_equal(row[0], other)]
        rows = [{"ability": "math", "reward_model": {"ground_truth": head}} for _, head, _ in pairs]
        outcomes = pool.score([rf"\boxed{{{other}}}" for _, _, other in pairs], rows, tick)
        for (i, head, other), outcome in zip(pairs, outcomes, strict=True):
            if outcome == 1:
                stands_for[i][other] = head
        waiting = [[answer for answer in row[1:] if answer not in stands_for[i]] for i, row in enumerate(waiting)]
    return [[stands_for[i].get(answer, answer) for answer in row] for i, row in enumerate(answers)]


def _by_frequency(answers: Sequence[str | None]) -> list[str]:
    counts = Counter(answer for answer in answers if answer is not None)
    return sorted(counts, key=lambda answer: (-counts[answer], len(answer), answer))


def _may_equal(one: str, other: str) -> bool:
    """False for two different integers, which need no comparison."""
    return not (INTEGER.fullmatch(one) and INTEGER.fullmatch(other)) or int(one) == int(other)
