"""LM-head losses that compute their gradient in the forward: three GEMMs, no logits kept, no weight in backward."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prime_kernels import checks
from prime_kernels.dispatch import operator, resolve
from prime_kernels.linear_torch import compute_dtype, kept_dtype
from prime_kernels.reference import PolicyLoss, PrmLoss, importance_weight


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy_coef: float = 0.0,
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    sampling_logprob: Tensor | None = None,
    importance_cap: float = 2.0,
    backend: str | None = None,
) -> PolicyLoss:
    """The PPO-clip policy loss of a linear LM head: loss = sum(token_weight * token loss), with

        token loss = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)) - entropy_coef entropy + kl_coef k3
        ratio = exp(logprob - old_logprob),    k3 = exp(ref_logprob - logprob) - (ref_logprob - logprob) - 1

    as in arXiv 2502.01456, section 4.1, and the published code (PRIME-RL/PRIME 18ad596f), which takes the token mean:
    token_weight = 1 / number of tokens. Both exponents are limited to +-20 (as verl does): beyond, that term is
    constant and its gradient 0. Log-probs are those of `linear_logprob`, which also describes hidden, weight, targets,
    bias, temperature and softcap.

    Args:
        old_logprob: (N,) float32 or float64 in nats; None on-policy: the ratio is 1, its gradient that of logprob.
        advantage, token_weight: (N,) float32 or float64. A token of weight 0 is left out of the metrics.
        ref_logprob: (N,) float32 or float64, needed when kl_coef is not 0.
        sampling_logprob: (N,) float32 or float64, under the probabilities that the tokens were sampled from, where
            those are not the old policy's (another engine's kernels, a truncated distribution). Each token's weight is
            then token_weight * min(exp(old_logprob - sampling_logprob), importance_cap), without a gradient.

    Returns PolicyLoss: loss (), differentiable in hidden, weight and bias; detached: logprob (N,), entropy (N,),
    clip_fraction () where the clipped branch is active, approx_kl () = mean(old_logprob - logprob), the last two over
    tokens of nonzero weight, 0 if there are none. float32 (float64 for float64 inputs).

    The gradients are computed here, not in backward, unless nothing requires one; backward only scales them.
    Memory: a few chunks of logits, a float32 weight gradient, the gradients. Errors as `linear_logprob`.
    """
    checks.head(hidden, weight, targets, bias, temperature, softcap)
    per_token = {"old_logprob": old_logprob, "advantage": advantage, "token_weight": token_weight}
    per_token |= {"ref_logprob": ref_logprob, "sampling_logprob": sampling_logprob}
    for name, value in per_token.items():
        if value is not None or name in ("advantage", "token_weight"):
            checks.tensor(name, value, targets.shape, checks.REAL, hidden, "one value for each row of hidden")
    if kl_coef and ref_logprob is None:
        raise ValueError(f"ref_logprob is None with kl_coef {kl_coef}: pass the reference log-probs or kl_coef=0")
    checks.between("clip_low", clip_low, 0, 1)
    checks.between("clip_high", clip_high, 0, float("inf"))
    checks.positive("importance_cap", importance_cap)
    if sampling_logprob is not None and old_logprob is not None:  # else known only when this forward's log-probs are
        token_weight = token_weight * importance_weight(old_logprob, sampling_logprob, importance_cap)
        sampling_logprob = None
    loss, logprob, entropies, clip_fraction, approx_kl, *_ = _policy_loss(
        hidden, weight, bias, targets, old_logprob, advantage, token_weight, ref_logprob, sampling_logprob,
        importance_cap, clip_low, clip_high, temperature, softcap, entropy_coef, kl_coef,
        _wanted(hidden, weight, bias), backend,
    )  # fmt: skip
    return PolicyLoss(loss, logprob, entropies, clip_fraction, approx_kl)


def linear_prm_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logprob: Tensor,
    outcome: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    beta: float = 0.05,
    row_weight: Tensor | None = None,
    intercept: Tensor | None = None,
    every_prefix: bool = False,
    backend: str | None = None,
) -> PrmLoss:
    """The implicit PRM's cross-entropy on a linear LM head: loss = sum(row_weight * BCE(sigmoid(beta * Q), outcome)),

        Q_i = sum over the tokens of row i of logprob - ref_logprob

    (arXiv 2502.01456, eq. 3, and the CE loss of the published code, PRIME-RL/PRIME 18ad596f; here from logits, so that
    a large beta * Q keeps its gradient). Every token's logprob has the gradient row_weight * beta * (sigmoid(beta * Q)
    - outcome). Temperature is 1. `linear_logprob` describes hidden, weight, targets, bias and softcap.

    An intercept, such as the log-odds of a group's mean outcome, is what the log-ratios add to: sigmoid(intercept_i +
    beta * Q_i). With every_prefix the loss of row i is the mean over its tokens t of BCE(sigmoid(intercept_i +
    beta * S_t), outcome), S_t the sum of logprob - ref_logprob up to and including t (arXiv 2604.13197); a token's
    logprob then has the gradient row_weight * beta / length * sum of sigmoid - outcome from it on.

    Args:
        ref_logprob: (N,) float32 or float64 in nats.
        outcome: (R,) float32 or float64 in 0..1; fractions are soft labels.
        cu_seqlens: (R+1,) int32 or int64, 0, ..., N: row i is cu_seqlens[i] to cu_seqlens[i+1] - 1, one token or more.
            The host reads it; on the CPU, with the rest on a GPU, that costs no synchronisation.
        row_weight: (R,) float32 or float64; None for 1 / R. beta: above 0.
        intercept: (R,) float32 or float64, log-odds; None for 0.

    Returns PrmLoss: loss (), differentiable in hidden, weight and bias; detached: logprob (N,), score (R,) = beta * Q.
    float32 (float64 for float64 inputs).

    The gradients are computed here, as in `linear_policy_loss`. A row longer than a chunk costs a second (V, H)
    float32 sum; in the torch back-end, and with every_prefix in all, its logits twice.
    Errors as `linear_logprob`, and ValueError naming an empty row.
    """
    checks.head(hidden, weight, targets, bias, 1.0, softcap)
    checks.tensor("ref_logprob", ref_logprob, targets.shape, checks.REAL, hidden, "one value for each row of hidden")
    checks.tensor("outcome", outcome, (None,), checks.REAL, hidden)
    like = hidden if getattr(cu_seqlens, "is_cuda", False) else None
    checks.tensor("cu_seqlens", cu_seqlens, (len(outcome) + 1,), checks.OFFSETS, like, "one entry more than outcome")
    if row_weight is None:
        row_weight = torch.full_like(outcome, 1 / max(1, len(outcome)))
    checks.tensor("row_weight", row_weight, outcome.shape, checks.REAL, hidden, "one value for each row of outcome")
    if intercept is not None:
        checks.tensor("intercept", intercept, outcome.shape, checks.REAL, hidden, "one value for each row of outcome")
    checks.positive("beta", beta)
    loss, logprob, score, *_ = _prm_loss(
        hidden, weight, bias, targets, ref_logprob, outcome, cu_seqlens, row_weight, intercept,
        beta, softcap, every_prefix, _wanted(hidden, weight, bias), backend,
    )  # fmt: skip
    return PrmLoss(loss, logprob, score)


# Each operator also returns the gradients of hidden, weight and bias, (0,) in the place of one that is not wanted.


@operator("linear_policy_loss")
def _policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    token_weight: Tensor,
    ref_logprob: Tensor | None,
    sampling_logprob: Tensor | None,
    importance_cap: float,
    clip_low: float,
    clip_high: float,
    temperature: float,
    softcap: float | None,
    entropy_coef: float,
    kl_coef: float,
    grads: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    result, gradients = resolve("linear_policy_loss", backend, (hidden, weight))(
        hidden, weight, bias, targets.contiguous(), old_logprob, advantage, token_weight, ref_logprob,
        sampling_logprob, importance_cap=importance_cap, clip_low=clip_low, clip_high=clip_high,
        temperature=temperature, softcap=softcap,
        entropy_coef=entropy_coef, kl_coef=kl_coef, grads=grads,
    )  # fmt: skip
    return *result, *(hidden.new_empty(0) if g is None else g for g in gradients)


@_policy_loss.register_fake
def _(hidden, weight, bias, targets, old, advantage, token_weight, ref, sampling, most, low, high, *others):
    *_, grads, _ = others
    logprob = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    loss, clip_fraction, approx_kl = (logprob.new_empty(()) for _ in range(3))
    return loss, logprob, torch.empty_like(logprob), clip_fraction, approx_kl, *_like(hidden, weight, bias, grads)


@operator("linear_prm_loss")
def _prm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_logprob: Tensor,
    outcome: Tensor,
    cu_seqlens: Tensor,
    row_weight: Tensor,
    intercept: Tensor | None,
    beta: float,
    softcap: float | None,
    every_prefix: bool,
    grads: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    cuts = cu_seqlens.cpu()
    checks.rows(cuts, len(targets))
    result, gradients = resolve("linear_prm_loss", backend, (hidden, weight))(
        hidden, weight, bias, targets.contiguous(), ref_logprob, outcome, cuts, row_weight, intercept,
        beta=beta, softcap=softcap, every_prefix=every_prefix, grads=grads,
    )  # fmt: skip
    return *result, *(hidden.new_empty(0) if g is None else g for g in gradients)


@_prm_loss.register_fake
def _(hidden, weight, bias, targets, ref_logprob, outcome, cu_seqlens, row_weight, intercept, *others):
    *_, grads, _ = others
    logprob = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    score = logprob.new_empty(outcome.shape[0])
    return logprob.new_empty(()), logprob, score, *_like(hidden, weight, bias, grads)


def _like(hidden, weight, bias, grads):
    wanted = zip((hidden, weight, bias), grads, strict=True)
    return (hidden.new_empty(x.shape, dtype=kept_dtype(hidden)) if grad else hidden.new_empty(0) for x, grad in wanted)


def _setup(ctx, inputs, output):
    ctx.inputs, ctx.dtype = len(inputs), inputs[0].dtype
    ctx.wanted = inputs[-2]
    ctx.save_for_backward(*output[-3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * ctx.inputs
    pairs = zip(ctx.saved_tensors, ctx.wanted, strict=True)
    return *(_scaled(g, dloss).to(ctx.dtype) if wanted else None for g, wanted in pairs), *(None,) * (ctx.inputs - 3)


def _scaled(gradient: Tensor, dloss: Tensor) -> Tensor:
    """Never in place: backward may run twice over a retained graph. Only on a CPU is it free to see that it is 1."""
    if type(dloss) is Tensor and dloss.device.type == "cpu" and dloss == 1:
        return gradient
    return gradient * dloss


_policy_loss.register_autograd(_backward, setup_context=_setup)
_prm_loss.register_autograd(_backward, setup_context=_setup)


def _wanted(*tensors: Tensor | None) -> list[bool]:
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
