"""The rows' arithmetic of advantage_triton.py: baselines of groups, coefficients of rows, moments of all advantages."""

import triton
import triton.language as tl


@triton.jit
def scale_of(bound):
    """2^(40 - exponent of bound), so that no |x| <= bound exceeds 2^40 when multiplied by it."""
    exponent = tl.maximum((bound.to(tl.int64, bitcast=True) >> 52) & 0x7FF, 100)
    return ((1023 + 40 + 1022 - exponent) << 52).to(tl.float64, bitcast=True)


@triton.jit
def fixed_parts(x, scale):
    x = x * scale
    high = x.to(tl.int64)
    return high, ((x - high.to(tl.float64)) * 1099511627776.0).to(tl.int64)  # 2^40


@triton.jit
def _fixed(x, scale):
    high, low = fixed_parts(x, scale)
    return tl.sum(high), tl.sum(low)


@triton.jit
def from_fixed(high, low, scale):
    return (high.to(tl.float64) + low.to(tl.float64) / 1099511627776.0) / scale


@triton.jit
def exact_sum(x, rows, stride: tl.constexpr, rows_block: tl.constexpr):
    """Of x[0], x[stride], ..: the same bits in any order."""
    largest = tl.full((), 0.0, tl.float64)
    for at in range(0, rows, rows_block):
        j = at + tl.arange(0, rows_block)
        value = tl.load(x + stride * j, mask=j < rows, other=0.0, cache_modifier=".cg")
        largest = tl.maximum(largest, tl.max(tl.abs(value)))
    scale = scale_of(largest)
    whole = tl.full((), 0, tl.int64)
    part = whole
    for at in range(0, rows, rows_block):
        j = at + tl.arange(0, rows_block)
        high, low = _fixed(tl.load(x + stride * j, mask=j < rows, other=0.0, cache_modifier=".cg"), scale)
        whole += high
        part += low
    return from_fixed(whole, part, scale)


@triton.jit
def _values(outcome, sums, cu_seqlens, member, j, rows, process: tl.constexpr):
    """Of the rows j: the mean token reward, or the outcome."""
    if process:
        start = tl.load(cu_seqlens + j, mask=member, other=0).to(tl.int64)
        length = tl.load(cu_seqlens + j + 1, mask=member, other=1) - start
        value = _field(sums, 1, j, rows, member) / length.to(tl.float64)
    else:
        value = tl.load(outcome + j, mask=member, other=0.0).to(tl.float64)
    return value


@triton.jit
def baseline(
    outcome, sums, cu_seqlens, group, mine, count, rows, first, second,
    process: tl.constexpr, estimator: tl.constexpr, rows_block: tl.constexpr,
):  # fmt: skip
    """Writes the center of each row of the group to `first`, and to `second` the scale (grpo: the deviation)."""
    lane = tl.arange(0, rows_block)
    low = tl.full((), float("inf"), tl.float64)
    high = tl.full((), float("-inf"), tl.float64)
    for at in range(0, rows, rows_block):
        j = at + lane
        member = (tl.load(group + j, mask=j < rows, other=0) == mine) & (j < rows)
        value = _values(outcome, sums, cu_seqlens, member, j, rows, process)
        low = tl.minimum(low, tl.min(tl.where(member, value, float("inf"))))
        high = tl.maximum(high, tl.max(tl.where(member, value, float("-inf"))))
    bound = high - low
    scale = scale_of(bound)
    whole = tl.full((), 0, tl.int64)
    part = tl.full((), 0, tl.int64)
    for at in range(0, rows, rows_block):
        j = at + lane
        member = (tl.load(group + j, mask=j < rows, other=0) == mine) & (j < rows)
        value = _values(outcome, sums, cu_seqlens, member, j, rows, process)
        a, b = _fixed(tl.where(member, value - low, 0.0), scale)
        whole += a
        part += b
    mean = from_fixed(whole, part, scale) / count
    spread = tl.full((), 1.0, tl.float64)
    if estimator == 0:
        spread = count / (count - 1)
    if estimator == 2:
        scale = scale_of(bound * bound)
        whole = tl.full((), 0, tl.int64)
        part = tl.full((), 0, tl.int64)
        for at in range(0, rows, rows_block):
            j = at + lane
            member = (tl.load(group + j, mask=j < rows, other=0) == mine) & (j < rows)
            value = _values(outcome, sums, cu_seqlens, member, j, rows, process) - low - mean
            a, b = _fixed(tl.where(member, value * value, 0.0), scale)
            whole += a
            part += b
        spread = tl.sqrt(from_fixed(whole, part, scale) / (count - 1))
    for at in range(0, rows, rows_block):
        j = at + lane
        member = (tl.load(group + j, mask=j < rows, other=0) == mine) & (j < rows)
        center = tl.zeros((rows_block,), tl.float64) + low + mean
        if estimator == 1:
            value = _values(outcome, sums, cu_seqlens, member, j, rows, process) - low
            center = low + (count * mean - value) / (count - 1)
        tl.store(first + j, center, mask=member)
        tl.store(second + j, tl.zeros((rows_block,), tl.float64) + spread, mask=member)


