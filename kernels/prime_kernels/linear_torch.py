"""The torch back-end of the LM-head ops: one chunk of rows at a time, the (N, V) logits never held."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prime_kernels.reference import (
    PolicyLoss,
    PrmLoss,
    importance_weight,
    kl_token_gradient,
    kl_token_loss,
    policy_token_gradient,
    policy_token_loss,
    prm_prefix_gradient,
    prm_prefix_logit,
    prm_prefix_loss,
    prm_row_gradient,
    prm_row_loss,
    segment_sum,
)

CHUNK_LOGITS = 2**26  # logits alive at once; PRIME_KERNELS_CHUNK_ROWS sets the rows of a chunk instead
MIN_GEMM_ROWS = 16  # a GEMM of fewer rows may round differently; padded, a row's bits do not depend on its chunk


class Chunk(NamedTuple):
    rows: slice
    hidden: Tensor
    targets: Tensor
    probs: Tensor
    slope: Tensor | None  # of the softcap
    logprob: Tensor
    entropy: Tensor | None


class Head:
    """hidden -> log-probs and back, chunk by chunk: neither the (N, V) logits nor their gradient ever exist.

    Arithmetic is float64 for float64 inputs, else float32; bfloat16 GEMMs on CUDA take bfloat16 operands and
    return float32. The logits are softcap * tanh(z / softcap) / temperature with z = hidden @ weight.T + bias.
    """

    def __init__(self, hidden, weight, bias, temperature, softcap, grads=(False, False, False)):
        self.dtype = compute_dtype(hidden)
        self.hidden, self.weight, self.bias = hidden, self._operand(weight), bias
        self.temperature, self.softcap = temperature, softcap
        self.kept = kept_dtype(hidden)
        self.dhidden = hidden.new_empty(hidden.shape, dtype=self.kept) if grads[0] else None
        self.dweight = weight.new_zeros(weight.shape, dtype=self.dtype) if grads[1] else None
        self.dbias = torch.zeros_like(bias, dtype=self.dtype) if grads[2] else None

    def forward(self, rows: slice, targets: Tensor, entropy: bool = False) -> Chunk:
        targets, hidden = targets[rows, None], self._operand(self.hidden[rows])
        n = len(hidden)
        z = self._mm(F.pad(hidden, (0, 0, 0, max(0, MIN_GEMM_ROWS - n))), self.weight.T)
        if self.bias is not None:
            z += self.bias
        slope = None
        if self.softcap is not None:
            z = z.div_(self.softcap).tanh_()
            slope = 1 - z[:n].square()
            z *= self.softcap
        z /= self.temperature
        z -= z.amax(-1, keepdim=True)
        target_logit = z[:n].gather(1, targets).squeeze(1)
        total = z.exp_().sum(-1, keepdim=True)
        logprob = target_logit - total[:n, 0].log()  # the largest logit is 0 and total >= 1: never above 0
        probs = z.div_(total)
        h = torch.special.entr(probs).sum(-1)[:n] if entropy else None
        return Chunk(rows, hidden, targets, probs[:n], slope, logprob, h)

    def backward(self, chunk: Chunk, dlogprob: Tensor, dentropy: Tensor | None = None) -> None:
        """Adds the gradients of sum(dlogprob * logprob) + sum(dentropy * entropy); uses the chunk up."""
        if dentropy is None:
            dlogits = chunk.probs.mul_(-dlogprob[:, None])
        else:
            dlogits = torch.special.entr(chunk.probs).mul_(dentropy[:, None])
            dlogits -= chunk.probs.mul_((dlogprob + dentropy * chunk.entropy)[:, None])
        dlogits.scatter_add_(1, chunk.targets, dlogprob[:, None])
        dlogits /= self.temperature
        if chunk.slope is not None:
            dlogits *= chunk.slope
        if self.dbias is not None:
            self.dbias += dlogits.sum(0)
        dlogits = dlogits.to(self.weight.dtype)
        if self.dhidden is not None:
            self.dhidden[chunk.rows] = self._mm(dlogits, self.weight)
        if self.dweight is not None:
            self._mm(dlogits.T, chunk.hidden, total=self.dweight)

    def gradients(self) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.to(self.kept) for g in (self.dhidden, self.dweight, self.dbias))

    def _operand(self, x: Tensor) -> Tensor:
        return x if x.is_cuda and x.dtype == torch.bfloat16 else x.to(self.dtype)

    def _mm(self, a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            if a.dtype == self.dtype:
                return torch.mm(a, b) if total is None else total.addmm_(a, b)
            product = torch.mm(a, b, out_dtype=self.dtype)  # only CUDA has it
            return product if total is None else total.add_(product)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def kept_dtype(hidden: Tensor) -> torch.dtype:
    """Of the gradients: float16 ones would underflow before a loss scale reaches them."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def chunk_rows(vocabulary: int) -> int:
    return int(os.environ.get("PRIME_KERNELS_CHUNK_ROWS", 0)) or max(1, CHUNK_LOGITS // vocabulary)


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


def logprob(hidden, weight, bias, targets, *, temperature, softcap, entropy):
    """-> logprob (N,), entropy (N,) or None."""
    head = Head(hidden, weight, bias, temperature, softcap)
    logprob = hidden.new_empty(len(hidden), dtype=head.dtype)
    entropies = torch.empty_like(logprob) if entropy else None
    for rows in slices(0, len(hidden), chunk_rows(len(weight))):
        chunk = head.forward(rows, targets, entropy)
        logprob[rows] = chunk.logprob
        if entropy:
            entropies[rows] = chunk.entropy
    return logprob, entropies


def logprob_backward(hidden, weight, bias, targets, dlogprob, dentropy, *, temperature, softcap, grads):
    """-> the gradients of hidden, weight and bias, None where `grads` is False; the chunks are computed again."""
    head = Head(hidden, weight, bias, temperature, softcap, grads)
    if dlogprob is None:
        dlogprob = torch.zeros_like(dentropy)
    for rows in slices(0, len(hidden), chunk_rows(len(weight))):
        chunk = head.forward(rows, targets, entropy=dentropy is not None)
        head.backward(chunk, dlogprob[rows], None if dentropy is None else dentropy[rows])
    return head.gradients()


def policy_loss(
    hidden, weight, bias, targets, old_logprob, advantage, token_weight, ref_logprob, sampling_logprob,
    *, importance_cap, clip_low, clip_high, temperature, softcap, entropy_coef, kl_coef, grads,
) -> tuple[PolicyLoss, tuple]:  # fmt: skip
    """-> PolicyLoss, and the gradients of hidden, weight and bias, None where `grads` is False. sampling_logprob only
    on-policy."""
    head = Head(hidden, weight, bias, temperature, softcap, grads)
    vectors = (old_logprob, advantage, token_weight, ref_logprob, sampling_logprob)
    vectors = (None if x is None else x.to(head.dtype) for x in vectors)
    old_logprob, advantage, token_weight, ref_logprob, sampling_logprob = vectors
    logprob = hidden.new_empty(len(hidden), dtype=head.dtype)
    entropy = torch.empty_like(logprob)
    for rows in slices(0, len(hidden), chunk_rows(len(weight))):
        chunk = head.forward(rows, targets, entropy=True)
        logprob[rows], entropy[rows] = chunk.logprob, chunk.entropy
        if any(grads):
            scale = token_weight[rows]
            if sampling_logprob is not None:
                scale = scale * importance_weight(chunk.logprob, sampling_logprob[rows], importance_cap)
            old = chunk.logprob if old_logprob is None else old_logprob[rows]
            dlogprob = policy_token_gradient(chunk.logprob, old, advantage[rows], clip_low, clip_high)
            if kl_coef:
                dlogprob += kl_coef * kl_token_gradient(chunk.logprob, ref_logprob[rows])
            head.backward(chunk, scale * dlogprob, -entropy_coef * scale if entropy_coef else None)
    if sampling_logprob is not None:
        token_weight = token_weight * importance_weight(logprob, sampling_logprob, importance_cap)
    options = {"clip_low": clip_low, "clip_high": clip_high, "entropy_coef": entropy_coef, "kl_coef": kl_coef}
    result = policy_result(logprob, entropy, old_logprob, advantage, token_weight, ref_logprob, **options)
    return result, head.gradients()


def policy_result(
    logprob, entropy, old_logprob, advantage, token_weight, ref_logprob, *, clip_low, clip_high, entropy_coef, kl_coef
) -> PolicyLoss:
    """The loss and the metrics, once the log-probs and entropies of all rows are there."""
    old = logprob if old_logprob is None else old_logprob
    loss, clipped = policy_token_loss(logprob, old, advantage, clip_low, clip_high)
    if kl_coef:
        loss = loss + kl_coef * kl_token_loss(logprob, ref_logprob)
    if entropy_coef:
        loss = loss - entropy_coef * entropy
    active = token_weight != 0
    count = active.sum().clamp(min=1)
    clip_fraction = (clipped & active).sum() / count
    approx_kl = (old - logprob).where(active, 0).sum() / count
    dtype = logprob.dtype
    return PolicyLoss((token_weight * loss).sum(), logprob, entropy, clip_fraction.to(dtype), approx_kl.to(dtype))


def prm_loss(
    hidden, weight, bias, targets, ref_logprob, outcome, cu_seqlens, row_weight, intercept,
    *, beta, softcap, every_prefix, grads,
) -> tuple[PrmLoss, tuple]:  # fmt: skip
    """-> PrmLoss, and the gradients of hidden, weight and bias, None where `grads` is False.

    A chunk holds whole rows, so their coefficients are known while its probabilities still exist; only a row longer
    than a chunk has its logits computed twice.
    """
    head = Head(hidden, weight, bias, 1.0, softcap, grads)
    ref_logprob, outcome, row_weight = (x.to(head.dtype) for x in (ref_logprob, outcome, row_weight))
    logprob = hidden.new_empty(len(hidden), dtype=head.dtype)
    score, loss = torch.empty_like(outcome), torch.empty_like(outcome)
    limit, cuts = chunk_rows(len(weight)), cu_seqlens.to(hidden.device)
    for first, last, start, stop in whole_rows(cu_seqlens.tolist(), limit):
        pieces = list(slices(start, stop, limit))
        for rows in pieces:
            chunk = head.forward(rows, targets)
            logprob[rows] = chunk.logprob
        score[first:last], loss[first:last], dlogprob = judged(
            logprob[start:stop] - ref_logprob[start:stop],
            outcome[first:last],
            row_weight[first:last],
            None if intercept is None else intercept[first:last],
            cuts[first : last + 1] - start,
            beta,
            every_prefix,
        )
        if any(grads):
            for rows in pieces:
                if len(pieces) > 1:
                    chunk = head.forward(rows, targets)
                head.backward(chunk, dlogprob[rows.start - start : rows.stop - start])
    return PrmLoss((row_weight * loss).sum(), logprob, score), head.gradients()


def judged(
    log_ratio: Tensor,
    outcome: Tensor,
    row_weight: Tensor,
    intercept: Tensor | None,
    cu_seqlens: Tensor,
    beta: float,
    every_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score and loss of each row, (R,), and the derivative of row_weight * loss in each log-prob, (T,)."""
    score = beta * segment_sum(log_ratio, cu_seqlens)
    intercept = torch.zeros_like(outcome) if intercept is None else intercept.to(score.dtype)
    if not every_prefix:
        logit = intercept + score
        loss, dscore = prm_row_loss(logit, outcome), row_weight * prm_row_gradient(logit, outcome)
        return score, loss, (beta * dscore).repeat_interleave(cu_seqlens.diff(), output_size=len(log_ratio))
    logit = prm_prefix_logit(log_ratio, intercept, cu_seqlens, beta)
    dlogprob = prm_prefix_gradient(logit, outcome, cu_seqlens, beta)
    weight = row_weight.repeat_interleave(cu_seqlens.diff(), output_size=len(log_ratio))
    loss = prm_prefix_loss(logit, outcome, cu_seqlens).to(score.dtype)
    return score, loss, (weight * dlogprob).to(score.dtype)


def whole_rows(cu_seqlens: list[int], limit: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, last row + 1, first token, last token + 1) of chunks of at most `limit` tokens, or one longer row."""
    first = 0
    for row in range(1, len(cu_seqlens)):
        if row + 1 == len(cu_seqlens) or cu_seqlens[row + 1] - cu_seqlens[first] > limit:
            yield first, row, cu_seqlens[first], cu_seqlens[row]
            first = row
