"""The LM-head losses by other hands, each as a step on one Problem: forward, backward into .grad, log-probs back.

A peer is imported when its step is built; one that is not installed, or refuses the problem, raises there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import prime_kernels
from prime_kernels.reference import policy_token_gradient, policy_token_loss, prm_row_loss, segment_sum

HEADS = {"7B": (3584, 152064), "1.5B": (1536, 151936), "SmolLM2": (576, 49152)}  # (H, V) that are measured
BETA = 0.05
CHUNK = 4096  # rows of the chunked peers and of the bare GEMMs
Step = Callable[[], Tensor | None]


class Problem(NamedTuple):
    hidden: Tensor  # (N, H), a leaf
    weight: Tensor  # (V, H), a leaf
    targets: Tensor
    old_logprob: Tensor
    advantage: Tensor
    token_weight: Tensor
    outcome: Tensor
    cu_seqlens: Tensor  # int32, on the CPU


def problem(size: int, vocabulary: int, tokens: int, device: str, dtype: torch.dtype, row: int = 1024) -> Problem:
    """Random, fixed by a seed: logits of deviation 3, old log-probs near those of the first tokens of a vocabulary."""
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    hidden = normal(tokens, size).to(dtype).requires_grad_()
    weight = normal(vocabulary, size).mul_(3 / size**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)
    with torch.no_grad():
        old = prime_kernels.linear_logprob(hidden, weight, targets) + 0.2 * normal(tokens)
    cuts = torch.tensor([*range(0, tokens, row), tokens], dtype=torch.int32)
    outcome = (torch.arange(len(cuts) - 1, device=device) % 2).float()
    token_weight = torch.full((tokens,), 1 / tokens, device=device)
    return Problem(hidden, weight, targets, old, normal(tokens), token_weight, outcome, cuts)


# ---- what turns per-token log-probs into a loss, for peers that stop at log-probs


def policy_loss(p: Problem, logprob: Tensor) -> Tensor:
    loss, _ = policy_token_loss(logprob.float(), p.old_logprob, p.advantage, 0.2, 0.2)
    return (p.token_weight * loss).sum()


def prm_loss(p: Problem, logprob: Tensor) -> Tensor:
    offsets = p.cu_seqlens.to(logprob.device)
    return prm_row_loss(BETA * segment_sum(logprob.float() - p.old_logprob, offsets), p.outcome).mean()


LOSSES = {"policy": policy_loss, "prm": prm_loss}


def from_logprob(op: str, p: Problem, logprob: Callable[[], Tensor]) -> Step:
    def step() -> Tensor:
        if op == "logprob":
            with torch.no_grad():
                return logprob()
        values = logprob()
        LOSSES[op](p, values).backward()
        return values.detach()

    return step


def from_loss(loss: Callable[[], Tensor]) -> Step:
    return lambda: loss().backward()


# ---- ours


def ours(op: str, p: Problem, backend: str | None = None, logits: str | None = None) -> Step:
    def step() -> Tensor:
        with environment("PRIME_KERNELS_LOGITS", logits):
            head = p.hidden, p.weight, p.targets
            if op == "logprob":
                with torch.no_grad():
                    return prime_kernels.linear_logprob(*head, backend=backend)
            if op == "policy":
                rest = p.old_logprob, p.advantage, p.token_weight
                result = prime_kernels.linear_policy_loss(*head, *rest, backend=backend)
            else:
                rest = p.old_logprob, p.outcome, p.cu_seqlens
                result = prime_kernels.linear_prm_loss(*head, *rest, beta=BETA, backend=backend)
            result.loss.backward()
            return result.logprob

    return step


@contextmanager
def environment(name: str, value: str | None):
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            os.environ.pop(name) if before is None else os.environ.__setitem__(name, before)


# ---- peers


def gemms(op: str, p: Problem) -> Step:
    """The products alone, at the shapes of chunks of 4096 rows: what the share of peak is a share of."""
    hidden, weight = p.hidden.detach(), p.weight.detach()
    logits = hidden.new_empty(min(CHUNK, len(hidden)), len(weight))
    logits[:] = hidden[:, :1].mean()
    dweight = torch.empty_like(weight)

    def step() -> None:
        for start in range(0, len(hidden), CHUNK):
            chunk = hidden[start : start + CHUNK]
            part = logits[: len(chunk)]
            torch.mm(chunk, weight.T, out=part)
            if op != "logprob":
                torch.mm(part, weight)
                torch.mm(part.T, chunk, out=dweight)

    return step


def eager(op: str, p: Problem) -> Step:
    def logprob() -> Tensor:
        logits = F.linear(p.hidden, p.weight).float()
        return torch.log_softmax(logits, -1).gather(1, p.targets[:, None]).squeeze(1)

    return from_logprob(op, p, logprob)


def compiled_chunks(op: str, p: Problem) -> Step:
    """Three GEMMs with the loss between them compiled by Inductor: the portable rival."""

    @torch.compile(dynamic=False)
    def dlogits(logits, targets, old, advantage, token_weight):
        z = logits.float()
        lse = torch.logsumexp(z, -1, keepdim=True)
        logprob = (z.gather(1, targets[:, None]) - lse).squeeze(1)
        scale = token_weight * policy_token_gradient(logprob, old, advantage, 0.2, 0.2)
        one_hot = torch.arange(z.shape[1], device=z.device) == targets[:, None]
        return logprob, (scale[:, None] * (one_hot.float() - (z - lse).exp())).to(logits.dtype)

    def step() -> Tensor:
        hidden, weight = p.hidden.detach(), p.weight.detach()
        p.hidden.grad, dweight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        parts = []
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = hidden[rows] @ weight.T
            logprob, d = dlogits(logits, *(x[rows] for x in (p.targets, p.old_logprob, p.advantage, p.token_weight)))
            torch.mm(d, weight, out=p.hidden.grad[rows])
            dweight += d.T @ hidden[rows]
            parts.append(logprob)
        p.weight.grad = dweight.to(weight.dtype)
        return torch.cat(parts)

    assert op == "policy"
    return step


def torch_fused(op: str, p: Problem) -> Step:
    options = torch.nn.LinearCrossEntropyOptions()
    arguments = p.hidden, p.weight, p.targets
    return from_logprob(op, p, lambda: -F.linear_cross_entropy(*arguments, reduction="none", options=options))


def torch_fused_ce(op: str, p: Problem) -> Step:
    options = torch.nn.LinearCrossEntropyOptions()
    return from_loss(lambda: F.linear_cross_entropy(p.hidden, p.weight, p.targets, options=options))


def liger_scaled(op: str, p: Problem) -> Step:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    return from_logprob(op, p, lambda: -Scaled.apply(p.hidden, p.weight, p.targets))


def liger_ce(op: str, p: Problem, budget: int = 1) -> Step:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

    names = ("bias", "ce_weight", "ignore_index", "lse_square_scale", "label_smoothing", "reduction", "softcap")
    defaults = dict(zip(names, (None, None, -100, 0.0, 0.0, "mean", None), strict=True))
    rest = *defaults.values(), False, torch.float32, False, False, False, None, None, budget
    return from_loss(lambda: Fused.apply(p.hidden, p.weight, p.targets, *rest)[0])


def liger_grpo(op: str, p: Problem) -> Step:
    """One advantage a row is all it takes: it gets the first of each. Rows must be equally long."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rows = len(p.cu_seqlens) - 1
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    shaped = p.targets.view(rows, -1)
    mask = torch.ones_like(shaped)

    def run() -> Tensor:
        hidden = p.hidden.view(rows, -1, p.hidden.shape[1])
        old = p.old_logprob.view(rows, -1)
        advantage = p.advantage[p.cu_seqlens[:-1].long()]
        return loss(hidden, p.weight, shaped, mask, advantage, old_per_token_logps=old)[0]

    return from_loss(run)


