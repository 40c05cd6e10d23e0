"""The credit forms of prime_advantage on every native back-end: its buffers, and what is done among ranks.

A back-end runs stages (csrc/credit_params.h): all of them at once, or with several ranks some at a time, with a small
all-reduce after SUMS, and for "odds" after ROWS, INDEX and DEVIATIONS.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from prime_kernels.advantage_rows import total, whitening
from prime_kernels.dispatch import capturing
from prime_kernels.reference import Advantage, all_reduce
from prime_kernels.reference_credit import CREDITS, LOG_RATIO_FLOOR

ROWS, INDEX, DEVIATIONS, SUMS, WRITE = range(5)  # as in csrc/credit_params.h


def advantage(
    run: Callable, prm_logprob, ref_logprob, outcome, cu_seqlens, group,
    *, tokens, credit, step, shrink, prior, slope, drift,
    beta, gamma, outcome_gamma, process_weight, outcome_weight, whiten, process_group,
) -> Advantage | None:  # fmt: skip
    """As reference_credit.advantage; None when an argument holds a bad value. Under CUDA graph capture that is not
    known, and a batch with a bad value has NaN for every advantage.

    run(tensors, tokens, rows, first, last, credit, process, whiten, numbers) runs the stages first..last; tensors and
    numbers as in csrc/credit_params.h.
    """
    rows, process, device = len(outcome), bool(process_weight), outcome.device
    odds = process and credit == "odds"
    result, token_reward, score = (torch.empty(size, device=device) for size in (tokens, tokens, rows))
    steps = tokens if process else 0
    sizes = {"prefix": steps, "term": steps, "index": 3 * tokens if odds else 0, "peaks": rows, "outcomes": rows}
    sizes |= {"totals": 4 * rows, "moments": 4}
    scratch = torch.empty(sum(sizes.values()), dtype=torch.float64, device=device)
    parts = dict(zip(sizes, scratch.split(list(sizes.values())), strict=True))
    parts["index"] = parts["index"].view(torch.int64)
    tensors = [prm_logprob, ref_logprob, outcome, cu_seqlens, group, step, result, token_reward, score, *parts.values()]
    numbers = [beta, gamma, outcome_gamma, process_weight, outcome_weight, slope, drift, shrink, prior]

    def launch(first: int, last: int) -> bool:
        """Whether the batch is good, as far as that is known."""
        run(tensors, tokens, rows, first, last, CREDITS.index(credit), process, whiten, [float(x) for x in numbers])
        return first != ROWS or capturing() or parts["moments"][3].item() < float("inf")

    if process_group is None:
        return Advantage(result, token_reward, score) if launch(ROWS, WRITE) else None
    moments, totals = parts["moments"], parts["totals"].view(rows, 4).T
    if not launch(ROWS, ROWS if odds else SUMS):
        return None
    if odds:
        longest = cu_seqlens.diff().max()
        bounds = torch.stack([parts["peaks"].max(), longest.double()])
        moments[3], most = all_reduce(bounds, dist.ReduceOp.MAX, process_group)
        sums = parts["index"].zero_().view(3, tokens)[:, : longest.item()]
        launch(INDEX, INDEX)
        everyone = sums.new_zeros(3, int(most.item()))
        everyone[:, : sums.shape[1]] = sums
        sums.copy_(all_reduce(everyone, dist.ReduceOp.SUM, process_group)[:, : sums.shape[1]])
        launch(DEVIATIONS, DEVIATIONS)
        squares = torch.stack([total(totals[2]), totals[3].sum()])
        squares, count = all_reduce(squares, dist.ReduceOp.SUM, process_group)
        moments[2] = 1 / ((squares / count).sqrt() + LOG_RATIO_FLOOR)
        launch(SUMS, SUMS)
    if whiten:
        moments[:2] = torch.stack(whitening(totals[0], totals[1], cu_seqlens[-1], process_group))
    launch(WRITE, WRITE)
    return Advantage(result, token_reward, score)


def addresses(tensors: list[Tensor | None]) -> tuple[list[int], bool]:
    """Where they lie, and whether the log-probs are bfloat16."""
    bfloat16 = tensors[0] is not None and tensors[0].dtype == torch.bfloat16
    return [0 if x is None else x.data_ptr() for x in tensors], bfloat16
