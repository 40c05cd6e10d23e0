"""What the ops mean, in plain torch: results, loss maths, rewards and advantages. Every back-end reproduces this."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp() of more overflows its gradient; the bound verl uses


class PolicyLoss(NamedTuple):
    loss: Tensor  # (), differentiable
    logprob: Tensor  # (N,)
    entropy: Tensor  # (N,)
    clip_fraction: Tensor  # ()
    approx_kl: Tensor  # ()


class PrmLoss(NamedTuple):
    loss: Tensor  # (), differentiable
    logprob: Tensor  # (N,)
    score: Tensor  # (R,)


class Advantage(NamedTuple):
    advantage: Tensor  # (T,)
    token_reward: Tensor  # (T,)
    score: Tensor  # (R,)


# ---- loss maths, one definition for the fused ops and prime_fast.prime; the gradients are tested against autograd


def policy_token_loss(logprob, old_logprob, advantage, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """PPO-clip loss of each token, and whether the clipped branch is the active one."""
    ratio = (logprob - old_logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(plain, clipped), clipped > plain


def policy_token_gradient(logprob, old_logprob, advantage, clip_low: float, clip_high: float) -> Tensor:
    """The derivative of policy_token_loss in logprob: 0 where the clipped branch is active, or the ratio is limited."""
    difference = logprob - old_logprob
    loss, clipped = policy_token_loss(logprob, old_logprob, advantage, clip_low, clip_high)
    return loss.masked_fill(clipped | (difference.abs() > MAX_LOG_RATIO), 0)


def importance_weight(logprob: Tensor, sampling_logprob: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling: min(probability / probability under which the token was sampled, cap)."""
    return (logprob - sampling_logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)


def kl_token_loss(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || ref) of each token."""
    difference = (ref_logprob - logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.expm1() - difference


def kl_token_gradient(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """The derivative of kl_token_loss in logprob."""
    difference = ref_logprob - logprob
    return -difference.expm1().masked_fill(difference.abs() > MAX_LOG_RATIO, 0)


def prm_row_loss(score: Tensor, outcome: Tensor) -> Tensor:
    """Cross-entropy of sigmoid(score) against an outcome in [0, 1], of each row."""
    return F.binary_cross_entropy_with_logits(score, outcome, reduction="none")


def prm_row_gradient(score: Tensor, outcome: Tensor) -> Tensor:
    """The derivative of prm_row_loss in score."""
    return score.sigmoid() - outcome


def prm_prefix_logit(log_ratio: Tensor, intercept: Tensor, cu_seqlens: Tensor, beta: float) -> Tensor:
    """(T,) float64: intercept_i + beta * S_t, S_t the sum of row i's log_ratio (T,) up to and including token t."""
    row, to_end = places(cu_seqlens, len(log_ratio))
    sums = prefix_sum(log_ratio.double(), cu_seqlens.diff()[row] - to_end + 1, longest=len(row))
    return intercept.double()[row] + beta * sums


