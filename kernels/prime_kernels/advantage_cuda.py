"""prime_advantage by csrc/advantage.cu and csrc/credit.cu: one cooperative launch, or some around all-reduces."""

import torch

from prime_kernels import advantage_credit
from prime_kernels.advantage_rows import FIELDS, coefficients
from prime_kernels.dispatch import capturing, extension, stream
from prime_kernels.reference import Advantage

EVERYTHING, ONLY_SUMS, ONLY_WRITE = range(3)  # as in csrc/advantage_params.h
ESTIMATORS = {("rloo", "run"): 0, ("rloo", "paper"): 1, ("grpo", "run"): 2, ("grpo", "paper"): 2}


def advantage(*arguments, **options) -> Advantage | None:
    """As reference.advantage, or with a credit reference_credit's; None when an argument holds a bad value.

    Reads one word of the result back, after the launch. Under CUDA graph capture it does not, and a batch with a bad
    value has NaN for every advantage.
    """
    if "credit" in options:
        return advantage_credit.advantage(_run_credit, *arguments, **options)
    return _published(*arguments, **options)


def _run_credit(tensors, *sizes_and_options) -> None:
    pointers, bfloat16 = advantage_credit.addresses(tensors)
    device = tensors[2].device
    with torch.cuda.device_of(tensors[2]):
        extension("_cuda").credit(pointers, *sizes_and_options, bfloat16, stream(device))


def _published(
    prm_logprob, ref_logprob, outcome, cu_seqlens, group,
    *, tokens, beta, gamma, outcome_gamma, process_weight, outcome_weight, estimator, form, normalize, whiten,
    process_group,
) -> Advantage | None:  # fmt: skip
    rows, device = len(outcome), outcome.device
    result, token_reward, score = (torch.empty(size, device=device) for size in (tokens, tokens, rows))
    sizes = {"sums": FIELDS * rows, "table": 3 * rows, "moments": 2, "peaks": rows, "totals": 2 * rows, "status": 1}
    scratch = torch.empty(sum(sizes.values()), dtype=torch.float64, device=device)
    parts = dict(zip(sizes, scratch.split(list(sizes.values())), strict=True))

    def launch(phase: int) -> None:
        tensors = prm_logprob, ref_logprob, outcome, cu_seqlens, group, result, token_reward, score, *parts.values()
        bfloat16 = prm_logprob is not None and prm_logprob.dtype == torch.bfloat16
        extension("_cuda").advantage(
            [0 if x is None else x.data_ptr() for x in tensors], tokens, rows, phase,
            ESTIMATORS.get((estimator, form), 3), bool(process_weight), normalize == "batch", whiten,
            beta, gamma, outcome_gamma, process_weight, outcome_weight, bfloat16, stream(device),
        )  # fmt: skip

    with torch.cuda.device_of(outcome):
        if process_group is None:
            launch(EVERYTHING)
            if not capturing() and parts["status"].view(torch.int32)[0].item():
                return None
        else:
            launch(ONLY_SUMS)
            middle = coefficients(
                parts["sums"].view(FIELDS, rows), outcome, cu_seqlens.diff(), group, beta=beta,
                process_weight=process_weight, outcome_weight=outcome_weight, estimator=estimator, form=form,
                normalize=normalize, whiten=whiten, process_group=process_group,
            )  # fmt: skip
            if middle is None:
                return None
            parts["table"], parts["moments"] = middle
            launch(ONLY_WRITE)
    return Advantage(result, token_reward, score)
