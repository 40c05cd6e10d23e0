"""How long responses are, and how long an engine takes to decode them."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from statistics import NormalDist

SPREAD = 0.8  # sigma of log-normal lengths: reasoning has a long tail
SIMULATED = 4096  # sequences at most; more take proportionally longer
NORMAL = NormalDist()


@cache
def lengths(count: int, mean: float, longest: int) -> tuple[float, ...]:
    """Quantiles of log-normal lengths cut at `longest`, in a fixed random order; their mean is `mean`."""
    scores = [math.exp(SPREAD * NORMAL.inv_cdf((i + 0.5) / count)) for i in range(count)]
    low, high = 0.0, float(longest) / scores[0]
    for _ in range(60):
        middle = (low + high) / 2
        short = sum(min(longest, middle * score) for score in scores) < mean * count
        low, high = (middle, high) if short else (low, middle)
    drawn = [max(1.0, min(longest, high * score)) for score in scores]
    random.Random(0).shuffle(drawn)
    return tuple(drawn)


def decode(responses: Sequence[float], slots: int, prompt: float, seconds: Callable[[int, float], float]) -> float:
    """Seconds until the last of them ends, where a waiting one takes each slot that becomes free.

    seconds(sequences, tokens): of one decoding step with so many sequences that hold so many tokens.
    """
    ends: list[tuple[float, float]] = []  # (step of its last token, step of its first)
    waiting, now, total, begun = iter(responses), 0.0, 0.0, 0.0
    following = next(waiting, None)
    while ends or following is not None:
        while following is not None and len(ends) < slots:
            heapq.heappush(ends, (now + following, now))
            begun += now
            following = next(waiting, None)
        end, start = heapq.heappop(ends)
        count = len(ends) + 1
        tokens = count * (prompt + (now + end) / 2) - begun
        total += (end - now) * seconds(count, tokens)
        begun, now = begun - start, end
    return total


def in_batches(responses: Sequence[float], slots: int, prompt: float, seconds: Callable[[int, float], float]) -> float:
    """Seconds where a batch begins when all of the last one have ended."""
    parts = [responses[i : i + slots] for i in range(0, len(responses), slots)]
    return sum(decode(part, len(part), prompt, seconds) for part in parts)
