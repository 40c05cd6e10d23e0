"""Between the two token passes of prime_advantage: from the sums of rows to the coefficients of their advantages."""

import torch
import torch.distributed as dist
from torch import Tensor

from prime_kernels.reference import all_reduce, baseline

FIELDS = 11  # rows of `sums`: peak, total, s, ss, sg, so, g, gg, go, o, oo


def coefficients(
    sums: Tensor, outcome: Tensor, lengths: Tensor, group: Tensor,
    *, beta, process_weight, outcome_weight, estimator, form, normalize, whiten, process_group,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """-> coefficients (3, R) = a, b, c and moments (2,) = mean, 1 / standard deviation; float64.

    The advantage of the token n places before the end of its row is (a S_n + b G_n + c O_n - mean) / deviation, with
    S_n the discounted sum of token rewards from there on, G_n the same of ones, O_n = outcome_gamma^n. `sums` (11, R)
    float64 holds, of each row, the largest |undiscounted S_n|, the sum of token rewards, and the sums over n of
    S, S^2, SG, SO, G, G^2, GO, O, O^2: enough for the moments of all advantages before one is written. None when the
    sums or the arguments hold a bad value.

    With several ranks there are two small all-reduces, of the largest S_n and of the moments.
    """
    alone = estimator != "reinforce" and (group.unique(return_counts=True)[1] == 1).any()
    checked = sums[: 2 if process_weight else 1]  # the peak of a row with bad offsets is infinite, with any weights
    if alone or not (outcome.isfinite().all() and checked.isfinite().all()):
        return None
    peak, total, s, ss, sg, so, g, gg, go, o, oo = sums
    outcome = outcome.double()
    a, b, c = (torch.zeros_like(outcome) for _ in range(3))
    if process_weight:
        unit = torch.ones_like(peak[0])
        if normalize == "batch":
            unit = all_reduce(peak.max(), dist.ReduceOp.MAX, process_group) + 1e-6 * beta
        center, scale = baseline(total / lengths / unit, group, estimator, form)
        a = process_weight * scale / unit
        b = -process_weight * scale * center
    if outcome_weight:
        center, scale = baseline(outcome, group, estimator, form)
        c = outcome_weight * (outcome - center) * scale
    table = torch.stack([a, b, c])
    if not whiten:
        return table, torch.tensor([0.0, 1.0], dtype=torch.float64, device=sums.device)
    sum_ = a * s + b * g + c * o
    squares = a * a * ss + b * b * gg + c * c * oo + 2 * (a * b * sg + a * c * so + b * c * go)
    return table, torch.stack(whitening(sum_, squares, lengths.sum(), process_group))


def whitening(sum_: Tensor, squares: Tensor, tokens: Tensor, process_group) -> list[Tensor]:
    """Mean and 1 / standard deviation of all ranks' advantages, from the sums (R,) of rows and of their squares."""
    sum_, squares, count = all_reduce(
        torch.stack([total(sum_), total(squares), tokens.double()]), dist.ReduceOp.SUM, process_group
    )
    mean = sum_ / count
    variance = ((squares - mean * sum_) / (count - 1).clamp(min=1)).clamp(min=0)
    return [mean, (variance + 1e-8).rsqrt()]


def total(x: Tensor) -> Tensor:
    return x.sort().values.sum()  # sorted: the order of the rows leaves no trace
