"""Stages ROWS, INDEX and DEVIATIONS of advantage_credit_triton.py: the process term of every step."""

import triton
import triton.language as tl

from prime_kernels.advantage_triton_rows import exact_sum, fixed_parts, from_fixed, scale_of
from prime_kernels.reference_credit import CREDITS

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
def row_of(cu_seqlens, step, row, has_step: tl.constexpr):
    """Where a good row starts, its tokens and its steps."""
    start = tl.load(cu_seqlens + row).to(tl.int64)
    length = tl.load(cu_seqlens + row + 1) - start
    steps = length
    if has_step:
        steps = tl.load(step + start + length - 1).to(tl.int64) + 1
    return start, length, steps


@triton.jit
def _value(total, steps, slope, drift, against):
    """sigmoid(slope * total - drift * steps - log against)"""
    return 1.0 / (1.0 + tl.exp(tl.minimum(tl.maximum(drift * steps - slope * total, -700.0), 700.0)) * against)


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
    drift: tl.float64, shrink: tl.float64, prior: tl.float64,
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
        against = (fellows - solved + pseudo * (1.0 - prior)) / (solved + pseudo * prior)
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
                so_far = tl.load(at_step, mask=inside, other=0.0)
                value = _value(so_far, (base + lane + 1).to(tl.float64), slope, drift, against)
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
        start, length, steps = row_of(cu_seqlens, step, tl.program_id(0), has_step)
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
        start, length, steps = row_of(cu_seqlens, step, row, has_step)
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
