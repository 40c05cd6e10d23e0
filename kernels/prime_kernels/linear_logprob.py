"""The log-prob of each target token under a linear LM head, and the entropy, without the logits."""

import torch
from torch import Tensor

from prime_kernels import checks
from prime_kernels.dispatch import operator, resolve
from prime_kernels.linear_torch import compute_dtype


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits)[target] of each row.

    logits = softcap * tanh(z / softcap) / temperature with z = hidden @ weight^T + bias.

    Args:
        hidden: (N, H) bfloat16, float16, float32 or float64; response positions only, row i predicting targets[i].
        weight: (V, H) in the dtype of hidden; bias: (V,) likewise, or None.
        targets: (N,) int64 token ids in 0..V-1 (checked only under PRIME_KERNELS_CHECK=1, which syncs).
        temperature, softcap: above 0; softcap=None for none.
        entropy: also return the entropy of each row's distribution.
        backend: see `prime_kernels.backends`.

    Returns logprob (N,) in nats, never above 0, and with entropy=True (logprob, entropy), both (N,); float32 (float64
    for float64 inputs), the dtype of the arithmetic. Both are differentiable in hidden, weight and bias: backward
    computes the logits again, so `weight` must hold its values then too (ZeRO-3: call this in the module owning it).

    Memory: a few chunks of logits (PRIME_KERNELS_CHUNK_ROWS rows; by default 2^26 logits), never (N, V).
    Raises ValueError for arguments that do not fit together, RuntimeError for a back-end that cannot run.
    """
    checks.head(hidden, weight, targets, bias, temperature, softcap)
    logprob, entropies = _logprob(hidden, weight, bias, targets, temperature, softcap, entropy, backend)
    return (logprob, entropies) if entropy else logprob


@operator("linear_logprob")
def _logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The entropy is (0,) where it is not wanted: an operator always returns tensors."""
    forward, _ = resolve("linear_logprob", backend, (hidden, weight))
    logprob, entropies = forward(
        hidden, weight, bias, targets.contiguous(), temperature=temperature, softcap=softcap, entropy=entropy
    )
    return logprob, logprob.new_empty(0) if entropies is None else entropies


@_logprob.register_fake
def _(hidden, weight, bias, targets, temperature, softcap, entropy, backend):
    logprob = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    return logprob, torch.empty_like(logprob) if entropy else logprob.new_empty(0)


@operator("linear_logprob_backward")
def _logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dlogprob: Tensor | None,
    dentropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    grads: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(0,) in the place of a gradient that is not wanted."""
    _, run = resolve("linear_logprob", backend, (hidden, weight))
    found = run(
        hidden, weight, bias, targets.contiguous(), dlogprob, dentropy,
        temperature=temperature, softcap=softcap, grads=grads,
    )  # fmt: skip
    return tuple(hidden.new_empty(0) if g is None else g.to(hidden.dtype) for g in found)


@_logprob_backward.register_fake
def _(hidden, weight, bias, targets, dlogprob, dentropy, temperature, softcap, grads, backend):
    wanted = zip((hidden, weight, bias), grads, strict=True)
    return tuple(hidden.new_empty(x.shape if grad else 0) for x, grad in wanted)


def _setup(ctx, inputs, output):
    *tensors, ctx.temperature, ctx.softcap, entropy, ctx.backend = inputs
    # The parameters themselves, not copies: ZeRO-3 frees them after forward and refills them before backward.
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    if not entropy:
        ctx.mark_non_differentiable(output[1])


def _backward(ctx, dlogprob, dentropy):
    if dlogprob is None and dentropy is None:
        return (None,) * 8
    grads = list(ctx.needs_input_grad[:3])
    found = _logprob_backward(*ctx.saved_tensors, dlogprob, dentropy, ctx.temperature, ctx.softcap, grads, ctx.backend)
    return *(g if wanted else None for g, wanted in zip(found, grads, strict=True)), *(None,) * 5


_logprob.register_autograd(_backward, setup_context=_setup)