def cce(op: str, p: Problem) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    options = {"impl": "cce"} if p.hidden.is_cuda else {"impl": "torch_compile"}
    return from_logprob(
        op, p, lambda: -linear_cross_entropy(p.hidden, p.weight, p.targets, reduction="none", **options)
    )


def verl(op: str, p: Problem) -> Step:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return from_logprob(op, p, lambda: linear_cross_entropy(p.hidden, p.weight, p.targets, 1.0, "none")[0])


def trl(op: str, p: Problem, columns: int = 4096) -> Step:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Chunked

    head = p.hidden, p.weight, None, p.targets, 1.0, columns
    return from_logprob(op, p, lambda: Chunked.apply(*head, None, 1.0, ())[0])


def quack_ce(op: str, p: Problem, scaled_exp: bool = False) -> Step:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as chunked

    return from_loss(lambda: chunked(p.hidden, p.weight, p.targets, chunk_size=CHUNK, use_scaled_exp=scaled_exp))


ANY = ("logprob", "policy", "prm")
# name: (ops, builder). A name with "CE" is plain cross-entropy: another loss, for scale.
PEERS: dict[str, tuple[tuple[str, ...], Callable[..., Step]]] = {
    "bare GEMMs": (ANY, gemms),
    "prime_kernels": (ANY, ours),
    "prime_kernels, cuBLAS logits": (ANY, partial(ours, logits="gemm")),
    "prime_kernels, fused logits": (ANY, partial(ours, logits="fused")),
    "prime_kernels, torch back-end": (ANY, partial(ours, backend="torch")),
    "eager, float32 logits": (ANY, eager),
    "compiled chunk loop": (("policy",), compiled_chunks),
    "F.linear_cross_entropy": (ANY, torch_fused),
    "F.linear_cross_entropy, mean CE": (("policy",), torch_fused_ce),
    "Liger scaled CE": (ANY, liger_scaled),
    "Liger GRPO": (("policy",), liger_grpo),
    "Liger FLCE, mean CE": (("policy",), liger_ce),
    "Liger FLCE, 16x chunk, mean CE": (("policy",), partial(liger_ce, budget=16)),
    "CCE": (ANY, cce),
    "verl": (ANY, verl),
    "TRL chunked": (ANY, trl),
    "QuACK, mean CE": (("policy",), quack_ce),
    "QuACK scaled-exp, mean CE": (("policy",), partial(quack_ce, scaled_exp=True)),
}
GPU_ONLY = ("prime_kernels, cuBLAS logits", "prime_kernels, fused logits")
