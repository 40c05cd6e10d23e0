"""The Triton kernel of linear_logprob: a GEMM whose epilogue is an online softmax, split over the vocabulary.

A program owns a block of rows and a range of the vocabulary, and leaves four numbers a row: the peak of its logits, the
sum of exp(z - peak) and of exp(z - peak) * (z - peak) over all columns but the target, and the target's logit if it
is in the range. The row kernel merges the ranges in their order. No atomics, no locks: the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prime_kernels import tune

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # below every logit, and finite: -inf minus itself is NaN
FAR = tl.constexpr(-1.0e4)  # exp of it is 0, and 0 times it is 0 where 0 times -inf is not
PEAK, TOTAL, WEIGHTED, TARGET = (tl.constexpr(i) for i in range(4))  # the rows of `stats`


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh(x):
    """Odd polynomial where 1 - exp(-2|x|) would cancel; Triton's interpreter has no libdevice."""
    square = x * x
    small = x * (1 + square * (-0.33333334 + square * (0.13333334 + square * (-0.053968254 + square * 0.021869488))))
    decay = exp(-2 * tl.abs(x))
    large = (1 - decay) / (1 + decay)
    return tl.where(square < 0.04, small, tl.where(x < 0, -large, large))


@triton.jit
def log1p(x):
    """For x >= 0: the series of 2 atanh(x / (2 + x)) keeps the digits that 1 + x loses."""
    s = x / (2 + x)
    square = s * s
    small = 2 * s * (1 + square * (0.33333334 + square * (0.2 + square * 0.14285715)))
    return tl.where(x < 0.1, small, tl.log(1 + x))


@triton.jit
def logit(raw, bias, inverse_temperature, softcap):
    """The logit of a GEMM's output; bias and softcap may be None."""
    z = raw
    if bias is not None:
        z += bias
    if softcap is not None:
        z = softcap * tanh(z / softcap)
    return z * inverse_temperature


@triton.jit(do_not_specialize=["targets", "stats", "rows"])
def vocabulary_kernel(
    hidden, weight, bias, targets, logits, stats,
    rows, vocabulary, inverse_temperature, softcap,
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr,
    GROUP: tl.constexpr, ENTROPY: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """hidden, weight: pointers to (rows, H) and (vocabulary, H), or descriptors of them. stats: (4, SPLITS, rows).

    logits: None, or (at least rows rounded up to ROWS, vocabulary) float32 for the GEMM's output, without bias.
    """
    program = tl.program_id(0)
    group = program // (GROUP * SPLITS)
    height = tl.minimum(tl.cdiv(rows, ROWS) - group * GROUP, GROUP)
    first_row = (group * GROUP + program % (GROUP * SPLITS) % height) * ROWS
    split = program % (GROUP * SPLITS) // height
    across, down, inner = tl.arange(0, COLUMNS), tl.arange(0, ROWS), tl.arange(0, DEPTH)
    row = first_row + down
    target = tl.load(targets + row, mask=row < rows, other=-1).to(tl.int32)
    peak = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    target_logit = tl.zeros([ROWS], tl.float32)
    tiles = tl.cdiv(vocabulary, COLUMNS)
    share = tl.cdiv(tiles, SPLITS)
    for tile in range(split * share, tl.minimum((split + 1) * share, tiles)):
        first_column = tile * COLUMNS
        column = first_column + across
        z = tl.zeros([ROWS, COLUMNS], tl.float32)
        if DESCRIPTORS:
            for k in range(0, H, DEPTH):
                w = weight.load([first_column, k])
                z = tl.dot(hidden.load([first_row, k]), w.T, z, input_precision="ieee")
        else:
            # beyond the last row or column the last one is read again: cheaper than a mask, and never used
            h_at = hidden + first_row.to(tl.int64) * H + tl.minimum(down, rows - 1 - first_row)[:, None] * H
            w_at = weight + first_column.to(tl.int64) * H + tl.minimum(across, vocabulary - 1 - first_column)[None] * H
            for k in range(0, H, DEPTH):
                d = k + inner
                if H % DEPTH == 0:
                    h, w = tl.load(h_at + d[None]), tl.load(w_at + d[:, None])
                else:
                    h = tl.load(h_at + d[None], mask=(d < H)[None], other=0)
                    w = tl.load(w_at + d[:, None], mask=(d < H)[:, None], other=0)
                z = tl.dot(h, w, z, input_precision="ieee")
        if logits is not None:  # no mask on rows: the buffer holds whole blocks, and the registers are needed
            corner = logits + first_row.to(tl.int64) * vocabulary + first_column
            tl.store(corner + down[:, None] * vocabulary + across[None], z, mask=(column < vocabulary)[None])
        b = None
        if bias is not None:
            b = tl.load(bias + column, mask=column < vocabulary, other=0).to(tl.float32)[None]
        z = logit(z, b, inverse_temperature, softcap)
        z = tl.where((column < vocabulary)[None], z, float("-inf"))
        risen = tl.maximum(peak, tl.max(z, 1))
        fade = exp(peak - risen)
        below = z - risen[:, None]
        hit = column[None] == target[:, None]
        target_logit += tl.sum(tl.where(hit, z, 0.0), 1)
        e = tl.where(hit, 0.0, exp(below))
        if ENTROPY:
            weighted = fade * (weighted + total * (peak - risen)) + tl.sum(e * tl.maximum(below, FAR), 1)
        total = total * fade + tl.sum(e, 1)
        peak = risen
    out = stats + split.to(tl.int64) * rows + row
    step = rows.to(tl.int64) * SPLITS
    tl.store(out + PEAK * step, peak, mask=row < rows)
    tl.store(out + TOTAL * step, total, mask=row < rows)
    tl.store(out + TARGET * step, target_logit, mask=row < rows)
    if ENTROPY:
        tl.store(out + WEIGHTED * step, weighted, mask=row < rows)


def vocabulary_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logits: Tensor | None,
    *, temperature: float, softcap: float | None, entropy: bool,
) -> Tensor:  # fmt: skip
    """(4, splits, N) float32 of contiguous hidden (N, H) and weight (V, H); fills `logits` if given.

    With logits the kernel always sums for the entropy: the leaner variant spills on sm_90.
    """
    (rows, size), vocabulary = hidden.shape, len(weight)
    plain = bias is None and softcap is None
    tile = tune.tile(tune.chip(hidden.device), size, vocabulary, hidden.dtype, plain)
    stats = hidden.new_empty(4, tile.splits, rows, dtype=torch.float32)
    # TMA reads from a multiple of 16 bytes on alone; without that, pointers cost registers which are not there
    hidden, weight, bias = (x if x is None or x.data_ptr() % 16 == 0 else x.clone() for x in (hidden, weight, bias))
    operands = hidden, weight
    if tile.descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        blocks = [tile.rows, tile.depth], [tile.columns, tile.depth]
        operands = [TensorDescriptor.from_tensor(x, block) for x, block in zip(operands, blocks, strict=True)]
    if rows:
        vocabulary_kernel[triton.cdiv(rows, tile.rows) * tile.splits,](
            *operands, bias, targets, logits, stats, rows, vocabulary, 1 / temperature, softcap,
            H=size, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, SPLITS=tile.splits, GROUP=tile.group,
            ENTROPY=entropy or logits is not None, DESCRIPTORS=tile.descriptors,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return stats
