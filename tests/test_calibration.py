import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_fast import calibration
from prime_fast.calibration import Fit, Prefixes
from prime_fast.credit import trusted


def simulated(responses=4000, steps=6, slope=0.8, drift=0.3, seed=None, length=3):
    """Outcomes drawn from sigmoid(logit(others) + slope * walk), S a random walk plus the drift of each step."""
    generator = torch.Generator().manual_seed(torch.seed() % 10**6 if seed is None else seed)
    increments = torch.randn(responses, steps, generator=generator, dtype=torch.float64)
    others = torch.rand(responses, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    chance = torch.sigmoid(others.logit() + slope * increments.sum(1))
    outcome = (torch.rand(responses, generator=generator, dtype=torch.float64) < chance).double()
    log_ratio = ((increments + drift) / length).repeat_interleave(length, 1).flatten()  # spread over a step's tokens
    cu_seqlens = torch.arange(responses + 1) * steps * length
    step = torch.arange(steps).repeat_interleave(length).repeat(responses).int()
    return log_ratio, cu_seqlens, step, outcome, others


def seen(data, beta=1.0):
    return calibration.prefixes(*data, baseline=data[-1], beta=beta)


def test_prefixes_of_a_response():
    """Every step's end but the last where they are few, else evenly spread ones."""
    log_ratio = torch.arange(1.0, 30.0)
    lengths = torch.tensor([1, 3, 25])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    rows = torch.tensor([1.0, 0.0, 1.0])
    found = calibration.prefixes(log_ratio, cu_seqlens, None, rows, rows / 3 + 0.1, rows, beta=2.0)
    assert found.response.tolist() == [1, 1] + [2] * 8
    assert found.weight.tolist() == [0.5] * 2 + [1 / 8] * 8
    assert found.total[:2].tolist() == [2 * 2.0, 2 * 5.0] and found.before[:2].tolist() == [0.0, 4.0]
    places = [(k + 1) * 24 // 9 for k in range(8)]
    assert found.total[2:].tolist() == [2 * sum(range(5, 6 + place)) for place in places]
    assert found.outcome.tolist() == [0.0] * 2 + [1.0] * 8


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_step_totals(data):
    rows = data.draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=1, max_size=4))
    x = torch.randn(sum(map(sum, rows)), dtype=torch.float64)
    step = torch.tensor([j for row in rows for j, length in enumerate(row) for _ in range(length)])
    cu_seqlens = torch.tensor([0, *(sum(map(sum, rows[: i + 1])) for i in range(len(rows)))])
    totals, steps = calibration.step_totals(x, cu_seqlens, step)
    assert steps.diff().tolist() == [len(row) for row in rows]
    parts = iter(totals.tolist())
    for i, row in enumerate(rows):
        for j in range(len(row)):
            start = int(cu_seqlens[i])
            assert math.isclose(next(parts), float(x[start : start + sum(row[: j + 1])].sum()), abs_tol=1e-12)


def test_the_fit_finds_what_the_outcomes_were_drawn_from():
    """At full length; before it, S is as likely to rise as to fall, which pulls V towards the middle a little."""
    log_ratio, cu_seqlens, step, outcome, others = simulated(40000)
    total = log_ratio.view(40000, -1).sum(1)
    ones, number = torch.ones(40000), torch.arange(40000)
    whole = Prefixes(number, ones, total, total, 6 * ones, 0 * ones, outcome, others, others)
    fit = calibration.fit([Prefixes(*(x.double() if x.is_floating_point() else x for x in whole))])
    assert abs(fit.slope - 0.8) < 0.06 and abs(fit.drift - 0.3) < 0.02 and fit.evidence > 0.99
    shorter = calibration.fit([seen((log_ratio, cu_seqlens, step, outcome, others))])
    assert 0.4 < shorter.slope < 0.8 and abs(shorter.drift - 0.3) < 0.03 and shorter.explained > 0.1


