"""The LM-head ops around a fused row kernel: GEMMs in chunks of rows, the gradient made where the logits still are.

A back-end brings a class Rows (linear_cpu.py, linear_loss_triton.py):

    Rows(hidden, weight, bias, temperature, softcap)
    operand      dtype of the GEMMs' operands; float32 dlogits take the place of their logits, others their own
    logit_rows   rows of float32 logits alive at once          chunk_rows   rows of dlogits alive at once
    padded(n)    rows of the logits GEMM of n rows: a function of n that keeps a row's bits independent of its place
    streams      log-probs alone need no logits
    run(hidden, weight, targets, logits, gradient, logprob, entropy, dlogits)   the logits GEMM and the row kernel
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prime_kernels.linear_torch import kept_dtype, policy_result, slices, whole_rows
from prime_kernels.reference import PrmLoss, importance_weight, prm_row_gradient, prm_row_loss, segment_sum


class Upstream(NamedTuple):
    """The gradient of each row's log-prob (None: 1) and entropy (None: 0)."""

    dlogprob: Tensor | None = None
    dentropy: Tensor | None = None


class Policy(NamedTuple):
    """Or what the row kernel makes it from: the policy loss's inputs, (N,) float32."""

    advantage: Tensor
    token_weight: Tensor
    old_logprob: Tensor | None
    ref_logprob: Tensor | None  # None without a KL term
    sampling_logprob: Tensor | None  # None without importance weights from this forward's log-probs
    importance_cap: float
    clip_low: float
    clip_high: float
    entropy_coef: float
    kl_coef: float


Gradient = Upstream | Policy


