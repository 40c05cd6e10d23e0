"""Do the 95% intervals of prime-fast eval hold what they say? Coverage by enumeration and simulation.

    python -m benchmarks.intervals [--repeats 20000] [--out benchmarks/results/cpu/intervals.json]

A case is a way in which outcomes arise with a known expectation; its coverage is how often `evaluation.intervals`
encloses that. `events` is the expected number of solved or of unsolved problems, whichever is rarer (of differences: of
problems where the two differ): with few of them coverage must leave 95% upwards, because nearly every draw is the same.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.machine import cpu_name
from prime_fast.evaluation import intervals

SIZES = (20, 21, 25, 30, 40, 60, 100, 200, 400)
SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 0.97)
SAMPLES, CHOICES = 16, 4  # k of avg@k; n of pass@n and best of n
SPREADS = (
    0.3,
    1.0,
    4.0,
    30.0,
)  # a + b of the beta distribution of a problem's difficulty: from all or nothing to alike
SOURCES = (
    [3] * 7,
    [3] * 20,
    [5] * 4,
    [5] * 20,
    [10] * 3,
    [10] * 10,
    [3, 4, 5, 6, 7, 8, 9, 10],
    [4, 6, 8, 10],
    [30, 40, 83, 272, 500, 675],
)
EVENTS = 5.0  # from here on coverage must not exceed 95% by much either


class Case(NamedTuple):
    family: str
    problems: int
    events: float
    coverage: float


def pass_at_1(sizes=SIZES, grid: int = 400) -> Iterator[Case]:
    """Exactly, by enumeration of the number of solved problems."""
    for n in sizes:
        solved = np.arange(n + 1)
        found = intervals.mean([(np.arange(n) < solved[:, None]).astype(float)])
        for p in np.linspace(0.5 / grid, 1 - 0.5 / grid, grid):
            yield Case("pass@1", n, n * min(p, 1 - p), float(_binomial(n, p) @ _within(found, p)))


def paired(sizes=SIZES[:7], shares=(0.0, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5)) -> Iterator[Case]:
    """Differences of pass@1, exactly: p of the problems only one model solves, q only the other."""
    for n in sizes:
        one, other = (part.ravel() for part in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
        keep = one + other <= n
        one, other = one[keep], other[keep]
        place = np.arange(n)
        values = (place < one[:, None]).astype(float) - (place >= n - other[:, None])
        found = intervals.difference([values])
        ways = [_log_choose(n, a + b) + _log_choose(a + b, a) for a, b in zip(one, other, strict=True)]
        for p in shares:
            for q in shares:
                if 0 < p + q <= 1 and q <= p:
                    chance = np.exp(ways) * p**one * q ** other.astype(float) * (1 - p - q) ** (n - one - other)
                    yield Case("paired pass@1", n, n * (p + q), float(chance @ _within(found, p - q)))


def sampled(repeats: int, seed: int = 0, sizes=SIZES[::2], shares=SHARES, spreads=SPREADS) -> Iterator[Case]:
    """avg@16, pass@4, best of 4 (of half the problems the right one is found wherever there is one), and differences of
    avg@16 between a model and one that solves sample k of a problem with the square root of its chance."""
    rng = np.random.default_rng(seed)
    table = 1 - np.array([math.comb(SAMPLES - r, CHOICES) for r in range(SAMPLES + 1)]) / math.comb(SAMPLES, CHOICES)
    for n in sizes:
        for p in shares:
            for spread in spreads:
                a, b = p * spread, (1 - p) * spread
                chance = rng.beta(a, b, size=(repeats, n))
                right = rng.binomial(SAMPLES, chance)
                share, oracle = right / SAMPLES, table[right]
                any_right = 1 - math.prod((b + i) / (a + b + i) for i in range(CHOICES))
                half = rng.random((repeats, n)) < 0.5
                better = rng.binomial(SAMPLES, np.sqrt(chance)) / SAMPLES - share
                gain = math.exp(_log_beta(a + 0.5, b) - _log_beta(a, b)) - p
                for family, values, mean in (
                    ("avg@k", share, p),
                    ("pass@k", oracle, any_right),
                    ("best of n", np.where(half, oracle, share), (any_right + p) / 2),
                ):
                    covered = _within(intervals.mean([values]), mean).mean()
                    yield Case(family, n, n * min(mean, 1 - mean), float(covered))
                covered = _within(intervals.difference([better]), gain).mean()
                yield Case("paired avg@k", n, n * float(np.abs(better).mean()), float(covered))


def averages(repeats: int, seed: int = 0, sources=SOURCES, shares=(0.1, 0.3, 0.5, 0.8), rounds: int = 2):
    """Macro-averages over sources of a few rows: of outcomes, of avg@16, of paired differences. The sources' own
    accuracies scatter about the share."""
    rng = np.random.default_rng(seed)
    for sizes in sources:
        even = len(sizes) ** 2 / sum(1 / n for n in sizes)  # problems evenly spread that are worth as much
        for p in shares:
            for spread in (2.0, 10.0, 1e4):
                for _ in range(rounds):
                    own = rng.beta(p * spread, (1 - p) * spread, size=len(sizes)).clip(1e-6, 1 - 1e-6)
                    outcome = [rng.random((repeats, n)) < q for n, q in zip(sizes, own, strict=True)]
                    share = [
                        rng.binomial(SAMPLES, rng.beta(q, 1 - q, size=(repeats, n))) / SAMPLES
                        for n, q in zip(sizes, own, strict=True)
                    ]
                    lost = [rng.random(x.shape) < 0.3 for x in outcome]  # of what is solved, by the other model
                    won = [rng.random(x.shape) < 0.2 for x in outcome]  # of what is not
                    change = [
                        np.where(x, -1.0 * lose, 1.0 * win) for x, lose, win in zip(outcome, lost, won, strict=True)
                    ]
                    for family, values, mean, interval in (
                        ("average of pass@1", [x.astype(float) for x in outcome], own.mean(), intervals.mean),
                        ("average of avg@k", share, own.mean(), intervals.mean),
                        ("paired average", change, (0.2 - 0.5 * own).mean(), intervals.difference),
                    ):
                        rare = min(mean, 1 - mean) if interval is intervals.mean else (0.2 + 0.1 * own).mean()
                        covered = _within(interval(values), mean).mean()
                        yield Case(family, sum(sizes), even * rare, float(covered))


def summary(cases: list[Case]) -> dict[str, dict[str, float]]:
    table = {}
    for family in dict.fromkeys(case.family for case in cases):
        every = np.array([case.coverage for case in cases if case.family == family])
        sure = np.array([case.coverage for case in cases if case.family == family and case.events >= EVENTS])
        table[family] = {
            "cases": len(every),
            "lowest": every.min(),
            "with_5_events": {
                "cases": len(sure),
                "lowest": sure.min(),
                "mean": sure.mean(),
                "highest": sure.max(),
                "within_93_to_97": float(((sure >= 0.93) & (sure <= 0.97)).mean()),
            },
        }
    return table


def _within(found: intervals.Estimate, value: float) -> np.ndarray:
    return (found.low <= value + 1e-12) & (value - 1e-12 <= found.high)


def _binomial(n: int, p: float) -> np.ndarray:
    return np.exp([_log_choose(n, x) + x * math.log(p) + (n - x) * math.log1p(-p) for x in range(n + 1)])


def _log_choose(n: int, x: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(x + 1) - math.lgamma(n - x + 1)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "intervals.json")
    options = parser.parse_args()
    cases = [*pass_at_1(), *paired(), *sampled(options.repeats), *averages(options.repeats)]
    table = summary(cases)
    for family, row in table.items():
        sure = row["with_5_events"]
        print(
            f"{family:18} {row['cases']:5} cases, lowest {row['lowest']:.3f}; with 5 events: {sure['cases']:5} cases, "
            f"{sure['lowest']:.3f} to {sure['highest']:.3f}, mean {sure['mean']:.3f}, "
            f"{sure['within_93_to_97']:.0%} within 93 to 97%"
        )
    result = {"cpu": cpu_name(), "repeats": options.repeats, "coverage": table}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
