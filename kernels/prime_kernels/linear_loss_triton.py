"""The Triton row kernel of the LM-head ops: logits -> log-prob and entropy, and in a second walk the dlogits."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from prime_kernels import linear_fused, tune
from prime_kernels.linear_fused import Gradient, Policy, Upstream
from prime_kernels.linear_logprob_triton import (
    FAR,
    LOWEST,
    PEAK,
    TARGET,
    TOTAL,
    WEIGHTED,
    exp,
    log1p,
    logit,
    tanh,
    vocabulary_stats,
)
from prime_kernels.reference import MAX_LOG_RATIO

LIMIT = tl.constexpr(MAX_LOG_RATIO)
# Read a number at a time: a kernel for each alignment of theirs would be compiled anew for every other packing
PER_ROW = ["stats", "targets", "old", "advantage", "token_weight", "ref"]
PER_ROW += ["sampling", "dlogprob", "dentropy", "logprob", "entropy"]


@triton.jit
def policy_gradient(logprob, old, advantage, ref, row, low, high, kl_coef):
    """d token loss / d logprob, without the entropy term: reference.policy_token_gradient."""
    a = tl.load(advantage + row)
    gradient = -a
    if old is not None:
        difference = logprob - tl.load(old + row)
        ratio = exp(tl.minimum(tl.maximum(difference, -LIMIT), LIMIT))
        gradient = -a * ratio
        clipped = -a * tl.minimum(tl.maximum(ratio, low), high)
        gradient = tl.where((clipped > gradient) | (tl.abs(difference) > LIMIT), 0.0, gradient)
    if ref is not None:
        difference = tl.load(ref + row) - logprob
        gradient += tl.where(tl.abs(difference) > LIMIT, 0.0, kl_coef * (1 - exp(difference)))
    return gradient


@triton.jit(do_not_specialize=[*PER_ROW, "stat_rows"])
def row_kernel(
    logits, stats, bias, targets, old, advantage, token_weight, ref, sampling, dlogprob, dentropy,
    logprob, entropy, dlogits,
    stat_rows, vocabulary, inverse_temperature, softcap, cap, low, high, entropy_coef, kl_coef,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One row a program: log-prob, entropy unless None, and dlogits unless None.

    stats: None, and the row is walked for them, or the vocabulary kernel's. The gradient is the policy loss's where
    `advantage` is given, else dlogprob (None: 1) and dentropy (None: 0) of each row. dlogits may be the logits' memory.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)  # else NaN: it cannot raise here
    if stats is None:
        lane = tl.arange(0, BLOCK)
        peak = tl.full([BLOCK], LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        weighted = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            column = start + lane
            b = None
            if bias is not None:
                b = tl.load(bias + column, mask=column < vocabulary, other=0).to(tl.float32)
            raw = tl.load(logits + row * vocabulary + column, mask=column < vocabulary, other=float("-inf"))
            z = logit(raw, b, inverse_temperature, softcap)
            z = tl.where((column < vocabulary) & (column != target), z, float("-inf"))
            decay = exp(-tl.abs(z - peak))  # one exponential an element: of what the old sum loses, or the new term has
            rises = z > peak
            if entropy is not None:
                old_weighted = decay * (weighted + total * (peak - z))
                weighted = tl.where(rises, old_weighted, weighted + decay * tl.maximum(z - peak, FAR))
            total = tl.where(rises, total * decay + 1, total + decay)
            peak = tl.maximum(peak, z)
        b_target = None
        if bias is not None:
            b_target = tl.load(bias + target, mask=known, other=0).to(tl.float32)
        raw_target = tl.load(logits + row * vocabulary + target, mask=known, other=0)
        target_logit = logit(raw_target, b_target, inverse_temperature, softcap)
    else:
        at = stats + tl.arange(0, SPLITS) * stat_rows + row
        step = stat_rows.to(tl.int64) * SPLITS
        peak, total = tl.load(at + PEAK * step), tl.load(at + TOTAL * step)
        target_logit = tl.sum(tl.load(at + TARGET * step), 0)
        weighted = total
        if entropy is not None:
            weighted = tl.load(at + WEIGHTED * step)
    highest = tl.maximum(tl.max(peak, 0), target_logit)
    fade = exp(peak - highest)
    others = tl.sum(total * fade, 0)  # of all columns but the target
    below = tl.where(known, target_logit - highest, float("nan"))
    e_target = exp(below)
    whole = others + e_target
    lp = tl.where(below > -1, 0 - log1p(others / e_target), below - tl.log(whole))
    tl.store(logprob + row, lp)
    if entropy is not None:
        spread = tl.sum(fade * (weighted + total * tl.maximum(peak - highest, FAR)), 0)
        ent = tl.maximum(tl.log(whole) - (spread + e_target * tl.maximum(below, FAR)) / whole, 0.0)
        tl.store(entropy + row, ent)

    if dlogits is not None:
        g = 1.0
        h = 0.0
        if advantage is not None:
            scale = tl.load(token_weight + row)
            if sampling is not None:
                ratio = lp - tl.load(sampling + row)
                scale *= tl.minimum(exp(tl.minimum(tl.maximum(ratio, -LIMIT), LIMIT)), cap)
            g = scale * policy_gradient(lp, old, advantage, ref, row, low, high, kl_coef)
            if entropy_coef is not None:
                h = -entropy_coef * scale
        if dlogprob is not None:
            g = tl.load(dlogprob + row)
        if dentropy is not None:
            h = tl.load(dentropy + row)
        offset = tl.log(whole)
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            b = None
            if bias is not None:
                b = tl.load(bias + column, mask=column < vocabulary, other=0).to(tl.float32)
            raw = tl.load(logits + row * vocabulary + column, mask=column < vocabulary, other=0)
            d = logit(raw, b, inverse_temperature, softcap) - highest
            p = exp(d) / whole
            dz = tl.where(column == target, g * (others / whole), -g * p)  # 1 - p of the target without cancellation
            if dentropy is not None or entropy_coef is not None:
                dz -= h * p * (tl.maximum(d, FAR) - offset + ent)
            if softcap is not None:
                x = raw if b is None else raw + b
                t = tanh(x / softcap)
                dz *= 1 - t * t
            dz *= inverse_temperature
            tl.store(dlogits + row * vocabulary + column, dz, mask=column < vocabulary)


class Rows:
    """See linear_fused. bfloat16 GEMMs run on tensor cores with float32 results; others run in float32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None):
        self.bias = None if bias is None else bias.contiguous()
        self.temperature, self.softcap = temperature, softcap
        self.operand = torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32
        self.streams = tune.path(tune.chip(hidden.device), hidden.shape[1], len(weight), self.operand) == "fused"
        self.chunk_rows, self.logit_rows = tune.gpu_rows(in_place=self.operand == torch.float32)

    def padded(self, rows: int) -> int:
        """Always the same: cuBLAS chooses its algorithm, and with it a row's bits, by the number of rows."""
        return self.logit_rows

    def run(self, hidden, weight, targets, logits, gradient: Gradient | None, logprob, entropy, dlogits) -> None:
        head = {"temperature": self.temperature, "softcap": self.softcap}
        stats = None
        if self.streams:
            hidden = hidden[: len(targets)]
            wanted = entropy is not None
            stats = vocabulary_stats(hidden, weight, self.bias, targets, logits, entropy=wanted, **head)
        else:
            linear_fused.product(hidden, weight.T, logits)
        rows(logits, stats, self.bias, targets, gradient, logprob, entropy, dlogits, vocabulary=len(weight), **head)


