"""What a PRM's log-ratios are worth: their weight in the log-odds of success, fitted to the rollouts of earlier steps.

With S_j = beta * (sum of log PRM - log reference over the first j steps), V_j = sigmoid(logit(others) + slope * (S_j -
drift * j)) is the chance that a response succeeds after them, `others` the mean outcome of the prompt's others.
Logistic regression gives slope and drift, which is what S gains a step whatever the outcome. A response's prefixes are
not independent, so standard errors are clustered by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prime_kernels.reference_credit import standardised, step_ends

PREFIXES = 8  # of a response, evenly spread over its steps
ROUNDS = 50  # of Newton's method, which converges in about 6
RIDGE = 1e-3  # of the fit, in responses: only holds what the data leave open
BINS = 10  # of the calibration error
FLAT = 1e-9  # a root mean square of S below this, in log-odds, is rounding


class Prefixes(NamedTuple):
    """Prefixes of a step's responses, each at the end of a step but the response's last; P of them, float64."""

    response: Tensor  # (P,) int64, a number within the step
    weight: Tensor  # (P,) those of a response sum to 1
    total: Tensor  # (P,) S at its end
    before: Tensor  # (P,) S one step earlier
    steps: Tensor  # (P,) that it has
    deviation: Tensor  # (P,) of the step's log-ratio, as credit "odds" standardises it
    outcome: Tensor  # (P,) of the response
    others: Tensor  # (P,) mean outcome of the other responses, never 0 or 1
    baseline: Tensor  # (P,) the same as the advantage subtracts it


class Fit(NamedTuple):
    slope: float = 0.0  # never below 0
    drift: float = 0.0  # of S, a step
    evidence: float = 0.0  # 1 - 4 / t^2 where the slope is t > 2 standard errors, else 0
    explained: float = 0.0  # share of the outcomes' variance about their baselines that V explains
    step_effect: float = 0.0  # what a standard deviation of a step's log-ratio adds to the outcome
    step_evidence: float = 0.0  # as evidence, of step_effect
    spread: float = 0.0  # root mean square of outcomes about their baselines
    mean: float = 0.5  # outcome


def prefixes(
    log_ratio: Tensor,
    cu_seqlens: Tensor,
    step: Tensor | None,
    outcome: Tensor,
    others: Tensor,
    baseline: Tensor,
    beta: float,
) -> Prefixes:
    """log_ratio (T,) nats; cu_seqlens (R+1,); step (T,) as in prime_kernels.prime_advantage; the rest (R,). On CPU."""
    totals, steps = step_totals(log_ratio.double(), cu_seqlens.long(), step)
    index = torch.arange(len(totals)) - steps[:-1].repeat_interleave(steps.diff())
    sums = totals - torch.where(index > 0, totals.roll(1), 0.0)
    deviation = standardised(sums, index, None)
    inner = steps.diff() - 1  # a response's steps but the last
    count = inner.clamp(max=PREFIXES)
    k = torch.arange(PREFIXES)
    chosen = k < count[:, None]
    at = (steps[:-1, None] + (k + 1) * inner[:, None] // (count[:, None] + 1))[chosen]
    response = torch.arange(len(outcome))[:, None].expand_as(chosen)[chosen]
    rows = (x.double()[response] for x in (outcome, others, baseline))
    total = beta * totals[at]
    before = total - beta * sums[at]
    return Prefixes(response, 1 / count[response], total, before, index[at] + 1.0, deviation[at], *rows)


def step_totals(x: Tensor, cu_seqlens: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor]:
    """(S,): the sum of each row's x up to the end of each of its steps; (R+1,): where the rows' steps begin."""
    ends, steps = step_ends(step, cu_seqlens, len(x))
    total = x.cumsum(0)
    start = (total - x)[cu_seqlens[:-1]].repeat_interleave(cu_seqlens.diff())
    return (total - start)[ends], steps


def value(total: Tensor, steps: Tensor, others: Tensor, fit: Fit) -> Tensor:
    return torch.sigmoid(others.logit() + fit.slope * (total - fit.drift * steps))


def expected(total: Tensor, steps: Tensor, others: Tensor, baseline: Tensor, fit: Fit) -> Tensor:
    """The outcome that is expected after a prefix: the baseline, moved by what V has moved since the response began."""
    start = torch.zeros_like(total)
    return baseline + (value(total, steps, others, fit) - value(start, start, others, fit))


def fit(steps: Sequence[Prefixes]) -> Fit:
    """Of the prefixes of several steps."""
    if not sum(len(p.weight) for p in steps):
        return Fit()
    sizes = torch.tensor([int(p.response.max()) + 1 if len(p.response) else 0 for p in steps]).cumsum(0).tolist()
    parts = [p._replace(response=p.response + first) for p, first in zip(steps, [0, *sizes], strict=False)]
    data = Prefixes(*map(torch.cat, zip(*parts, strict=True)))
    error = data.outcome - data.baseline
    mean, variance = _mean(data.outcome, data), float(_mean(error.square(), data))
    known = Fit(spread=math.sqrt(variance), mean=float(mean))
    scale = float(_mean(data.total.square(), data).sqrt())
    if scale < FLAT or not variance:
        return known
    slope, drift, deviation = _regression(data, scale)
    if slope <= 0:
        return known
    found = known._replace(slope=slope, drift=drift, evidence=_evidence(slope, deviation))
    used = found._replace(slope=slope * found.evidence)
    residual = data.outcome - expected(data.total, data.steps, data.others, data.baseline, used)
    explained = 1 - float(_mean(residual.square(), data)) / variance
    rest = data.outcome - expected(data.before, data.steps - 1, data.others, data.baseline, used)
    squares = data.weight * data.deviation.square()
    effect = float((data.weight * data.deviation * rest).sum() / squares.sum()) if squares.sum() > 0 else 0.0
    score = data.weight * data.deviation * (rest - effect * data.deviation)
    error_of_effect = float(_by_response(score, data).square().sum().sqrt() / squares.sum()) if effect else 0.0
    return found._replace(
        explained=explained, step_effect=max(0.0, effect), step_evidence=_evidence(effect, error_of_effect)
    )


def expected_at(share: float, totals: Tensor, steps: Tensor, others: Tensor, baseline: Tensor, fit: Fit) -> Tensor:
    """(R,): the outcome expected of each response after this share of its steps. totals, steps: `step_totals` of S."""
    done = (share * steps.diff()).long()
    total = torch.where(done > 0, totals[(steps[:-1] + done - 1).clamp(min=0)], 0.0)
    return expected(total, done.double(), others, baseline, fit)


def calibration_error(data: Prefixes, fit: Fit) -> float:
    """Mean |mean V - mean outcome| over bins of equally many prefixes, ordered by V."""
    found = value(data.total, data.steps, data.others, fit)
    order = found.argsort(stable=True)
    pairs = zip(found[order].tensor_split(BINS), data.outcome[order].tensor_split(BINS), strict=True)
    gaps = [(len(v) / len(found), float((v.mean() - o.mean()).abs())) for v, o in pairs if len(v)]
    return sum(share * gap for share, gap in gaps)


def _regression(data: Prefixes, scale: float) -> tuple[float, float, float]:
    """Slope, drift and the slope's standard error, by Newton's method on S and steps in units of their size."""
    length = float(_mean(data.steps.square(), data).sqrt())
    x = torch.stack([data.total / scale, data.steps / length], 1)
    intercept, found = data.others.logit(), x.new_zeros(2)
    for _ in range(ROUNDS):
        chance = torch.sigmoid(intercept + x @ found)
        gradient = x.T @ (data.weight * (chance - data.outcome)) + RIDGE * found
        curvature = (x.T * (data.weight * chance * (1 - chance))) @ x + RIDGE * torch.eye(2, dtype=x.dtype)
        move = torch.linalg.solve(curvature, gradient)
        found = found - move.clamp(-2, 2)
        if move.abs().max() < 1e-12:
            break
    score = x * (data.weight * (chance - data.outcome))[:, None]
    bread, meat = torch.linalg.inv(curvature), _by_response(score, data)
    covariance = bread @ (meat.T @ meat) @ bread
    slope, loss = float(found[0]) / scale, float(found[1]) / length
    return slope, -loss / slope if slope > 0 else 0.0, math.sqrt(float(covariance[0, 0])) / scale


def _by_response(x: Tensor, data: Prefixes) -> Tensor:
    return x.new_zeros((int(data.response.max()) + 1, *x.shape[1:])).index_add_(0, data.response, x)


def _mean(x: Tensor, data: Prefixes) -> Tensor:
    return (data.weight * x).sum() / data.weight.sum()


def _evidence(effect: float, deviation: float) -> float:
    """What shrinkage by James and Stein leaves of an effect: 0 up to two standard errors."""
    return max(0.0, 1 - 4 * (deviation / effect) ** 2) if effect > 0 else 0.0
