"""How many groups to start so that a step fills up, while hardly a group is left over for the next one.

What is traded: the more groups are started, the likelier a step fills up in one round, and the more are left over, and
trained one step late. With the numbers below these are 4 to 8% of the rows, and a step of 64 prompts takes 1.3 to 2
rounds, one of 256 1.1 to 1.5 (`python -m benchmarks.collection`). A SURPLUS of 0.03 leaves 0.5 to 2 percent less and
takes 0.1 to 0.4 rounds more. While the pass rate goes from 0.1 to 0.9 in 50 steps, 8% are left over; with a MEMORY of
0.9 it would be 20%.
"""

from __future__ import annotations

import math
from statistics import NormalDist

SURPLUS = 0.04  # groups that may be expected to be left over, as a share of a step's
EARLY_SURPLUS = 0.005  # of those started a step early, which would be too old for another one
CERTAINTY = 2.0  # more are started once it would take that many standard deviations of luck to do without
MEMORY = 0.5  # what a group of the last step counts in the estimate of the pass rate; before, the square of it, ...
NORMAL = NormalDist()


def more(looked_at: float, passed: float, in_work: int, missing: int, room: int, surplus: float) -> int:
    """How many groups to start beside those in work, at most `room`, where `missing` more have to pass.

    looked_at, passed: groups that tell the pass rate. While those in work may do, none; else as many as keep the
    expected surplus within `surplus` groups. Not to start more for every small setback is what bounds it: a group that
    was started cannot be called back when luck turns.
    """
    if missing <= 0:
        return 0
    expected, spread = _passing(looked_at, passed, in_work)
    if in_work and expected + CERTAINTY * spread >= missing:
        return 0
    total = max(in_work, missing)  # up to there none is left over, whatever the rate
    while total < in_work + room and _left_over(*_passing(looked_at, passed, total + 1), missing) <= surplus:
        total += 1
    return min(total - in_work, room)


def _passing(looked_at: float, passed: float, count: int) -> tuple[float, float]:
    """Mean and standard deviation of how many of `count` groups pass: beta-binomial, for the rate is an estimate."""
    rate = passed / looked_at
    return count * rate, math.sqrt(count * rate * (1 - rate) * (1 + max(0, count - 1) / (looked_at + 1)))


def _left_over(expected: float, spread: float, missing: int) -> float:
    """E[max(0, passing - missing)] of a normal distribution."""
    if spread == 0:
        return max(0.0, expected - missing)
    z = (expected - missing) / spread
    return spread * (z * NORMAL.cdf(z) + NORMAL.pdf(z))
