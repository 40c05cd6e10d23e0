"""The LM-head ops around a fused row kernel: GEMMs in chunks of rows, the gradient made where the logits still are.

A back-end brings a class Rows (linear_cpu.py, linear_loss_triton.py):

    Rows(hidden, weight, bias, temperature, softcap)
    operand      dtype of the GEMMs' operands; float32 dlogits take the place of their logits, others their own
    logit_rows   rows of float32 logits alive at once          chunk_rows   rows of dlogits alive at once
    padded(n)    rows of the logits GEMM of n rows: a function of n that keeps a row's bits independent of its place
    streams      log-probs alone need no logits
    run(hidden, weight, targets, logits, gradient, logprob, entropy, dlogits)   the logits GEMM and the row kernel
"""

from bisect import bisect_right
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prime_kernels.linear_torch import judged, kept_dtype, policy_result, slices, whole_rows
from prime_kernels.reference import PrmLoss, importance_weight


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


class Sums:
    """Gradients of weight and bias, None where not wanted, summed in float32: the first product writes them."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        self.weight, self.bias, self.adds = weight, bias, False

    def empty_like(self) -> "Sums":
        return Sums(*(None if x is None else torch.empty_like(x) for x in self))

    def __iter__(self):
        return iter((self.weight, self.bias))


class Head:
    """Log-probs chunk by chunk, and the gradients of hidden, weight and bias.

    The weight gradient is summed in float32 over the chunks, in their order, and rounded once; bfloat16 operands
    round dlogits once, and in `products` with a scale the hidden states too. ahead: the dlogits of `logit_rows` more
    rows than a chunk fit.
    """

    def __init__(
        self, rows_type, hidden, weight, bias, temperature, softcap, grads=(False, False, False), *, ahead=False
    ):
        self.kernel = rows_type(hidden, weight, bias, temperature, softcap)
        dtype = self.kernel.operand
        self.hidden, self.weight = hidden, weight.to(dtype).contiguous()
        self.kept = kept_dtype(hidden)
        self.grads = any(grads)
        self.logits = self.dlogits = None
        self.in_place = dtype == torch.float32
        self.room = self.kernel.chunk_rows + (self.kernel.logit_rows if ahead else 0)  # rows of dlogits
        make = hidden.new_empty
        if self.grads or not self.kernel.streams:
            rows = self.kernel.padded(min(len(hidden), self.kernel.logit_rows))
            before = min(len(hidden), self.kernel.chunk_rows) if self.grads and self.in_place and ahead else 0
            self.logits = make(before + rows, len(weight), dtype=torch.float32)
        if self.grads:
            own = (min(len(hidden), self.room), len(weight))
            self.dlogits = self.logits if self.in_place else make(own, dtype=dtype)
        self.dhidden = hidden.new_empty(hidden.shape, dtype=self.kept) if grads[0] else None
        make = hidden.new_empty if len(hidden) else hidden.new_zeros
        wanted = zip((weight, bias), grads[1:], strict=True)
        self.sums = Sums(*(make(x.shape, dtype=torch.float32) if grad else None for x, grad in wanted))
        self.aside: Sums | None = None  # of a row whose scale is not known yet

    def chunks(self):
        return slices(0, len(self.hidden), self.kernel.chunk_rows)

    def new(self) -> Tensor:
        return self.hidden.new_empty(len(self.hidden), dtype=torch.float32)

    def forward(
        self, rows: slice, targets: Tensor, logprob: Tensor, entropy=None, gradient: Gradient | None = None, at: int = 0
    ) -> None:
        """Writes logprob[rows] and entropy[rows]; with a gradient also the dlogits of these rows, from row `at` on."""
        step = len(self.hidden) or 1
        if self.logits is not None:
            step = self.kernel.logit_rows
        for part in slices(rows.start, rows.stop, step):
            first, count = at + part.start - rows.start, part.stop - part.start
            hidden, logits = self._operand(part), None
            if self.logits is not None:
                hidden = F.pad(hidden, (0, 0, 0, self.kernel.padded(count) - count))
                place = first if self.in_place and gradient is not None else 0
                logits = self.logits[place : place + len(hidden)]
            self.kernel.run(
                hidden,
                self.weight,
                targets[part],
                logits,
                None if gradient is None else _take(gradient, part),
                logprob[part],
                None if entropy is None else entropy[part],
                None if gradient is None else self.dlogits[first : first + count],
            )

    def products(self, rows: slice, scale: Tensor | None = None, *, sums: Sums | None = None) -> None:
        """Adds the gradients of these rows, whose dlogits come first, each row's times its `scale`; into `sums`."""
        dlogits, hidden, sums = self.dlogits[: rows.stop - rows.start], self._operand(rows), sums or self.sums
        if self.dhidden is not None:
            if scale is None and self.kept == torch.float32:
                product(dlogits, self.weight, self.dhidden[rows])
            else:  # into float32: torch lets cuBLAS add the parts of a bfloat16 product in bfloat16, and V is long
                dhidden = product(dlogits, self.weight, torch.empty_like(hidden, dtype=torch.float32))
                self.dhidden[rows] = dhidden if scale is None else dhidden.mul_(scale[:, None])
        if sums.weight is not None:
            scaled = hidden if scale is None else (hidden * scale[:, None]).to(hidden.dtype)
            product(dlogits.T, scaled, sums.weight, sums.adds)
        if sums.bias is not None:
            each = torch.ones_like(hidden[:, 0]) if scale is None else scale.to(hidden.dtype)
            product(each[None], dlogits, sums.bias[None], sums.adds)
        sums.adds = True

    def lay_aside(self, rows: slice) -> None:
        """`products` without the scale of these rows, a part of one sequence, which `take_up` knows."""
        self.aside = self.aside or self.sums.empty_like()
        self.products(rows, sums=self.aside)

    def take_up(self, rows: slice, scale: Tensor) -> None:
        """Adds what was laid aside of these rows. scale: ()."""
        if self.dhidden is not None:
            self.dhidden[rows].mul_(scale)
        for total, part in zip(self.sums, self.aside, strict=True):
            if total is not None:
                _ = total.addcmul_(part, scale) if self.sums.adds else torch.mul(part, scale, out=total)
        self.sums.adds, self.aside.adds = True, False

    def move_up(self, rows: int, count: int) -> None:
        """The `count` dlogits after the first `rows` become the first ones."""
        for start in range(0, count, rows):  # pieces that do not overlap their places
            size = min(rows, count - start)
            self.dlogits[start : start + size] = self.dlogits[rows + start : rows + start + size]

    def gradients(self) -> tuple[Tensor | None, ...]:
        self.logits = self.dlogits = None
        return tuple(None if g is None else g.to(self.kept) for g in (self.dhidden, *self.sums))

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
    rows_type, hidden, weight, bias, targets, ref_logprob, outcome, cu_seqlens, row_weight, intercept,
    *, beta, softcap, every_prefix, grads,
):  # fmt: skip
    """-> PrmLoss, and the gradients of hidden, weight and bias, None where `grads` is False.

    dlogits of a token = its sequence's coefficient * (one-hot - p), and only the coefficient waits for the sequence's
    end. So one-hot - p is made at once, of sequences end to end, and the coefficient scales the small operands: dX, and
    the hidden states of dW. The parts of dW of a sequence longer than the buffer are summed apart until it is known.

    With every_prefix each token has a coefficient of its own, and that of the first waits for the last: the buffer
    takes whole sequences, and of a longer one all log-probs come first, so that its logits are computed twice.
    """
    head = Head(rows_type, hidden, weight, bias, 1.0, softcap, grads, ahead=not every_prefix)
    ref_logprob, outcome, row_weight, intercept = map(_float, (ref_logprob, outcome, row_weight, intercept))
    logprob, score, loss = head.new(), torch.empty_like(outcome), torch.empty_like(outcome)
    cuts, offsets, step = cu_seqlens.tolist(), cu_seqlens.to(hidden.device), head.kernel.logit_rows

    def judge(rows: slice) -> Tensor:
        """Writes scores and losses of these sequences; returns the coefficient of each of their tokens."""
        tokens, inner = slice(cuts[rows.start], cuts[rows.stop]), offsets[rows.start : rows.stop + 1] - cuts[rows.start]
        one = None if intercept is None else intercept[rows]
        log_ratio = logprob[tokens] - ref_logprob[tokens]
        score[rows], loss[rows], scale = judged(
            log_ratio, outcome[rows], row_weight[rows], one, inner, beta, every_prefix
        )
        return scale

    def result() -> tuple[PrmLoss, tuple]:
        return PrmLoss((row_weight * loss).sum(), logprob, score), head.gradients()

    if not head.grads:
        head.forward(slice(0, len(hidden)), targets, logprob)
        judge(slice(0, len(outcome)))
        return result()
    if every_prefix:
        for row, end, start, stop in whole_rows(cuts, head.room):
            fits = stop - start <= head.room
            head.forward(slice(start, stop), targets, logprob, gradient=Upstream() if fits else None)
            scale = judge(slice(row, end))
            for part in slices(start, stop, head.room):
                if not fits:
                    head.forward(part, targets, logprob, gradient=Upstream())
                head.products(part, scale[part.start - start : part.stop - start])
        return result()
    first = row = 0  # the token of the first dlogits in the buffer, and its sequence
    for part in slices(0, len(hidden), step):
        head.forward(part, targets, logprob, gradient=Upstream(), at=part.start - first)
        made, last = part.stop, part.stop == len(hidden)
        if made - first + step <= head.room and not last:
            continue
        end = bisect_right(cuts, made) - 1  # the sequences before it are whole
        if end > row:
            start, stop, scale = cuts[row], cuts[end], judge(slice(row, end))
            if start < first:
                head.take_up(slice(start, first), scale[0])
            head.products(slice(first, stop), scale[first - start :])
            head.move_up(stop - first, made - stop)
            first, row = stop, end
        if made - first + step > head.room and not last:
            head.lay_aside(slice(first, made))
            first = made
    return result()


def _take(gradient: Gradient, rows: slice) -> Gradient:
    return type(gradient)(*(x[rows] if isinstance(x, Tensor) else x for x in gradient))


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()
