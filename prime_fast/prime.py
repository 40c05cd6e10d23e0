"""The PRIME algorithm on log-probs, in pure torch: PRM loss, policy loss, group filter, PRM accuracy.

Rewards and advantages are `prime_kernels.prime_advantage`. The losses here take log-probs and share their maths with
`prime_kernels.linear_policy_loss` and `linear_prm_loss`, which start from hidden states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prime_kernels.reference import (
    group_moments,
    policy_token_loss,
    prm_prefix_logit,
    prm_prefix_loss,
    prm_row_loss,
    segment_sum,
)

ROUNDING = 1e-6  # a mean of float32 outcomes may miss an inclusive bound by this much


def prm_loss(
    prm_logprob: Tensor,
    ref_logprob: Tensor,
    outcome: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float = 0.05,
    kind: str = "ce",
    group: Tensor | None = None,
    intercept: Tensor | None = None,
) -> Tensor:
    """The implicit PRM's loss, the mean over rows; differentiable in prm_logprob.

    With Q the sum of prm_logprob - ref_logprob over a row,
    kind="ce" (the published run, PRIME-RL/PRIME 18ad596f) is BCE(sigmoid(beta * Q), outcome);
    kind="dpo" (detached DPO, verl-recipe 48ea0a79) is -log sigmoid(s * (beta * Q - other)), s = +1 if outcome > 0, else
    -1, other the detached mean of beta * Q over the group's rows of smaller outcome (s = +1) or of larger (s = -1), 0
    if there are none;
    kind="centered" is BCE(sigmoid(intercept + beta * Q), outcome);
    kind="prefix" (arXiv 2604.13197) is the mean over a row's tokens t of BCE(sigmoid(intercept + beta * S_t), outcome),
    S_t the sum up to and including t.

    prm_logprob, ref_logprob: (T,) float, nats; outcome: (R,) float in 0..1; cu_seqlens: (R+1,) int32 or int64, no empty
    row; group: (R,) int64, only for "dpo"; intercept: (R,) float, for "centered" and "prefix", see `prm_intercept`.
    Returns a scalar in the dtype of prm_logprob. Raises ValueError for another kind, for "dpo" without group and for
    those two without intercept.
    """
    if kind in ("centered", "prefix") and intercept is None:
        raise ValueError(f"kind={kind!r} starts from a log-odds of each row: pass intercept, as of prm_intercept")
    if kind == "prefix":
        logit = prm_prefix_logit(prm_logprob - ref_logprob, intercept, cu_seqlens, beta)
        return prm_prefix_loss(logit, outcome, cu_seqlens).mean().to(prm_logprob.dtype)
    score = beta * segment_sum(prm_logprob - ref_logprob, cu_seqlens)
    if kind == "centered":
        return prm_row_loss(intercept.to(score.dtype) + score, outcome.to(score.dtype)).mean()
    if kind == "ce":
        return prm_row_loss(score, outcome.to(score.dtype)).mean()
    if kind != "dpo":
        raise ValueError(f"kind is {kind!r}, needs 'ce', 'dpo', 'centered' or 'prefix'")
    if group is None:
        raise ValueError("kind='dpo' compares rows of a group: pass group, the id of each row's prompt")
    good = outcome > 0
    smaller = outcome[None, :] < outcome[:, None]
    opposite = torch.where(good[:, None], smaller, smaller.T) & (group[None, :] == group[:, None])
    other = opposite.to(score.dtype) @ score.detach() / opposite.sum(1).clamp(min=1)
    return -F.logsigmoid((score - other) * torch.where(good, 1, -1)).mean()


def prm_intercept(outcome: Tensor, group: Tensor) -> Tensor:
    """(R,) float64: the logit of (sum of the group's outcomes + 0.5) / (K + 1), which is never that of 0 or 1.

    As in arXiv 2604.13197 the row's own outcome is among them. outcome (R,) float in 0..1; group (R,) int64.
    """
    count, mean, _ = group_moments(outcome.double(), group)
    return ((count * mean + 0.5) / (count + 1)).logit()


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    token_weight: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """PPO-clip: sum(token_weight * max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))).

    ratio = exp(logprob - old_logprob), the exponent limited to +-20, beyond which its gradient is 0. All (T,) float;
    the result is a scalar, differentiable in logprob. token_weight = 1 / number of tokens is the token mean of the
    published code (PRIME-RL/PRIME 18ad596f).
    """
    loss, _ = policy_token_loss(logprob, old_logprob, advantage, clip_low, clip_high)
    return (token_weight * loss).sum()


def keep_groups(
    outcome: Tensor, group: Tensor, *, low: float = 0.2, high: float = 0.8, truncated: Tensor | None = None
) -> Tensor:
    """(R,) bool: whether low <= mean outcome of the row's group <= high, both inclusive (PRIME-RL/PRIME 18ad596f).

    outcome (R,) float; group (R,) int64, any ids in any order. truncated (R,) bool, optional: a group with a truncated
    row is not kept.
    """
    _, index, count = group.unique(return_inverse=True, return_counts=True)
    mean = torch.zeros_like(count, dtype=torch.float64).index_add(0, index, outcome.double()) / count
    keep = (mean >= low - ROUNDING) & (mean <= high + ROUNDING)
    if truncated is not None:
        keep[index[truncated]] = False
    return keep[index]


def on_last_token(token_reward: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T,): each row's sum of token rewards on its last token, 0 on the others (prime_granularity "whole" of
    PRIME-RL/PRIME 18ad596f). token_reward (T,) float; cu_seqlens (R+1,) int, no empty row."""
    total = torch.zeros_like(token_reward)
    total[cu_seqlens[1:].long() - 1] = segment_sum(token_reward, cu_seqlens)
    return total


