"""The credit forms of prime_advantage in Triton: a launch a stage of csrc/credit_params.h, three, of "odds" five.

One row a program. What the next launch needs of all rows is found by the last program to finish; nobody waits. Sums
over rows are exact, in fixed point: their order leaves no trace.
"""

import math

import torch
import triton
import triton.language as tl

from prime_kernels.advantage_credit import DEVIATIONS, INDEX, ROWS, SUMS, WRITE
from prime_kernels.advantage_triton_rows import exact_sum, fixed_parts, from_fixed, scale_of
from prime_kernels.dispatch import stream
from prime_kernels.reference_credit import CLIP, CREDITS, LOG_RATIO_FLOOR

CRITIC, PAV, LOOKAHEAD, ODDS, TD = (tl.constexpr(CREDITS.index(name)) for name in CREDITS)
POINTERS = ["outcome", "cu_seqlens", "group", "step", "prm", "ref", "reward", "score", "prefix", "term", "index"]
POINTERS += ["peaks", "outcomes", "totals", "moments", "counters", "advantage"]


def kernel(function):
    """Triton must not look at any of these: see advantage_triton.PLAIN."""
    names = [*POINTERS, "tokens", "rows"]
    return triton.jit(do_not_specialize=[name for name in names if name in function.__code__.co_varnames])(function)


@triton.jit
def _pair(decay, x, next_decay, next_x):
    return decay * next_decay, next_x + next_decay * x


@triton.jit
def _row(cu_seqlens, step, row, has_step: tl.constexpr):
    """Where a good row starts, its tokens and its steps."""
    start = tl.load(cu_seqlens + row).to(tl.int64)
    length = tl.load(cu_seqlens + row + 1) - start
    steps = length
    if has_step:
        steps = tl.load(step + start + length - 1).to(tl.int64) + 1
    return start, length, steps


@triton.jit
def _value(total, slope, against):
    """sigmoid(slope * total - log against)"""
    return 1.0 / (1.0 + tl.exp(tl.minimum(tl.maximum(-slope * total, -700.0), 700.0)) * against)


@triton.jit
def _term(prefix, start, j, steps, before_first, others, value_start, outcome, credit: tl.constexpr):
    """What the steps j add: term_of in csrc/credit_math.h."""
    inside = (j >= 0) & (j < steps)
    before = tl.load(prefix + start + j - 1, mask=inside & (j > 0), other=0.0)
    before = tl.where(j == 0, before_first, before)
    here = tl.load(prefix + start + j, mask=inside, other=0.0)
    if credit == CRITIC:
        term = value_start - before
    elif credit == LOOKAHEAD:
        here = tl.load(prefix + start + tl.minimum(j + 1, steps - 1), mask=inside, other=0.0)
        term = here - before
    elif credit == TD:
        term = tl.where(j == steps - 1, outcome - (others - value_start), here) - before
    else:
        term = here - before
    return tl.where(inside, term, 0.0), inside


