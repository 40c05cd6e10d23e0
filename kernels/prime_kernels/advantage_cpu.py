"""prime_advantage by csrc/advantage.cpp and csrc/credit.cpp."""

import torch

from prime_kernels import advantage_credit
from prime_kernels.advantage_rows import FIELDS, coefficients
from prime_kernels.dispatch import extension
from prime_kernels.reference import Advantage


def advantage(*arguments, **options) -> Advantage | None:
    """As reference.advantage, or with a credit reference_credit's; None when an argument holds a bad value."""
    if "credit" in options:
        return advantage_credit.advantage(_run_credit, *arguments, **options)
    return _published(*arguments, **options)


def _run_credit(tensors, *sizes_and_options) -> None:
    pointers, bfloat16 = advantage_credit.addresses(tensors)
    extension("_C").credit(pointers, *sizes_and_options, bfloat16, torch.get_num_threads())


def _published(
    prm_logprob, ref_logprob, outcome, cu_seqlens, group,
    *, tokens, beta, gamma, outcome_gamma, process_weight, **options,
) -> Advantage | None:  # fmt: skip
    native, threads = extension("_C"), torch.get_num_threads()
    sums = torch.empty(FIELDS, len(outcome), dtype=torch.float64)
    token_reward, result = torch.empty(tokens), torch.empty(tokens)
    bfloat16 = prm_logprob is not None and prm_logprob.dtype == torch.bfloat16
    sum_rows = native.advantage_sums_bfloat16 if bfloat16 else native.advantage_sums_float32
    pointers = [0 if x is None else x.data_ptr() for x in (prm_logprob, ref_logprob)]
    good = sum_rows(
        *pointers, cu_seqlens.data_ptr(), token_reward.data_ptr(), sums.data_ptr(), tokens, len(outcome),
        beta, gamma, outcome_gamma, bool(process_weight), threads,
    )  # fmt: skip
    if not good:
        return None
    middle = coefficients(sums, outcome, cu_seqlens.diff(), group, beta=beta, process_weight=process_weight, **options)
    if middle is None:
        return None
    table, moments = middle
    native.advantage_write(
        token_reward.data_ptr(), cu_seqlens.data_ptr(), table.data_ptr(), result.data_ptr(), len(outcome),
        gamma, outcome_gamma, bool(process_weight), *moments.tolist(), threads,
    )  # fmt: skip
    return Advantage(result, token_reward, sums[1].float())