def pair_loss(score: Tensor, outcome: Tensor, group: Tensor) -> Tensor:
    """DPO: the mean of -log sigmoid(score_i - score_j) over the pairs of rows of one group with outcome_i > outcome_j
    (arXiv 2412.01981, where score = beta * Q); differentiable in score.

    All (R,), group int64. Returns a scalar in the dtype of score. Raises ValueError if there is no such pair.
    """
    pairs = (outcome[:, None] > outcome[None, :]) & (group[:, None] == group[None, :])
    if not pairs.any():
        raise ValueError("no group has two rows of different outcomes, so there is no pair")
    return -F.logsigmoid((score[:, None] - score[None, :])[pairs]).mean()


def pair_accuracy(score: Tensor, outcome: Tensor, group: Tensor) -> tuple[float, int]:
    """(correct, pairs): of the pairs of rows of one group with different outcomes, how many the score orders alike.

    A tie of scores counts one half. All (R,). Sum both over ranks and divide; 0 pairs mean that there is no accuracy.
    """
    pairs = (outcome[:, None] > outcome[None, :]) & (group[:, None] == group[None, :])
    difference = (score[:, None] - score[None, :])[pairs]
    correct = (difference > 0).sum() + 0.5 * (difference == 0).sum()
    return correct.item(), difference.numel()


def length_correlation(length: Tensor, outcome: Tensor, group: Tensor) -> float | None:
    """Pearson's r of length and outcome about their groups' means: 1 where to be longer than another response to the
    same prompt is what pays. None where one of the two does not differ within any group. All (R,), group int64."""
    deviations = []
    for x in (length.double(), outcome.double()):
        _, mean, _ = group_moments(x, group)
        deviations.append(x - mean)
    (length_, outcome_), norms = deviations, [float(x.norm()) for x in deviations]
    return float(length_ @ outcome_) / (norms[0] * norms[1]) if min(norms) > ROUNDING else None


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Chance that a value of `positive` (P,) exceeds one of `negative` (N,), ties counting one half."""
    ranks = torch.cat([positive, negative]).double()
    order = ranks.sort().values
    below = torch.searchsorted(order, ranks, side="left")
    upto = torch.searchsorted(order, ranks, side="right")
    rank_sum = ((below + upto + 1).double() / 2)[: len(positive)].sum()
    return float((rank_sum - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))
