"""The forward and backward passes of a step, each over mini-batches of packed micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import prime_kernels
from prime_fast.config import PolicyConfig
from prime_fast.engine import distributed, packing
from prime_fast.engine.batch import Batch
from prime_fast.engine.packing import Pack
from prime_fast.engine.zero import Engine, StepResult

MiniBatch = list[list[list[int]]]  # [micro-batch][rank] -> rows of the batch
# largest mean |difference| of two computations of the same log-probs, nats; bfloat16 forwards differ by rounding: 0.02
# from float32, and less from one another, where log-probs spread by 1.3 nats (tests/test_bfloat16.py)
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class PrmPass(NamedTuple):
    logprob: Tensor  # (T,) of the forward each row was trained with, before its own update
    score: Tensor  # (R,) beta * Q of that forward
    loss: float  # mean over mini-batches
    grad_norm: float
    applied: bool  # every mini-batch was finite


class PolicyPass(NamedTuple):
    loss: float
    entropy: float  # nats per response token
    clip_fraction: float
    approx_kl: float  # mean of old - new log-prob
    mismatch: dict[str, float]  # of the rollout engine and the trainer before the update; see _mismatch
    grad_norm: float
    applied: bool
    moved: bool  # whether a part of it was applied at least


def split(batch: Batch, mini_batch: int, micro_tokens: int, shuffle: torch.Generator | None = None) -> list[MiniBatch]:
    """Cut the rows into optimizer steps of about `mini_batch` rows, nearly equal in size, and plan each one's packs.

    Equal parts, because a small rest would make a noisy step of the same size as the others.
    """
    count = len(batch.responses)
    parts = max(1, round(count / mini_batch))
    order = torch.arange(count) if shuffle is None else torch.randperm(count, generator=shuffle)
    lengths = batch.lengths
    minis = []
    for rows in order.tensor_split(parts):
        rows = rows.tolist()
        micros = packing.plan([lengths[row] for row in rows], micro_tokens, distributed.world_size())
        minis.append([[[rows[i] for i in share] for share in ranks] for ranks in micros])
    return minis


def efficiency(batch: Batch, minis: list[MiniBatch]) -> float:
    """Real tokens over token slots of all passes that follow this plan; see packing.efficiency."""
    return packing.efficiency([micro for mini in minis for micro in mini], batch.lengths)


@torch.no_grad()
def score(engine: Engine, batch: Batch, minis: list[MiniBatch], temperature: float = 1.0) -> Tensor:
    """Log-probs (T,) float32 of the response tokens under the engine's present weights."""
    flat = _flat(batch, engine)
    for mini in minis:
        for pack in _packs(batch, mini, engine):
            op = partial(prime_kernels.linear_logprob, temperature=temperature)
            pack.put(flat, engine.run(pack, _on(op, pack.targets)))
    return distributed.sum_(flat)


def train_prm(
    engine: Engine, batch: Batch, minis: list[MiniBatch], ref_logprob: Tensor, *, beta: float, lr: float
) -> PrmPass:
    """One optimizer step per mini-batch on the cross-entropy of sigmoid(beta * Q) and the outcome."""
    flat = _flat(batch, engine)
    scores = flat.new_zeros(len(batch.responses))
    outcome = batch.outcome.to(engine.device)
    losses, steps = [], []
    for mini in minis:
        rows = sum(len(share) for ranks in mini for share in ranks)
        row_weight = torch.full_like(outcome, distributed.world_size() / rows)
        total = flat.new_zeros(())
        for pack in _packs(batch, mini, engine):
            op = _on(
                partial(prime_kernels.linear_prm_loss, beta=beta, row_weight=pack.select_rows(row_weight)),
                pack.targets,
                pack.select(ref_logprob),
                pack.select_rows(outcome),
                pack.cu_response,
            )
            result = engine.run(pack, op)
            engine.backward(result.loss)
            total += result.loss.detach()
            pack.put(flat, result.logprob)
            if pack.rows:
                scores[list(pack.rows)] = result.score
        losses.append(float(distributed.sum_(total)) / distributed.world_size())
        steps.append(engine.step(lr))
    return PrmPass(distributed.sum_(flat), distributed.sum_(scores), _mean(losses), *_summary(steps))