def rows(
    logits, stats, bias, targets, gradient: Gradient | None, logprob, entropy, dlogits,
    *, vocabulary: int, temperature: float, softcap: float | None,
) -> None:  # fmt: skip
    """Launch the row kernel on len(targets) rows of contiguous float32 logits (or stats), see there."""
    policy = gradient if isinstance(gradient, Policy) else Policy(None, None, None, None, None, 0.0, 0.0, 0.0, 0.0, 0.0)
    upstream = gradient if isinstance(gradient, Upstream) else Upstream()
    if len(targets):
        row_kernel[len(targets),](
            logits, stats, bias, targets, policy.old_logprob, policy.advantage, policy.token_weight, policy.ref_logprob,
            policy.sampling_logprob, *upstream, logprob, entropy, dlogits,
            len(targets), vocabulary, 1 / temperature, softcap,
            policy.importance_cap, 1 - policy.clip_low, 1 + policy.clip_high,
            policy.entropy_coef or None, policy.kl_coef,
            BLOCK=tune.ROW.block, SPLITS=0 if stats is None else stats.shape[1],
            num_warps=tune.ROW.warps, enable_fp_fusion=False,
        )  # fmt: skip


logprob = partial(linear_fused.logprob, Rows), partial(linear_fused.logprob_backward, Rows)
policy_loss = partial(linear_fused.policy_loss, Rows)
prm_loss = partial(linear_fused.prm_loss, Rows)