@kernel
def credit_rows(
    prm, ref, outcome, cu_seqlens, group, step, reward, score, prefix, term, index, peaks, outcomes, moments, counters,
    tokens, rows, beta: tl.float64, gamma: tl.float64, outcome_weight: tl.float64, slope: tl.float64,
    against_offset: tl.float64, shrink: tl.float64, prior: tl.float64,
    has_prm: tl.constexpr, has_step: tl.constexpr, process: tl.constexpr, credit: tl.constexpr, block: tl.constexpr,
    rows_block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = tl.load(cu_seqlens + row).to(tl.int64)
    end = tl.load(cu_seqlens + row + 1).to(tl.int64)
    verified = tl.load(outcome + row).to(tl.float64)
    good = (start >= 0) & (start < end) & (end <= tokens) & ((row > 0) | (start == 0))
    good = good & ((row < rows - 1) | (end == tokens)) & (verified >= 0.0) & (verified <= 1.0)
    length = tl.where(good, end - start, 0)
    lane = tl.arange(0, block)
    zero = tl.full((), 0.0, tl.float64)
    carry, total, bad_steps = zero, zero, tl.full((), 0, tl.int32)
    for base in range(0, length, block):
        n = base + lane
        inside = n < length
        q = tl.zeros((block,), tl.float64)
        if has_prm:
            q = tl.load(prm + start + n, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
            q -= tl.load(ref + start + n, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
        r = (beta * q).to(tl.float32)
        tl.store(reward + start + n, r, mask=inside)
        total += tl.sum(r.to(tl.float64))
        at, ends = n.to(tl.int64), inside
        if has_step:
            at = tl.load(step + start + n, mask=inside, other=0).to(tl.int64)
            rise = at - tl.load(step + start + n - 1, mask=inside & (n > 0), other=0)
            fine = tl.where(n == 0, at == 0, (rise == 0) | (rise == 1))
            bad_steps += tl.sum((inside & (fine == 0)).to(tl.int32))
            ends = inside & ((n == length - 1) | (tl.load(step + start + n + 1, mask=n + 1 < length, other=0) != at))
            ends = ends & (at >= 0) & (at <= n)
        if process:
            q = tl.cumsum(q) + carry
            carry = tl.sum(tl.where(lane == block - 1, q, 0.0))
            tl.store(prefix + start + at, q, mask=ends)
    tl.store(score + row, total.to(tl.float32))
    good = good & (bad_steps == 0)
    if process:
        good = good & (tl.abs(total) < float("inf"))

    mine = tl.load(group + row)
    count = tl.full((), 0, tl.int32)
    whole = tl.full((), 0, tl.int64)
    part = whole
    unit = scale_of(zero + 1.0)
    for at_row in range(0, rows, rows_block):
        j = at_row + tl.arange(0, rows_block)
        member = (tl.load(group + j, mask=j < rows, other=0) == mine) & (j < rows)
        count += tl.sum(member.to(tl.int32))
        high, low = fixed_parts(tl.load(outcome + j, mask=member, other=0.0).to(tl.float64), unit)
        whole += tl.sum(high)
        part += tl.sum(low)
    good = good & (count > 1)
    fellows = tl.maximum(count - 1, 1).to(tl.float64)
    solved = tl.minimum(tl.maximum(from_fixed(whole, part, unit) - verified, 0.0), fellows)
    others = (solved + shrink * prior) / (fellows + shrink)
    tl.store(outcomes + row, outcome_weight * (verified - others))
    peak = zero
    if process:
        pseudo = tl.maximum(shrink, 1.0)
        against = against_offset * (fellows - solved + pseudo * (1.0 - prior)) / (solved + pseudo * prior)
        value_start = 1.0 / (1.0 + against)
        steps = length
        if has_step:
            steps = tl.load(step + start + length - 1, mask=good, other=-1).to(tl.int64) + 1
        steps = tl.where(good, steps, 0)
        before_first = zero
        tl.debug_barrier()
        if credit != ODDS:
            before_first = value_start
            for base in range(0, steps, block):
                at_step = prefix + start + base + lane
                inside = base + lane < steps
                value = _value(tl.load(at_step, mask=inside, other=0.0), slope, against)
                tl.store(at_step, value, mask=inside)
            tl.debug_barrier()
        carry = zero
        for base in range(0, steps, block):
            j = base + lane
            if credit == TD:
                j = steps - 1 - base - lane
            x, inside = _term(prefix, start, j, steps, before_first, others, value_start, verified, credit)
            if credit == TD:
                decay, x = tl.associative_scan((tl.zeros((block,), tl.float64) + gamma, x), 0, _pair)
                x += decay * carry
                carry = tl.sum(tl.where(lane == block - 1, x, 0.0))
            tl.store(term + start + j, x, mask=inside)
            if credit == ODDS:
                peak = tl.maximum(peak, tl.max(tl.abs(x)))
                for part_of in tl.static_range(3):
                    none = tl.zeros((block,), tl.int64)
                    tl.store(index + part_of * tokens.to(tl.int64) + j, none, mask=inside)
    tl.store(peaks + row, tl.where(good, peak, float("inf")))
    tl.debug_barrier()
    if tl.atomic_add(counters, 1, sem="acq_rel") == rows - 1:
        tl.store(counters, 0)
        peak = zero
        for at_row in range(0, rows, rows_block):
            j = at_row + tl.arange(0, rows_block)
            peak = tl.maximum(peak, tl.max(tl.load(peaks + j, mask=j < rows, other=0.0, cache_modifier=".cg")))
        tl.store(moments + 3, peak)


@kernel
def credit_index(cu_seqlens, step, term, index, moments, tokens, has_step: tl.constexpr, block: tl.constexpr):
    bound = tl.load(moments + 3)
    if bound < float("inf"):
        start, length, steps = _row(cu_seqlens, step, tl.program_id(0), has_step)
        scale = scale_of(bound)
        for base in range(0, steps, block):
            j = base + tl.arange(0, block)
            inside = j < steps
            high, low = fixed_parts(tl.load(term + start + j, mask=inside, other=0.0), scale)
            tl.atomic_add(index + j, high, mask=inside, sem="relaxed")
            tl.atomic_add(index + tokens.to(tl.int64) + j, low, mask=inside, sem="relaxed")
            one = tl.full((block,), 1, tl.int64)
            tl.atomic_add(index + 2 * tokens.to(tl.int64) + j, one, mask=inside, sem="relaxed")


@kernel
def credit_deviations(
    cu_seqlens, step, term, index, totals, moments, counters, tokens, rows,
    floor: tl.constexpr, has_step: tl.constexpr, block: tl.constexpr, rows_block: tl.constexpr,
):  # fmt: skip
    bound = tl.load(moments + 3)
    row = tl.program_id(0)
    if bound < float("inf"):
        start, length, steps = _row(cu_seqlens, step, row, has_step)
        scale = scale_of(bound)
        squares = tl.full((), 0.0, tl.float64)
        for base in range(0, steps, block):
            j = base + tl.arange(0, block)
            inside = j < steps
            high = tl.load(index + j, mask=inside, other=0)
            low = tl.load(index + tokens.to(tl.int64) + j, mask=inside, other=0)
            have = tl.load(index + 2 * tokens.to(tl.int64) + j, mask=inside, other=1)
            x = tl.load(term + start + j, mask=inside, other=0.0)
            x = tl.where(inside, x - from_fixed(high, low, scale) / have.to(tl.float64), 0.0)
            tl.store(term + start + j, x, mask=inside)
            squares += tl.sum(x * x)
        tl.store(totals + 4 * row + 2, squares)
        tl.store(totals + 4 * row + 3, steps.to(tl.float64))
        tl.debug_barrier()
        if tl.atomic_add(counters, 1, sem="acq_rel") == rows - 1:
            tl.store(counters, 0)
            mean = exact_sum(totals + 2, rows, 4, rows_block) / exact_sum(totals + 3, rows, 4, rows_block)
            tl.store(moments + 2, 1.0 / (tl.sqrt(mean) + floor))


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
        start, length, steps = _row(cu_seqlens, step, row, has_step)
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
        start, length, steps = _row(cu_seqlens, step, row, has_step)
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
        beta, gamma, outcome_gamma, process_weight, outcome_weight, slope, offset, shrink, prior = numbers
        odds, device = process and credit == CREDITS.index("odds"), outcome.device
        log_outcome_gamma = math.log2(outcome_gamma) if outcome_gamma else -math.inf
        against_offset = math.exp(min(max(-offset, -700.0), 700.0))
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
                    outcome_weight, slope * beta, against_offset, shrink, prior, has_prm=prm is not None,
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