@triton.jit
def store_sums(at, rows, peak, total, s, ss, sg, so, g, gg, go, o, oo):
    """In the order of advantage_rows."""
    tl.store(at, peak)
    tl.store(at + rows, total)
    tl.store(at + 2 * rows, s)
    tl.store(at + 3 * rows, ss)
    tl.store(at + 4 * rows, sg)
    tl.store(at + 5 * rows, so)
    tl.store(at + 6 * rows, g)
    tl.store(at + 7 * rows, gg)
    tl.store(at + 8 * rows, go)
    tl.store(at + 9 * rows, o)
    tl.store(at + 10 * rows, oo)


@triton.jit
def _row_moments(sums, a, b, c, j, rows, good):
    """The sums of a row's advantages, before whitening, and of their squares."""
    s, ss = _field(sums, 2, j, rows, good), _field(sums, 3, j, rows, good)
    sg, so = _field(sums, 4, j, rows, good), _field(sums, 5, j, rows, good)
    g, gg = _field(sums, 6, j, rows, good), _field(sums, 7, j, rows, good)
    go, o = _field(sums, 8, j, rows, good), _field(sums, 9, j, rows, good)
    oo = _field(sums, 10, j, rows, good)
    squares = a * a * ss + b * b * gg + c * c * oo + 2 * (a * b * sg + a * c * so + b * c * go)
    return a * s + b * g + c * o, squares


@triton.jit
def _field(sums, field, j, rows, good):
    """What another program may have written: past the L1 cache."""
    return tl.load(sums + field * rows + j, mask=good, other=0.0, cache_modifier=".cg")


@triton.jit
def finish(
    outcome, sums, work, table, moments, tokens, rows, beta, process_weight, outcome_weight,
    process: tl.constexpr, estimator: tl.constexpr, normalize: tl.constexpr, whiten: tl.constexpr,
    rows_block: tl.constexpr,
):  # fmt: skip
    """Coefficients of all rows, and the moments of all advantages."""
    lane = tl.arange(0, rows_block)
    peak = tl.full((), 0.0, tl.float64)
    for at in range(0, rows, rows_block):
        peak = tl.maximum(peak, tl.max(_field(sums, 0, at + lane, rows, at + lane < rows)))
    unit = tl.full((), 1.0, tl.float64)
    if normalize:
        unit = peak + 1e-6 * beta
    largest = tl.full((), 0.0, tl.float64)
    largest_squares = tl.full((), 0.0, tl.float64)
    for at in range(0, rows, rows_block):
        j = at + lane
        ok = j < rows
        a = tl.zeros((rows_block,), tl.float64)
        b = tl.zeros((rows_block,), tl.float64)
        if process:
            a = _scale_of(work + rows, j, ok, unit, estimator) * process_weight / unit
            b = -a * _center_of(work, j, ok, estimator)
        c = tl.load(outcome + j, mask=ok, other=0.0).to(tl.float64) - _center_of(work + 2 * rows, j, ok, estimator)
        c = c * _scale_of(work + 3 * rows, j, ok, 1.0, estimator) * outcome_weight
        tl.store(table + j, a, mask=ok)
        tl.store(table + rows + j, b, mask=ok)
        tl.store(table + 2 * rows + j, c, mask=ok)
        if whiten:
            total, squares = _row_moments(sums, a, b, c, j, rows, ok)
            largest = tl.maximum(largest, tl.max(tl.where(ok, tl.abs(total), 0.0)))
            largest_squares = tl.maximum(largest_squares, tl.max(tl.where(ok, tl.abs(squares), 0.0)))
    mean = tl.full((), 0.0, tl.float64)
    inverse_std = tl.full((), 1.0, tl.float64)
    if whiten:
        tl.debug_barrier()
        scale, scale_squares = scale_of(largest), scale_of(largest_squares)
        high = tl.full((), 0, tl.int64)
        low, high_squares, low_squares = high, high, high
        for at in range(0, rows, rows_block):
            j = at + lane
            ok = j < rows
            a, b = _field(table, 0, j, rows, ok), _field(table, 1, j, rows, ok)
            total, squares = _row_moments(sums, a, b, _field(table, 2, j, rows, ok), j, rows, ok)
            whole, part = _fixed(tl.where(ok, total, 0.0), scale)
            high += whole
            low += part
            whole, part = _fixed(tl.where(ok, squares, 0.0), scale_squares)
            high_squares += whole
            low_squares += part
        tokens_ = tokens.to(tl.float64)
        sum_ = from_fixed(high, low, scale)
        mean = sum_ / tokens_
        variance = (from_fixed(high_squares, low_squares, scale_squares) - mean * sum_) / tl.maximum(tokens_ - 1, 1.0)
        inverse_std = 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + 1e-8)
    tl.store(moments, mean)
    tl.store(moments + 1, inverse_std)
    tl.store(moments + 2, tl.where(peak < float("inf"), 0.0, 1.0).to(tl.float64))


@triton.jit
def _center_of(center, j, ok, estimator: tl.constexpr):
    value = tl.zeros(j.shape, tl.float64)
    if estimator != 3:
        value = tl.load(center + j, mask=ok, other=0.0, cache_modifier=".cg")
    return value


@triton.jit
def _scale_of(spread, j, ok, unit, estimator: tl.constexpr):
    value = tl.full(j.shape, 1.0, tl.float64)
    if estimator != 3:
        value = tl.load(spread + j, mask=ok, other=1.0, cache_modifier=".cg")
    if estimator == 2:
        value = tl.where(value > 0, 1.0 / (value / unit + 1e-6), 0.0)
    return value
