"""prime_advantage as published in two Triton launches: sums of rows with the groups' arithmetic, then the advantages.

The layout of sums, coefficients and moments is that of advantage_rows.py, which takes the middle's place with several
ranks. In one launch, the last program of a group to finish finds its baseline, and the last of all the moments: nobody
waits for anybody. Sums over rows are exact, in fixed point: their order leaves no trace.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from prime_kernels import advantage_credit, advantage_credit_triton
from prime_kernels.advantage_cuda import ESTIMATORS
from prime_kernels.advantage_rows import FIELDS, coefficients
from prime_kernels.advantage_triton_rows import baseline, finish, store_sums
from prime_kernels.dispatch import capturing, stream
from prime_kernels.reference import Advantage

BLOCK, ROWS, WARPS = 512, 512, 4  # tokens and rows at a time
# What Triton must not look at: a kernel of its own for one row, or for 16, helps nobody and may round differently
PLAIN = ["outcome", "cu_seqlens", "reward", "table", "moments", "tokens", "rows"]
PLAIN_SUMS = [*PLAIN, "group", "prm", "ref", "score", "sums", "work", "counters"]


@triton.jit
def _chain(decay, x, y, next_decay, next_x, next_y):
    return decay * next_decay, next_x + next_decay * x, next_y + next_decay * y


@triton.jit
def _add(a, b, c, d, e, f, g, h, i, j, a2, b2, c2, d2, e2, f2, g2, h2, i2, j2):
    return a + a2, b + b2, c + c2, d + d2, e + e2, f + f2, g + g2, h + h2, i + i2, j + j2


@triton.jit(do_not_specialize=PLAIN_SUMS)
def sum_rows(
    prm, ref, outcome, cu_seqlens, group, reward, score, sums, work, table, moments, counters,
    tokens, rows, beta: tl.float64, gamma: tl.float64, log_outcome_gamma: tl.float64, process_weight: tl.float64,
    outcome_weight: tl.float64,
    has_prm: tl.constexpr, process: tl.constexpr, discounted: tl.constexpr, estimator: tl.constexpr,
    normalize: tl.constexpr, whiten: tl.constexpr, only_sums: tl.constexpr, block: tl.constexpr,
    rows_block: tl.constexpr,
):  # fmt: skip
    """Token rewards, scores and sums of one row a program; then table (3, R) = a, b, c and moments (3,), the last one
    1 when an argument holds a bad value. counters (R + 1,) are 0 before and after."""
    row = tl.program_id(0)
    start = tl.load(cu_seqlens + row).to(tl.int64)
    end = tl.load(cu_seqlens + row + 1).to(tl.int64)
    good = (start >= 0) & (start < end) & (end <= tokens) & ((row > 0) | (start == 0))
    good = good & ((row < rows - 1) | (end == tokens))
    good = good & (tl.abs(tl.load(outcome + row)) < float("inf"))
    length = tl.where(good, end - start, 0)
    lane = tl.arange(0, block)
    zero = tl.full((), 0.0, tl.float64)
    carry, plain_carry, ones_carry, peak, total = zero, zero, zero, zero, zero
    s, ss, sg, so, g, gg, go, o, oo = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for base in range(0, length, block):
        n = base + lane
        inside = n < length
        token = end - 1 - n
        x = tl.zeros((block,), tl.float64)
        r = tl.zeros((block,), tl.float32)
        if has_prm:
            p = tl.load(prm + token, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
            q = tl.load(ref + token, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
            r = (beta * (p - q)).to(tl.float32)
        tl.store(reward + token, r, mask=inside)
        if process:
            x = r.to(tl.float64)
        decay = tl.zeros((block,), tl.float64) + gamma
        decay, x_sum, ones = tl.associative_scan((decay, x, tl.full((block,), 1.0, tl.float64)), 0, _chain)
        x_sum += decay * carry
        ones += decay * ones_carry
        carry = tl.sum(tl.where(lane == block - 1, x_sum, 0.0))
        ones_carry = tl.sum(tl.where(lane == block - 1, ones, 0.0))
        plain = x_sum
        if discounted:
            plain = tl.cumsum(x) + plain_carry
            plain_carry = tl.sum(tl.where(lane == block - 1, plain, 0.0))
        peak = tl.maximum(peak, tl.max(tl.abs(plain)))
        out = tl.where(n == 0, 1.0, tl.exp2(n.to(tl.float64) * log_outcome_gamma))
        x_sum, ones, out = tl.where(inside, x_sum, 0.0), tl.where(inside, ones, 0.0), tl.where(inside, out, 0.0)
        d_total, d_s, d_ss, d_sg, d_so, d_g, d_gg, d_go, d_o, d_oo = tl.reduce(
            (r.to(tl.float64), x_sum, x_sum * x_sum, x_sum * ones, x_sum * out, ones, ones * ones, ones * out,
             out, out * out), 0, _add
        )  # fmt: skip
        total, s, ss, sg, so = total + d_total, s + d_s, ss + d_ss, sg + d_sg, so + d_so
        g, gg, go, o, oo = g + d_g, gg + d_gg, go + d_go, o + d_o, oo + d_oo
    tl.store(score + row, total.to(tl.float32))

    mine = tl.load(group + row)
    count = tl.full((), 0, tl.int32)
    leader = tl.full((), 0, tl.int32) + rows
    for at in range(0, rows, rows_block):
        j = at + tl.arange(0, rows_block)
        member = (tl.load(group + j, mask=j < rows, other=0) == mine) & (j < rows)
        count += tl.sum(member.to(tl.int32))
        leader = tl.minimum(leader, tl.min(tl.where(member, j, rows)))
    if estimator != 3:
        good = good & (count > 1)
    if process:
        good = good & (tl.abs(total) < float("inf"))
    peak = tl.where(good, peak, float("inf"))
    store_sums(sums + row, rows, peak, total, s, ss, sg, so, g, gg, go, o, oo)
    if not only_sums:
        tl.debug_barrier()
        if tl.atomic_add(counters + 1 + leader, 1, sem="acq_rel") == count - 1:
            tl.store(counters + 1 + leader, 0)
            if estimator != 3:
                k = count.to(tl.float64)
                if process:
                    baseline(
                        outcome, sums, cu_seqlens, group, mine, k, rows, work, work + rows,
                        True, estimator, rows_block,
                    )  # fmt: skip
                baseline(
                    outcome, sums, cu_seqlens, group, mine, k, rows, work + 2 * rows, work + 3 * rows,
                    False, estimator, rows_block,
                )  # fmt: skip
        tl.debug_barrier()
        if tl.atomic_add(counters, 1, sem="acq_rel") == rows - 1:
            tl.store(counters, 0)
            finish(
                outcome, sums, work, table, moments, tokens, rows, beta, process_weight, outcome_weight,
                process, estimator, normalize, whiten, rows_block,
            )  # fmt: skip


@triton.jit(do_not_specialize=[*PLAIN, "advantage"])
def write_rows(
    reward, cu_seqlens, table, moments, advantage, tokens, rows, gamma: tl.float64, log_outcome_gamma: tl.float64,
    process: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The advantages of one row a program; NaN for all tokens when moments[2] says that an argument is bad."""
    row = tl.program_id(0)
    lane = tl.arange(0, block)
    if tl.load(moments + 2) != 0:
        share = tl.cdiv(tokens, rows).to(tl.int64)
        for at in range(row * share, tl.minimum((row + 1) * share, tokens), block):
            tl.store(advantage + at + lane, float("nan"), mask=at + lane < tokens)
    else:
        end = tl.load(cu_seqlens + row + 1).to(tl.int64)
        length = end - tl.load(cu_seqlens + row)
        a, b, c = tl.load(table + row), tl.load(table + rows + row), tl.load(table + 2 * rows + row)
        mean, inverse_std = tl.load(moments), tl.load(moments + 1)
        carry = tl.full((), 0.0, tl.float64)
        for base in range(0, length, block):
            n = base + lane
            inside = n < length
            token = end - 1 - n
            x = tl.zeros((block,), tl.float64)
            if process:
                r = tl.load(reward + token, mask=inside, other=0.0).to(tl.float64)
                decay = tl.zeros((block,), tl.float64) + gamma
                decay, x = tl.associative_scan((decay, a * r + b), 0, _pair)
                x += decay * carry
                carry = tl.sum(tl.where(lane == block - 1, x, 0.0))
            out = tl.where(n == 0, 1.0, tl.exp2(n.to(tl.float64) * log_outcome_gamma))
            tl.store(advantage + token, ((x + c * out - mean) * inverse_std).to(tl.float32), mask=inside)


