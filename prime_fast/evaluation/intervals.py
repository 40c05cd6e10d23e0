"""95% intervals of means over problems: one definition for pass@1, avg@k, pass@k, best-of-n, averages of benchmarks and
paired differences.

The problems of each benchmark count as draws from a larger population, each with one value (the share of its samples
that is right, the difference of two such shares, ...). The interval is the one for counts of solved problems (Agresti
and Coull 1998; for differences Bonett and Price 2012) at an effective number of problems (Korn and Graubard 1998): as
many as would leave an average of plain right or wrong as uncertain as this one is.

Coverage, measured by `python -m benchmarks.intervals` from 20 problems on: at least 93% whatever the accuracy; averages
of benchmarks and paired differences of pass@1 92%. Where 5 problems of the rarer kind, right or wrong, are expected it
is 95 to 96% on average, in single cases up to 98.7%; with fewer it rises towards 100%, since nearly every draw is the
same then. Averages hold less where a benchmark of few problems outweighs many others (3 beside 200), and where nearly
all is right or wrong in benchmarks of very unlike sizes (80% for 1 to 2% in 30, 40 and 500 problems).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959964  # of 95%
PRIOR_PROBLEMS = 0.5  # a benchmark's variance is shrunk to that of right-or-wrong values, as if so many were known
PRIOR_EVENTS = 0.1  # so much of one problem of the most extreme value counts as seen: rare ones may have been missed


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


def mean(benchmarks: Sequence[np.ndarray]) -> Estimate:
    """The mean over benchmarks of the mean over their problems; values (..., problems) in [0, 1], one array each."""
    value = _average([values.mean(-1) for values in benchmarks])
    count = _effective(benchmarks, value * (1 - value))
    size = count + Z**2
    centre = (count * value + Z**2 / 2) / size
    half = Z * np.sqrt(centre * (1 - centre) / size)
    return Estimate(value, np.maximum(centre - half, 0), np.minimum(centre + half, 1))


def difference(benchmarks: Sequence[np.ndarray]) -> Estimate:
    """The same of values in [-1, 1], the differences of two results on the same problems."""
    value = _average([values.mean(-1) for values in benchmarks])
    changed = _average([np.abs(values).mean(-1) for values in benchmarks])
    count = _effective(benchmarks, changed - value**2)
    size = count + 2  # one problem more that only the one solves, and one that only the other solves
    centre = count * value / size
    half = Z * np.sqrt(((count * changed + 2) / size - centre**2) / size)
    return Estimate(value, np.maximum(centre - half, -1), np.minimum(centre + half, 1))


def _effective(benchmarks: Sequence[np.ndarray], spread: np.ndarray) -> np.ndarray:
    """How many problems of variance `spread`, (...), have a mean of the variance that this average has."""
    sizes = np.array([values.shape[-1] for values in benchmarks])
    weight = 1 / sizes / (1 / sizes).sum()  # of a benchmark's variance in the average's
    free = sizes - 1 + PRIOR_PROBLEMS
    squares = [((values - values.mean(-1, keepdims=True)) ** 2).sum(-1) for values in benchmarks]
    variance = sum(w * (s + PRIOR_PROBLEMS * spread) / f for w, s, f in zip(weight, squares, free, strict=True))
    count = len(sizes) ** 2 / (1 / sizes).sum()
    count = count * (count * spread + PRIOR_EVENTS) / (count * variance + PRIOR_EVENTS)
    # variances estimated from the few problems of a heavy benchmark are less sure than from as many spread evenly
    return count * _t_squared(free.sum()) / _t_squared(1 / (weight**2 / free).sum())


def _t_squared(freedom: float) -> float:
    """(t / z)^2 of Student's 97.5% quantile, within 1% from 2 degrees of freedom on."""
    return np.exp(2.45 / freedom + 1.4 / freedom**2)


def _average(parts: Sequence[np.ndarray]) -> np.ndarray:
    return sum(parts) / len(parts)