def prm_prefix_loss(logit: Tensor, outcome: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(R,) float64: the mean of prm_row_loss over a row's tokens, of prm_prefix_logit (T,); arXiv 2604.13197."""
    row, _ = places(cu_seqlens, len(logit))
    return segment_sum(prm_row_loss(logit, outcome.double()[row]), cu_seqlens) / cu_seqlens.diff()


def prm_prefix_gradient(logit: Tensor, outcome: Tensor, cu_seqlens: Tensor, beta: float) -> Tensor:
    """(T,) float64: the derivative of a row's prm_prefix_loss in each of its log-ratios, a sum over those after it."""
    row, to_end = places(cu_seqlens, len(logit))
    error = prm_row_gradient(logit, outcome.double()[row])
    return beta * suffix_sum(error, to_end, longest=len(row)) / cu_seqlens.diff()[row]


def places(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Of each token, (T,): its row, and how many tokens there are from it on to the row's end."""
    rows = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    row = rows.repeat_interleave(cu_seqlens.diff(), output_size=tokens)
    return row, cu_seqlens[1:][row] - torch.arange(tokens, device=row.device)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T,) -> (R,): the sum of each row, in float64 inside, whatever its neighbours; differentiable."""
    sums = torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens, unsafe=True)
    return sums.to(values.dtype)


# ---- advantages, in float64


def advantage(
    prm_logprob, ref_logprob, outcome, cu_seqlens, group,
    *, beta, gamma, outcome_gamma, process_weight, outcome_weight, estimator, form, normalize, whiten, process_group,
) -> Advantage:  # fmt: skip
    """prime_kernels.prime_advantage on checked arguments."""
    dtype = outcome.dtype if prm_logprob is None else torch.promote_types(outcome.dtype, prm_logprob.dtype)
    outcome, lengths = outcome.double(), cu_seqlens.diff()
    row, to_end = places(cu_seqlens, int(cu_seqlens[-1]))
    result = outcome.new_zeros(len(row))
    q = result if prm_logprob is None else prm_logprob.double() - ref_logprob.double()
    if process_weight:
        reward = beta * q
        if normalize == "batch":
            largest = all_reduce(suffix_sum(q, to_end).abs().max(), dist.ReduceOp.MAX, process_group)
            reward = q / (largest + 1e-6)
        center, scale = baseline(segment_sum(reward, cu_seqlens) / lengths, group, estimator, form)
        result = result + process_weight * suffix_sum((reward - center[row]) * scale[row], to_end, gamma)
    if outcome_weight:
        center, scale = baseline(outcome, group, estimator, form)
        result = result + outcome_weight * ((outcome - center) * scale)[row] * outcome_gamma ** (to_end - 1).double()
    if whiten:
        result = whitened(result, cu_seqlens, process_group)
    return Advantage(result.to(dtype), (beta * q).to(dtype), (beta * segment_sum(q, cu_seqlens)).to(dtype))


def suffix_sum(x: Tensor, to_end: Tensor, gamma: float = 1.0, longest: int | None = None) -> Tensor:
    """sum over s >= t of gamma^(s-t) x_s within each row, by doubling: log2(longest row) passes. longest: as many
    tokens as a row has at most, or more; without, a GPU is asked and waited for.

    A token meets only its own row, at distances from itself: the bits do not depend on how rows are packed.
    """
    x, step, longest = x.clone(), 1, to_end.max().item() if longest is None else longest
    while step < longest:
        x[:-step] += (x[step:] * gamma**step).masked_fill_(to_end[:-step] <= step, 0)
        step *= 2
    return x


def prefix_sum(x: Tensor, from_start: Tensor, longest: int | None = None) -> Tensor:
    """sum over s <= t of x_s within each row. from_start (T,): how many tokens there are from the row's start to this
    one, which counts. Bits and longest: see suffix_sum."""
    return suffix_sum(x.flip(0), from_start.flip(0), longest=longest).flip(0)


def baseline(values: Tensor, group: Tensor, estimator: str, form: str) -> tuple[Tensor, Tensor]:
    """(center, scale) of each row, (R,): a term x of that row enters the advantage as (x - center) * scale."""
    if estimator == "reinforce":
        return torch.zeros_like(values), torch.ones_like(values)
    count, mean, std = group_moments(values, group)
    if estimator == "grpo":
        return mean, torch.where(std > 0, 1 / (std + 1e-6), 0)
    if form == "paper":
        return (count * mean - values) / (count - 1), torch.ones_like(values)
    return mean, count / (count - 1)


def group_moments(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and unbiased standard deviation of each row's group, (R,); the same bits for any order of the rows.

    Values are summed in ascending order and relative to the smallest, so equal values have a deviation of exactly 0.
    """
    _, index, count = group.unique(return_inverse=True, return_counts=True)
    order = values.argsort()
    order = order[index[order].argsort(stable=True)]
    offsets, count = F.pad(count.cumsum(0), (1, 0)), count.to(values.dtype)
    smallest = values[order][offsets[:-1]]
    centered = values[order] - smallest[index[order]]
    mean = segment_sum(centered, offsets) / count
    squares = segment_sum((centered - mean[index[order]]).square(), offsets)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return count[index], (smallest + mean)[index], std[index]


def whitened(x: Tensor, cu_seqlens: Tensor, process_group) -> Tensor:
    """(x - mean) / sqrt(unbiased variance + 1e-8), with the moments of all tokens of all ranks."""

    def total(values: Tensor) -> Tensor:
        return segment_sum(values, cu_seqlens).sort().values.sum()  # sorted: the order of the rows leaves no trace

    moments = torch.stack([total(x), x.new_tensor(float(len(x)))])
    sum_, count = all_reduce(moments, dist.ReduceOp.SUM, process_group)
    x = x - sum_ / count
    squares = all_reduce(total(x.square()), dist.ReduceOp.SUM, process_group)
    return x / (squares / (count - 1).clamp(min=1) + 1e-8).sqrt()


def all_reduce(x: Tensor, op, process_group) -> Tensor:
    if process_group is not None:
        dist.all_reduce(x, op=op, group=process_group)
    return x
