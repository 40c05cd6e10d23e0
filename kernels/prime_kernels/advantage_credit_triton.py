"""The credit forms of prime_advantage in Triton: a launch a stage of csrc/credit_params.h, three, of "odds" five.

One row a program. What the next launch needs of all rows is found by the last program to finish; nobody waits. Sums
over rows are exact, in fixed point: their order leaves no trace.
"""

import math

import torch
import triton
import triton.language as tl

from prime_kernels.advantage_credit import DEVIATIONS, INDEX, ROWS, SUMS, WRITE
from prime_kernels.advantage_credit_triton_rows import credit_deviations, credit_index, credit_rows, kernel, row_of
from prime_kernels.advantage_triton_rows import exact_sum
from prime_kernels.dispatch import stream
from prime_kernels.reference_credit import CLIP, CREDITS, LOG_RATIO_FLOOR


@triton.jit
def _advantages(
    outcomes, term, step, row, start, length, n, spread, log_outcome_gamma, process_weight,
    clip: tl.constexpr, has_step: tl.constexpr, process: tl.constexpr, odds: tl.constexpr,
):  # fmt: skip
    """Of the tokens n before the row's last one, before whitening."""
    inside = n < length
    x = tl.where(n == 0, 1.0, tl.exp2(n.to(tl.float64) * log_outcome_gamma)) * tl.load(outcomes + row)
    if process:
        at = (length - 1 - n).to(tl.int64)
        if has_step:
            at = tl.load(step + start + at, mask=inside, other=0).to(tl.int64)
        p = tl.load(term + start + at, mask=inside, other=0.0)
        if odds:
            p = tl.minimum(tl.maximum(p * spread, -clip), clip)
        x += process_weight * p
    return tl.where(inside, x, 0.0)


@kernel
def credit_sums(
    cu_seqlens, step, term, outcomes, totals, moments, counters, tokens, rows, log_outcome_gamma: tl.float64,
    process_weight: tl.float64,
    clip: tl.constexpr, has_step: tl.constexpr, process: tl.constexpr, odds: tl.constexpr, block: tl.constexpr,
    rows_block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if tl.load(moments + 3) < float("inf"):
        start, length, steps = row_of(cu_seqlens, step, row, has_step)
        spread = tl.load(moments + 2)
        sum_ = tl.full((), 0.0, tl.float64)
        squares = sum_
        for base in range(0, length, block):
            n = base + tl.arange(0, block)
            x = _advantages(
                outcomes, term, step, row, start, length, n, spread, log_outcome_gamma, process_weight,
                clip, has_step, process, odds,
            )  # fmt: skip
            sum_ += tl.sum(x)
            squares += tl.sum(x * x)
        tl.store(totals + 4 * row, sum_)
        tl.store(totals + 4 * row + 1, squares)
        tl.debug_barrier()
        if tl.atomic_add(counters, 1, sem="acq_rel") == rows - 1:
            tl.store(counters, 0)
            sum_ = exact_sum(totals, rows, 4, rows_block)
            squares = exact_sum(totals + 1, rows, 4, rows_block)
            count = tokens.to(tl.float64)
            variance = tl.maximum(squares - sum_ / count * sum_, 0.0) / tl.maximum(count - 1, 1.0)
            tl.store(moments, sum_ / count)
            tl.store(moments + 1, 1.0 / tl.sqrt(variance + 1e-8))


@kernel
def credit_write(
    cu_seqlens, step, term, outcomes, moments, advantage, tokens, rows, log_outcome_gamma: tl.float64,
    process_weight: tl.float64,
    clip: tl.constexpr, has_step: tl.constexpr, process: tl.constexpr, odds: tl.constexpr, whiten: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """The advantages of one row a program; NaN for all tokens when an argument is bad."""
    row = tl.program_id(0)
    lane = tl.arange(0, block)
    if tl.load(moments + 3) < float("inf"):
        start, length, steps = row_of(cu_seqlens, step, row, has_step)
        mean = tl.full((), 0.0, tl.float64)
        inverse_std = tl.full((), 1.0, tl.float64)
        if whiten:
            mean, inverse_std = tl.load(moments), tl.load(moments + 1)
        spread = tl.load(moments + 2)
        for base in range(0, length, block):
            n = base + lane
            x = _advantages(
                outcomes, term, step, row, start, length, n, spread, log_outcome_gamma, process_weight,
                clip, has_step, process, odds,
            )  # fmt: skip
            x = ((x - mean) * inverse_std).to(tl.float32)
            tl.store(advantage + start + length - 1 - n, x, mask=n < length)
    else:
        share = tl.cdiv(tokens, rows).to(tl.int64)
        for at in range(row * share, tl.minimum((row + 1) * share, tokens), block):
            tl.store(advantage + at + lane, float("nan"), mask=at + lane < tokens)


def runner(block: int, rows_block: int, warps: int, zeros):
    """-> the `run` of advantage_credit.advantage."""

    def run(tensors, tokens, rows, first, last, credit, process, whiten, numbers) -> None:
        prm, ref, outcome, cu, group, step, advantage, reward, score, *scratch = tensors
        prefix, term, index, peaks, outcomes, totals, moments = scratch
        beta, gamma, outcome_gamma, process_weight, outcome_weight, slope, drift, shrink, prior = numbers
        odds, device = process and credit == CREDITS.index("odds"), outcome.device
        log_outcome_gamma = math.log2(outcome_gamma) if outcome_gamma else -math.inf
        counters = zeros(device, stream(device), 1)
        form = {"has_step": step is not None, "block": block, "num_warps": warps}
        step = cu if step is None else step
        rates = log_outcome_gamma, process_weight
        token = form | {"clip": CLIP, "process": process, "odds": odds}
        with torch.cuda.device_of(outcome):
            if first == ROWS:
                credit_rows[(rows,)](
                    reward if prm is None else prm, reward if ref is None else ref, outcome, cu, group, step, reward,
                    score, prefix, term, index, peaks, outcomes, moments, counters, tokens, rows, beta, gamma,
                    outcome_weight, slope * beta, slope * drift, shrink, prior, has_prm=prm is not None,
                    process=process, credit=credit, rows_block=rows_block, **form,
                )  # fmt: skip
            if odds and first <= INDEX <= last:
                credit_index[(rows,)](cu, step, term, index, moments, tokens, **form)
            if odds and first <= DEVIATIONS <= last:
                credit_deviations[(rows,)](
                    cu, step, term, index, totals, moments, counters, tokens, rows, floor=LOG_RATIO_FLOOR,
                    rows_block=rows_block, **form,
                )  # fmt: skip
            if whiten and first <= SUMS <= last:
                credit_sums[(rows,)](
                    cu, step, term, outcomes, totals, moments, counters, tokens, rows, *rates, rows_block=rows_block,
                    **token,
                )  # fmt: skip
            if last == WRITE:
                credit_write[(rows,)](
                    cu, step, term, outcomes, moments, advantage, tokens, rows, *rates, whiten=whiten, **token
                )

    return run