class Head:
    """Log-probs chunk by chunk, and the gradients of hidden, weight and bias.

    The weight gradient is summed in float32 over the chunks, in their order, and rounded once; bfloat16 operands
    round dlogits once, and in `products` with a scale the hidden states too.
    """

    def __init__(self, rows_type, hidden, weight, bias, temperature, softcap, grads=(False, False, False)):
        self.kernel = rows_type(hidden, weight, bias, temperature, softcap)
        dtype = self.kernel.operand
        self.hidden, self.weight = hidden, weight.to(dtype).contiguous()
        self.kept = kept_dtype(hidden)
        self.grads = any(grads)
        self.logits = self.dlogits = None
        if self.grads or not self.kernel.streams:
            rows = self.kernel.padded(min(len(hidden), self.kernel.logit_rows))
            self.logits = hidden.new_empty(rows, len(weight), dtype=torch.float32)
        if self.grads:
            rows = min(len(hidden), self.kernel.chunk_rows)
            separate = dtype != torch.float32
            self.dlogits = hidden.new_empty(rows, len(weight), dtype=dtype) if separate else self.logits
        self.dhidden = hidden.new_empty(hidden.shape, dtype=self.kept) if grads[0] else None
        make = hidden.new_empty if len(hidden) else hidden.new_zeros  # the first chunk writes, the others add
        self.dweight = make(weight.shape, dtype=torch.float32) if grads[1] else None
        self.dbias = make(bias.shape, dtype=torch.float32) if grads[2] else None
        self.adds = False

    def chunks(self):
        return slices(0, len(self.hidden), self.kernel.chunk_rows)

    def new(self) -> Tensor:
        return self.hidden.new_empty(len(self.hidden), dtype=torch.float32)

    def forward(self, rows: slice, targets: Tensor, logprob: Tensor, entropy=None, gradient: Gradient | None = None):
        """Writes logprob[rows] and entropy[rows]; with a gradient also the dlogits of these rows, one chunk."""
        step = len(self.hidden) or 1
        if self.logits is not None:
            step = self.kernel.logit_rows
        for part in slices(rows.start, rows.stop, step):
            first, count = part.start - rows.start, part.stop - part.start
            hidden = self._operand(part)
            if self.logits is not None:
                hidden = F.pad(hidden, (0, 0, 0, self.kernel.padded(count) - count))
            self.kernel.run(
                hidden,
                self.weight,
                targets[part],
                self.logits,
                None if gradient is None else _take(gradient, part),
                logprob[part],
                None if entropy is None else entropy[part],
                None if gradient is None else self.dlogits[first : first + count],
            )

    def products(self, rows: slice, scale: Tensor | None = None) -> None:
        """Adds the gradients of the chunk whose dlogits were made last, each row's times its `scale`."""
        dlogits, hidden = self.dlogits[: rows.stop - rows.start], self._operand(rows)
        if self.dhidden is not None:
            if scale is None and self.kept == torch.float32:
                product(dlogits, self.weight, self.dhidden[rows])
            else:  # into float32: torch lets cuBLAS add the parts of a bfloat16 product in bfloat16, and V is long
                dhidden = product(dlogits, self.weight, torch.empty_like(hidden, dtype=torch.float32))
                self.dhidden[rows] = dhidden if scale is None else dhidden.mul_(scale[:, None])
        if self.dweight is not None:
            scaled = hidden if scale is None else (hidden * scale[:, None]).to(hidden.dtype)
            product(dlogits.T, scaled, self.dweight, self.adds)
        if self.dbias is not None:
            each = torch.ones_like(hidden[:, 0]) if scale is None else scale.to(hidden.dtype)
            product(each[None], dlogits, self.dbias[None], self.adds)
        self.adds = True

    def gradients(self) -> tuple[Tensor | None, ...]:
        self.logits = self.dlogits = None
        return tuple(None if g is None else g.to(self.kept) for g in (self.dhidden, self.dweight, self.dbias))

    def _operand(self, rows: slice) -> Tensor:
        return self.hidden[rows].to(self.kernel.operand).contiguous()


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, accumulated in float32."""
    with torch.autocast(a.device.type, enabled=False):
        wider = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}  # only CUDA has it
        if accumulate:
            return torch.addmm(out, a, b, out=out, **wider)
        return torch.mm(a, b, out=out, **wider)


def logprob(rows_type, hidden, weight, bias, targets, *, temperature, softcap, entropy):
    """-> logprob (N,), entropy (N,) or None."""
    head = Head(rows_type, hidden, weight, bias, temperature, softcap)
    logprob, entropies = head.new(), head.new() if entropy else None
    head.forward(slice(0, len(hidden)), targets, logprob, entropies)
    return logprob, entropies


def logprob_backward(rows_type, hidden, weight, bias, targets, dlogprob, dentropy, *, temperature, softcap, grads):
    """-> the gradients of hidden, weight and bias, None where `grads` is False; the chunks are computed again."""
    head = Head(rows_type, hidden, weight, bias, temperature, softcap, grads)
    logprob, entropy = head.new(), None if dentropy is None else head.new()
    gradient = Upstream(*map(_float, (torch.zeros_like(dentropy) if dlogprob is None else dlogprob, dentropy)))
    for rows in head.chunks():
        head.forward(rows, targets, logprob, entropy, gradient)
        head.products(rows)
    return head.gradients()


def policy_loss(
    rows_type, hidden, weight, bias, targets, old_logprob, advantage, token_weight, ref_logprob, sampling_logprob,
    *, importance_cap, clip_low, clip_high, temperature, softcap, entropy_coef, kl_coef, grads,
):  # fmt: skip
    """-> PolicyLoss, and the gradients of hidden, weight and bias, None where `grads` is False."""
    head = Head(rows_type, hidden, weight, bias, temperature, softcap, grads)
    logprob, entropy = head.new(), head.new()
    vectors = map(_float, (old_logprob, advantage, token_weight, ref_logprob, sampling_logprob))
    old_logprob, advantage, token_weight, ref_logprob, sampling_logprob = vectors
    options = {"clip_low": clip_low, "clip_high": clip_high, "entropy_coef": entropy_coef, "kl_coef": kl_coef}
    if head.grads:
        gradient = Policy(
            advantage, token_weight, old_logprob, ref_logprob if kl_coef else None, sampling_logprob, importance_cap,
            **options,
        )  # fmt: skip
        for rows in head.chunks():
            head.forward(rows, targets, logprob, entropy, gradient)
            head.products(rows)
    else:
        head.forward(slice(0, len(hidden)), targets, logprob, entropy)
    if sampling_logprob is not None:
        token_weight = token_weight * importance_weight(logprob, sampling_logprob, importance_cap)
    result = policy_result(logprob, entropy, old_logprob, advantage, token_weight, ref_logprob, **options)
    return result, head.gradients()


def prm_loss(
    rows_type, hidden, weight, bias, targets, ref_logprob, outcome, cu_seqlens, row_weight, *, beta, softcap, grads
):
    """-> PrmLoss, and the gradients of hidden, weight and bias, None where `grads` is False.

    dlogits of a row = its coefficient * (one-hot - p), and only the coefficient waits for the whole row. So a chunk of
    whole rows makes one-hot - p at once, and the coefficient scales the small operands: dX, and the hidden states of
    dW. Only a row longer than a chunk has its logits computed twice.
    """
    head = Head(rows_type, hidden, weight, bias, 1.0, softcap, grads)
    ref_logprob, outcome, row_weight = map(_float, (ref_logprob, outcome, row_weight))
    logprob, scale, score = head.new(), head.new(), torch.empty_like(outcome)
    limit, offsets = head.kernel.chunk_rows, cu_seqlens.to(hidden.device)
    for first, last, start, stop in whole_rows(cu_seqlens.tolist(), limit):
        pieces = list(slices(start, stop, limit))
        at_once = head.grads and len(pieces) == 1
        for rows in pieces:
            head.forward(rows, targets, logprob, gradient=Upstream() if at_once else None)
        mine, tokens = slice(first, last), slice(start, stop)
        cuts = offsets[first : last + 1] - start
        score[mine] = beta * segment_sum(logprob[tokens] - ref_logprob[tokens], cuts)
        if head.grads:
            dscore = row_weight[mine] * prm_row_gradient(score[mine], outcome[mine])
            scale[tokens] = (beta * dscore).repeat_interleave(cuts.diff(), output_size=stop - start)
            for rows in pieces:
                if not at_once:
                    head.forward(rows, targets, logprob, gradient=Upstream(scale))
                head.products(rows, scale[rows] if at_once else None)
    return PrmLoss((row_weight * prm_row_loss(score, outcome)).sum(), logprob, score), head.gradients()


def _take(gradient: Gradient, rows: slice) -> Gradient:
    return type(gradient)(*(x[rows] if isinstance(x, Tensor) else x for x in gradient))


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()
