"""What the credit forms of prime_advantage mean, in float64: log-ratios as a calibrated value of each prefix."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from prime_kernels.reference import (
    Advantage,
    all_reduce,
    group_moments,
    places,
    prefix_sum,
    segment_sum,
    suffix_sum,
    whitened,
)

CREDITS = ("critic", "pav", "lookahead", "odds", "td")
CLIP = 3.0  # deviations of a step's log-ratio that still count, of "odds"
LN2 = (0.6931471803691238, 1.9082149292705877e-10)  # the first with zeros at its end, their sum log 2
LOG_RATIO_FLOOR = 1e-6  # nats: deviations of log-ratios far below it are rounding


def advantage(
    prm_logprob, ref_logprob, outcome, cu_seqlens, group,
    *, credit, step, shrink, prior, slope, drift,
    beta, gamma, outcome_gamma, process_weight, outcome_weight, whiten, process_group,
) -> Advantage:  # fmt: skip
    """prime_kernels.prime_advantage on checked arguments, for a credit other than "published"."""
    dtype = outcome.dtype if prm_logprob is None else torch.promote_types(outcome.dtype, prm_logprob.dtype)
    outcome = outcome.double()
    row, to_end = places(cu_seqlens, int(cu_seqlens[-1]))
    q = outcome.new_zeros(len(row)) if prm_logprob is None else prm_logprob.double() - ref_logprob.double()
    others = others_mean(outcome, group, shrink, prior)
    result = outcome_weight * (outcome - others)[row] * outcome_gamma ** (to_end - 1).double()
    if process_weight:
        ends, steps = step_ends(step, cu_seqlens, len(row))
        total = prefix_sum(q, cu_seqlens.diff()[row] - to_end + 1)[ends]
        smoothed = others_mean(outcome, group, max(shrink, 1.0), prior)
        process = of_steps(credit, total, row[ends], steps, outcome, others, smoothed, beta, slope, drift,
                           gamma, process_group)  # fmt: skip
        result = result + process_weight * process[ends.cumsum(0) - ends.long()]
    if whiten:
        result = whitened(result, cu_seqlens, process_group)
    return Advantage(result.to(dtype), (beta * q).to(dtype), (beta * segment_sum(q, cu_seqlens)).to(dtype))


def step_ends(step: Tensor | None, cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(T,) bool: whether a token is the last of its step; (R+1,) int64: as cu_seqlens, of steps. step (T,) or None."""
    ends, last = torch.ones(tokens, dtype=torch.bool, device=cu_seqlens.device), cu_seqlens[1:].long() - 1
    if step is not None:
        ends[:-1] = step.diff() != 0
        ends[last] = True
    return ends, F.pad(ends.cumsum(0)[last], (1, 0))


def of_steps(credit, total, row, steps, outcome, others, start, beta, slope, drift, gamma, process_group) -> Tensor:
    """(S,): the process term of each step. total (S,): of q, up to the step's end; row (S,): the row of each step;
    steps (R+1,): where each row's steps begin; start (R,): V_{-1}; the rest (R,) or numbers."""
    first, last = torch.zeros_like(row, dtype=torch.bool), torch.zeros_like(row, dtype=torch.bool)
    first[steps[:-1]], last[steps[1:] - 1] = True, True

    def before(x: Tensor, start) -> Tensor:
        return torch.where(first, start, x.roll(1))

    index = torch.arange(len(row), device=row.device) - steps[row]
    if credit == "odds":
        return standardised(total - before(total, total.new_zeros(())), index, process_group).clamp(-CLIP, CLIP)
    odds, start = (start / (1 - start))[row], start[row]
    value = 1 / (1 + exp(slope * (drift * (index + 1).double() - beta * total)) / odds)
    previous = before(value, start)
    if credit == "critic":
        return start - previous
    if credit == "pav":
        return value - previous
    if credit == "lookahead":
        return torch.where(last, value, value.roll(-1)) - previous
    known = torch.where(last, outcome[row] - (others[row] - start), value)  # the value's end is the outcome itself
    return suffix_sum(known - previous, steps[1:][row] - torch.arange(len(row), device=row.device), gamma)


def others_mean(outcome: Tensor, group: Tensor, shrink: float, prior: float) -> Tensor:
    """(R,): the mean outcome of a row's fellows, and of `shrink` more of mean `prior`."""
    count, mean, _ = group_moments(outcome, group)
    return (count * mean - outcome + shrink * prior) / (count - 1 + shrink)


def standardised(x: Tensor, index: Tensor, process_group) -> Tensor:
    """(x - mean of the batch's x of that index) / root mean square of these: the same bits for any order of rows."""
    longest = all_reduce(index.max(), dist.ReduceOp.MAX, process_group).item() + 1
    count = torch.bincount(index, minlength=longest).double()
    order = x.argsort()
    order = order[index[order].argsort(stable=True)]
    sums = segment_sum(x[order], F.pad(count.long().cumsum(0), (1, 0)))
    sums, count = all_reduce(torch.stack([sums, count]), dist.ReduceOp.SUM, process_group)
    x = x - (sums / count)[index]
    moments = torch.stack([x.square().sort().values.sum(), x.new_tensor(float(len(x)))])
    squares, steps = all_reduce(moments, dist.ReduceOp.SUM, process_group)
    return x / ((squares / steps).sqrt() + LOG_RATIO_FLOOR)


def exp(x: Tensor) -> Tensor:
    """By sums and products alone, to 2e-16: torch's own has other bits in other places of a tensor."""
    x = x.clamp(-700, 700)
    power = (x / math.log(2)).round()
    rest = x - power * LN2[0] - power * LN2[1]
    result = torch.ones_like(x)
    for n in range(14, 0, -1):
        result = result * rest / n + 1
    return result * torch.exp2(power)