def test_the_fit_is_at_the_minimum_and_does_not_depend_on_the_unit():
    data = simulated(300)
    points = seen(data)
    fit, scaled = calibration.fit([points]), calibration.fit([seen((data[0] * 1e-3, *data[1:]))])
    assert math.isclose(fit.slope, scaled.slope * 1e-3, rel_tol=1e-6) and math.isclose(
        fit.drift * 1e-3, scaled.drift, rel_tol=1e-6
    )
    assert math.isclose(fit.evidence, scaled.evidence, rel_tol=1e-6)

    def loss(slope, drift):
        v = torch.sigmoid(
            points.others.logit() + (fit.slope + slope) * (points.total - (fit.drift + drift) * points.steps)
        )
        return float(-(points.weight * torch.where(points.outcome > 0, v, 1 - v).log()).sum())

    for slope, drift in ((0.02, 0), (-0.02, 0), (0, 0.02), (0, -0.02)):
        assert loss(slope, drift) > loss(0, 0) - 1e-4


def test_steps_of_different_size_count_each_response_once():
    data, more = seen(simulated(200)), seen(simulated(100))
    together = calibration.fit([data, more])
    joined = Prefixes(*(torch.cat(x) for x in zip(data, more._replace(response=more.response + 200), strict=True)))
    assert together == calibration.fit([joined])


def test_noise_has_no_weight():
    """A PRM without information: of 60 fits few pass the gate, with little weight, and none has a negative slope."""
    kept, weight = 0, 0.0
    for _ in range(60):
        fit = calibration.fit([seen(simulated(256, slope=0.0))])
        slope, _ = trusted(fit, "evidence", "pav")
        assert fit.slope >= 0 and 0 <= fit.evidence < 1
        kept += slope > 0
        weight += fit.evidence
    assert kept <= 8 and weight / 60 < 0.06


@pytest.mark.parametrize("credit", ["pav", "odds"])
def test_what_is_against_the_outcomes_is_not_used(credit):
    fit = calibration.fit([seen(simulated(500, slope=-1.0))])
    assert trusted(fit, "evidence", credit) == (0.0, 1.0 if credit == "pav" else 0.0)


def test_the_gate_of_odds():
    fit = calibration.fit([seen(simulated(2000, slope=0.5))])
    assert fit.step_evidence > 0.9 and 0.02 < fit.step_effect < fit.spread < 0.6
    assert trusted(fit, "none", "odds")[1] == fit.spread
    assert math.isclose(trusted(fit, "evidence", "odds")[1], fit.spread * fit.step_evidence)
    assert math.isclose(trusted(fit, "size", "odds")[1], fit.step_effect * fit.step_evidence)
    assert trusted(fit._replace(explained=-0.1), "evidence", "pav") == (0.0, 1.0)
    assert trusted(fit._replace(explained=-0.1), "none", "pav") == (fit.slope, 1.0)


@pytest.mark.parametrize("steps", [[], ["equal"], ["one token"], ["all right"]])
def test_nothing_to_learn_from(steps):
    """No step yet, a PRM that equals its reference, responses of one token, one outcome."""
    made = []
    for kind in steps:
        log_ratio, cu_seqlens, step, outcome, others = simulated(20, steps=1 if kind == "one token" else 4)
        log_ratio = torch.zeros_like(log_ratio) if kind == "equal" else log_ratio
        outcome = torch.ones_like(outcome) if kind == "all right" else outcome
        made.append(seen((log_ratio, cu_seqlens, step, outcome, others)))
    fit = calibration.fit(made)
    assert math.isfinite(fit.slope) and trusted(fit, "evidence", "pav")[0] * fit.evidence == 0 or steps == ["all right"]
    assert all(map(math.isfinite, fit))


def test_value_metrics():
    data = simulated(20000, slope=1.0)
    log_ratio, cu_seqlens, step, outcome, others = data
    fit = calibration.fit([seen(data)])
    totals, steps = calibration.step_totals(log_ratio, cu_seqlens, step)
    explained = []
    for share in (0.0, 0.5, 1.0):
        found = calibration.expected_at(share, totals, steps, others, others, fit)
        explained.append(1 - float((outcome - found).square().mean() / (outcome - others).square().mean()))
    assert explained[0] == 0 and 0.05 < explained[1] < explained[2]
    assert calibration.calibration_error(seen(data), fit) < 0.06
    assert calibration.calibration_error(seen(data), Fit(slope=10.0)) > 0.1