@triton.jit
def _pair(decay, x, next_decay, next_x):
    return decay * next_decay, next_x + next_decay * x


def advantage(*arguments, **options) -> Advantage | None:
    """As advantage_cuda.advantage."""
    if "credit" in options:
        run = advantage_credit_triton.runner(BLOCK, ROWS, WARPS, zeros)
        return advantage_credit.advantage(run, *arguments, **options)
    return _published(*arguments, **options)


def _published(
    prm_logprob, ref_logprob, outcome, cu_seqlens, group,
    *, tokens, beta, gamma, outcome_gamma, process_weight, outcome_weight, estimator, form, normalize, whiten,
    process_group,
) -> Advantage | None:  # fmt: skip
    rows, device = len(outcome), outcome.device
    result, token_reward, score = (torch.empty(size, device=device) for size in (tokens, tokens, rows))
    sizes = FIELDS * rows, 4 * rows, 3 * rows, 3
    sums, work, table, moments = torch.empty(sum(sizes), dtype=torch.float64, device=device).split(sizes)
    log_outcome_gamma = math.log2(outcome_gamma) if outcome_gamma else -math.inf
    process, only_sums = bool(process_weight), process_group is not None
    with torch.cuda.device_of(outcome):
        sum_rows[(rows,)](
            token_reward if prm_logprob is None else prm_logprob, token_reward if ref_logprob is None else ref_logprob,
            outcome, cu_seqlens, group, token_reward, score, sums, work, table, moments,
            zeros(device, stream(device), triton.next_power_of_2(rows + 1)), tokens, rows,
            float(beta), float(gamma), log_outcome_gamma, float(process_weight), float(outcome_weight),
            has_prm=prm_logprob is not None, process=process, discounted=gamma != 1,
            estimator=ESTIMATORS.get((estimator, form), 3), normalize=normalize == "batch", whiten=whiten,
            only_sums=only_sums, block=BLOCK, rows_block=ROWS, num_warps=WARPS,
        )  # fmt: skip
        if only_sums:
            middle = coefficients(
                sums.view(FIELDS, rows), outcome, cu_seqlens.diff(), group, beta=beta, process_weight=process_weight,
                outcome_weight=outcome_weight, estimator=estimator, form=form, normalize=normalize, whiten=whiten,
                process_group=process_group,
            )  # fmt: skip
            if middle is None:
                return None
            table, moments = middle[0], torch.nn.functional.pad(middle[1], (0, 1))
        write_rows[(rows,)](
            token_reward, cu_seqlens, table, moments, result, tokens, rows, float(gamma), log_outcome_gamma,
            process=process, block=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        if not only_sums and not capturing() and moments[2].item():
            return None
    return Advantage(result, token_reward, score)


def zeros(device: torch.device, stream: int, size: int) -> torch.Tensor:
    """Zeros which sum_rows leaves zero: one buffer a stream, as launches on a stream do not overlap; one a graph."""
    make = _zeros.__wrapped__ if capturing() else _zeros
    return make(device, stream, size)


@functools.cache
def _zeros(device: torch.device, stream: int, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)