def train_policy(
    engine: Engine,
    batch: Batch,
    minis: list[MiniBatch],
    advantage: Tensor,
    *,
    old_logprob: list[Tensor | None],
    ref_logprob: Tensor | None,
    importance_cap: float,
    temperature: float,
    config: PolicyConfig,
) -> PolicyPass:
    """One PPO-clip optimizer step per mini-batch.

    old_logprob: for each mini-batch (T,), or None where its own forward is the old policy.
    importance_cap: a token of the loss weighs min(old / engine probability, cap), detached (truncated importance
    sampling, which makes up for an engine that samples from slightly other probabilities); 0 = off.

    Raises ValueError, before the first update, if the engine's log-probs are not the policy's (bound: AGREEMENT).
    """
    lengths = batch.cu_seqlens.diff().to(engine.device)
    sampled = batch.engine_logprob.to(engine.device)
    own, entropy = _flat(batch, engine), _flat(batch, engine)
    losses, steps = [], []
    clipped_kl = entropy.new_zeros(2)
    for index, (mini, old) in enumerate(zip(minis, old_logprob, strict=True)):
        rows = [row for ranks in mini for share in ranks for row in share]
        if config.mean == "token":
            row_weight = torch.full_like(lengths, 1, dtype=torch.float32) / lengths[rows].sum()
        else:
            row_weight = 1 / (lengths * len(rows))
        token_weight = (row_weight * distributed.world_size()).repeat_interleave(lengths)
        if old is not None and importance_cap:
            token_weight = token_weight * _ratio(old, sampled, importance_cap)
        total = entropy.new_zeros(())
        for pack in _packs(batch, mini, engine):
            op = _on(
                partial(
                    _on_policy_loss if old is None and importance_cap else prime_kernels.linear_policy_loss,
                    clip_low=config.clip[0],
                    clip_high=config.clip[1],
                    temperature=temperature,
                    entropy_coef=config.entropy_coef,
                    ref_logprob=None if ref_logprob is None else pack.select(ref_logprob),
                    kl_coef=config.kl_coef,
                ),
                pack.targets,
                None if old is None else pack.select(old),
                pack.select(advantage),
                pack.select(token_weight),
                *([pack.select(sampled), importance_cap] if old is None and importance_cap else []),
            )
            result = engine.run(pack, op)
            engine.backward(result.loss)
            total += result.loss.detach()
            pack.put(entropy, result.entropy)
            pack.put(own, result.logprob)
            clipped_kl += torch.stack([result.clip_fraction, result.approx_kl]) * len(pack.token_index)
        if index == 0:
            before = _mismatch(own, sampled, batch, rows, engine, importance_cap)
        losses.append(float(distributed.sum_(total)) / distributed.world_size())
        steps.append(engine.step(config.lr))
    clip_fraction, approx_kl = (distributed.sum_(clipped_kl) / len(entropy)).tolist()
    mean_entropy = float(distributed.sum_(entropy).mean())
    moved = any(step.applied for step in steps)
    return PolicyPass(_mean(losses), mean_entropy, clip_fraction, approx_kl, before, *_summary(steps), moved)


def _on_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprob: None,
    advantage: Tensor,
    token_weight: Tensor,
    sampled: Tensor,
    cap: float,
    *,
    bias: Tensor | None,
    temperature: float,
    **options: Any,
) -> prime_kernels.PolicyLoss:
    """linear_policy_loss with importance weights from this very forward: one more GEMM of the LM head."""
    with torch.no_grad():
        logprob = prime_kernels.linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature)
    token_weight = token_weight * _ratio(logprob, sampled, cap)
    return prime_kernels.linear_policy_loss(
        hidden, weight, targets, old_logprob, advantage, token_weight, bias=bias, temperature=temperature, **options
    )


def _ratio(logprob: Tensor, sampled: Tensor, cap: float) -> Tensor:
    return (logprob - sampled).exp().clamp(max=cap)


def _mismatch(
    own: Tensor, sampled: Tensor, batch: Batch, rows: list[int], engine: Engine, cap: float
) -> dict[str, float]:
    """Engine against trainer on the first mini-batch, whose forward is the policy that the engine sampled from.

    KL(engine || trainer) per token by the estimator ratio - 1 - log(ratio), mean ratio, largest |log ratio|, all over
    fresh rows (the surplus of earlier steps was sampled by an older policy); and the share of the tokens of all its
    rows that importance_cap cuts.
    """
    used = torch.zeros_like(batch.fresh)
    used[rows] = True
    masks = (used, used & batch.fresh)
    used, fresh = (mask.repeat_interleave(batch.cu_seqlens.diff()).to(own.device) for mask in masks)
    log_ratio = distributed.sum_(own.clone()) - sampled
    cut = float((log_ratio[used].exp() > cap).float().mean()) if cap else 0.0
    log_ratio = log_ratio[fresh]
    if not len(log_ratio):
        return {"importance_cut": cut}
    difference = float(log_ratio.abs().mean())
    if difference > AGREEMENT[engine.dtype]:
        raise ValueError(
            f"the rollout engine and the trainer disagree: their log-probs of fresh samples differ by {difference:.3g} "
            f"nats on average (allowed {AGREEMENT[engine.dtype]:g}); the engine does not hold the policy's weights, or "
            "does not compute what the trainer computes, so the step was not made"
        )
    return {
        "mismatch_kl": float((log_ratio.exp() - 1 - log_ratio).mean()),
        "mismatch_ratio": float(log_ratio.exp().mean()),
        "mismatch_max": float(log_ratio.abs().max()),
        "importance_cut": cut,
    }


def _packs(batch: Batch, mini: MiniBatch, engine: Engine) -> Iterator[Pack]:
    offsets = batch.cu_seqlens.tolist()
    for ranks in mini:
        yield packing.pack(ranks[distributed.rank()], batch.prompts, batch.responses, offsets).to(engine.device)


def _on(op: Callable, *arguments: Tensor | None) -> Callable:
    """The op as the LM head calls it: hidden states and weight first, then these arguments."""
    return lambda hidden, weight, bias: op(hidden, weight, *arguments, bias=bias)


def _flat(batch: Batch, engine: Engine) -> Tensor:
    return torch.zeros(int(batch.cu_seqlens[-1]), device=engine.device)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _summary(steps: list[StepResult]) -> tuple[float, bool]:
    return _mean([step.grad_norm for step in steps]), all(step.applied for step in steps)
