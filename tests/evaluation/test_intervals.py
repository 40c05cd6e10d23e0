"""The promise: from 20 problems on, 95% intervals enclose the truth in at least 93% of the cases (paired ones 92%), and
in not much more than 97% where 5 problems of the rarer kind are expected (averages of tiny sources: more)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import intervals as simulation
from prime_fast.evaluation import intervals

REPEATS, NOISE = 1500, 0.02  # three standard errors of a coverage of 0.95 among so many, and a little


def check(cases, lowest, highest, mean=(0.945, 0.965)):
    cases = list(cases)
    sure = [case.coverage for case in cases if case.events >= simulation.EVENTS]
    worst = min(cases, key=lambda case: case.coverage)
    assert worst.coverage >= lowest, worst
    assert max(sure) <= highest and mean[0] <= np.mean(sure) <= mean[1], (max(sure), np.mean(sure))


def test_pass_at_1_by_enumeration():
    check(simulation.pass_at_1((20, 21, 27, 30, 50, 100)), 0.93, 0.982)


def test_paired_differences_by_enumeration():
    check(simulation.paired((20, 21, 30, 60)), 0.92, 0.98)


def test_samples():
    cases = list(simulation.sampled(REPEATS, sizes=(20, 60), shares=(0.02, 0.1, 0.5, 0.9), spreads=(0.3, 1.0, 30.0)))
    for family in ("avg@k", "pass@k", "best of n", "paired avg@k"):
        check([case for case in cases if case.family == family], 0.93 - NOISE, 0.98 + NOISE, (0.94, 0.97))


def test_averages_of_small_sources():
    sources = ([3] * 7, [5] * 4, [10] * 3, [3, 4, 5, 6, 7, 8, 9, 10])
    cases = list(simulation.averages(REPEATS, sources=sources, shares=(0.1, 0.5), rounds=1))
    for family in ("average of pass@1", "average of avg@k", "paired average"):
        check([case for case in cases if case.family == family], 0.93 - NOISE, 1.0, (0.94, 0.98))


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=9), min_size=1, max_size=5),
    st.sampled_from([intervals.mean, intervals.difference]),
)
def test_every_interval_encloses_its_value_and_has_a_width(benchmarks, interval):
    benchmarks = [np.array(values) for values in benchmarks]
    value, low, high = interval(benchmarks)
    assert value == pytest.approx(np.mean([values.mean() for values in benchmarks]))
    assert (0 if interval is intervals.mean else -1) <= low <= value + 1e-9 and value - 1e-9 <= high <= 1
    assert high - low > 0.05
    if interval is intervals.difference:
        mirrored = interval([-values for values in benchmarks])
        assert (-mirrored.high, -mirrored.low) == pytest.approx((low, high))


def test_known_values():
    """Agresti and Coull's interval of 0 of 30 and Bonett and Price's of 8 against 3 of 40, with a problem less."""
    assert intervals.mean([np.zeros(30)]) == pytest.approx((0.0, 0.0, 0.1348), abs=1e-4)
    values = np.array([1.0] * 8 + [-1.0] * 3 + [0.0] * 29)
    value, low, high = intervals.difference([values])
    assert value == pytest.approx(0.125) and (low, high) == pytest.approx((-0.0453, 0.2834), abs=3e-3)


def test_benchmarks_count_alike_however_many_problems_they_have():
    rng = np.random.default_rng(1)
    small, large = (rng.random(40) < 0.5).astype(float), (rng.random(4000) < 0.9).astype(float)
    one, both = intervals.mean([large]), intervals.mean([small, large])
    assert (one.high - one.low) / 2 == pytest.approx(1.96 * large.std() / np.sqrt(4000), rel=0.02)
    assert both.value == pytest.approx((small.mean() + large.mean()) / 2)
    assert (both.high - both.low) / 2 == pytest.approx(1.96 * small.std() / np.sqrt(40) / 2, rel=0.15)


def test_values_of_less_spread_than_outcomes_have_narrower_intervals():
    rng = np.random.default_rng(2)
    values = rng.uniform(0.4, 0.6, size=400)
    low, high = intervals.mean([values])[1:]
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
