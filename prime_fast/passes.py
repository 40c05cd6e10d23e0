"""The forward and backward passes of a step, each over mini-batches of packed micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

import prime_kernels
from prime_fast.config import PolicyConfig
from prime_fast.engine import distributed, packing
from prime_fast.engine.batch import Batch
from prime_fast.engine.distributed import Stop
from prime_fast.engine.lora import Trunk
from prime_fast.engine.packing import Pack
from prime_fast.engine.zero import Engine, StepResult
from prime_fast.progress import Tick, progress

T = TypeVar("T")
MiniBatch = list[list[list[int]]]  # [micro-batch][rank, or group of engine.sequence_parallel] -> rows of the batch
# largest mean |difference| of two computations of the same log-probs, nats; bfloat16 forwards differ by rounding: 0.02
# from float32, and less from one another, where log-probs spread by 1.3 nats (tests/test_bfloat16.py)
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class Updates(NamedTuple):
    """The optimizer steps of a pass, one a mini-batch. Those with a non-finite loss or gradient are not applied, and
    count in no mean; without any, a mean is nan."""

    made: int
    applied: int
    loss: float
    grad_norm: float  # before clipping


class PolicyPass(NamedTuple):
    """Means are over the response tokens of the mini-batches that were applied, each counted in every epoch."""

    updates: Updates
    entropy: float  # nats per token
    clip_fraction: float
    approx_kl: float  # mean of old - new log-prob
    reference_kl: float | None  # of the policy to the reference, nats per token, at the rollout's temperature
    mismatch: dict[str, float]  # of the rollout engine and the trainer before the update; see _mismatch


def split(
    batch: Batch,
    mini_batch: int,
    micro_tokens: int,
    shuffle: torch.Generator | None = None,
    *,
    attention: float = 0.0,
    sequence_parallel: int = 1,
) -> list[MiniBatch]:
    """Cut the rows into optimizer steps of about `mini_batch` rows, nearly equal in size, and plan each one's packs.

    Equal parts, because a small rest would make a noisy step of the same size as the others. Without `shuffle` a part
    is made of whole groups, in their order. attention: of the model, see packing.work; sequence_parallel: packing.plan.

    A step of few rows, as a policy that knows nearly all leaves them, is a step like others: at a learning rate scaled
    by its share, or kept waiting for more rows, the quickstart's task was learnt more slowly, and no more steadily.
    """
    count = len(batch.responses)
    if shuffle is None:
        groups = batch.group.unique_consecutive(return_counts=True)[1].tolist()
        parts = [[row for group in part for row in group] for part in even(_runs(groups), count / mini_batch)]
    else:
        parts = even(torch.randperm(count, generator=shuffle).tolist(), count / mini_batch)
    lengths, ranks = batch.lengths, distributed.world_size()
    minis = []
    for rows in parts:
        micros = packing.plan([lengths[row] for row in rows], micro_tokens, ranks, attention, sequence_parallel)
        minis.append([[[rows[i] for i in share] for share in ranks] for ranks in micros])
    return minis


def efficiency(batch: Batch, minis: list[MiniBatch], attention: float = 0.0) -> float:
    """Work done over work that the time allows, of all passes that follow this plan; see packing.efficiency."""
    return packing.efficiency([micro for mini in minis for micro in mini], batch.lengths, attention)


def score(engine: Engine | Trunk, batch: Batch, minis: list[MiniBatch], temperature: float = 1.0) -> Tensor:
    """Log-probs (T,) float32 of the response tokens under the engine's present weights."""
    return score_at(engine, batch, minis, (temperature,))[temperature]


@torch.no_grad()
def score_at(
    engine: Engine | Trunk, batch: Batch, minis: list[MiniBatch], temperatures: Collection[float]
) -> dict[float, Tensor]:
    """`score` at several temperatures from one forward, with an LM head for each."""
    flats = {temperature: _flat(batch, engine) for temperature in temperatures}
    for _, packs in _told(f"{engine.role} forward", batch, minis, engine):
        for pack in packs:
            score_pack(engine, pack, flats)
    return {temperature: distributed.sum_(flat) for temperature, flat in flats.items()}


@torch.no_grad()
def score_pack(engine: Engine | Trunk, pack: Pack, flats: dict[float, Tensor]) -> None:
    """Write the log-probs of a pack's response tokens, at each temperature, into its flat batch (T,)."""

    def heads(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        op = partial(prime_kernels.linear_logprob, hidden, weight, pack.targets, bias=bias)
        return [op(temperature=temperature) for temperature in flats]

    for flat, logprob in zip(flats.values(), engine.run(pack, heads), strict=True):
        pack.put(flat, logprob)


def train_prm_pack(
    engine: Engine,
    pack: Pack,
    ref_logprob: Tensor,
    outcome: Tensor,
    *,
    beta: float,
    row_weight: Tensor,
    intercept: Tensor | None,
    every_prefix: bool,
) -> prime_kernels.PrmLoss:
    """Forward and backward of row_weight * cross-entropy of sigmoid(intercept + beta * Q) and the outcome, or of the
    mean of those of all prefixes (prime_kernels.linear_prm_loss).

    ref_logprob (T,), outcome, row_weight and intercept (R,) are of the whole batch; the result is of the pack.
    """
    rows = {"row_weight": row_weight, "intercept": intercept}
    op = _on(
        partial(
            engine.sequence_group.linear_prm_loss,
            beta=beta,
            every_prefix=every_prefix,
            **{name: None if x is None else pack.select_rows(x) for name, x in rows.items()},
        ),
        pack.targets,
        pack.select(ref_logprob),
        pack.select_rows(outcome),
        pack.cu_response,
    )
    result = engine.run(pack, op)
    engine.backward(result.loss)
    return result


def train_policy(
    engine: Engine,
    batch: Batch,
    minis: list[MiniBatch],
    advantage: Tensor,
    *,
    old_logprob: Tensor | None,
    own_first: bool,
    ref_logprob: Tensor | None,
    importance_cap: float,
    temperature: float,
    top_p: float,
    config: PolicyConfig,
    lr: float,
) -> PolicyPass:
    """One PPO-clip optimizer step per mini-batch, which for several epochs name a row several times.

    old_logprob: (T,), of the policy before the update; own_first: the first mini-batch's own forward gives its rows'.
    ref_logprob: (T,) of a reference, for reference_kl and the loss's KL term; at the rollout's temperature.
    importance_cap: a token of the loss weighs min(old / engine probability, cap), detached (truncated importance
    sampling, which makes up for an engine that samples from slightly other probabilities); 0 = off.
    top_p: the engine's log-probs are those of the nucleus that it sampled from, higher by up to -log(top_p).

    Raises Stop, before the first update, if the engine's log-probs are not the policy's (bound: AGREEMENT).
    """
    lengths = batch.cu_seqlens.diff().to(engine.device)
    sampled = batch.engine_logprob.to(engine.device)
    own = _flat(batch, engine)
    losses, steps = [], []
    measured = torch.zeros(5, dtype=torch.float64, device=engine.device)  # sums over tokens, and their number
    mismatch: dict[str, float] = {}
    for index, (mini, packs) in enumerate(_told(f"{engine.role} update", batch, minis, engine)):
        rows = _rows(mini)
        on_policy = own_first and index == 0
        if config.mean == "token":
            row_weight = torch.full_like(lengths, 1, dtype=torch.float32) / lengths[rows].sum()
        else:
            row_weight = 1 / (lengths * len(rows))
        token_weight = (row_weight * distributed.world_size()).repeat_interleave(lengths)
        total = own.new_zeros(())
        here = torch.zeros_like(measured)  # of this mini-batch
        for pack in packs:
            reference = None if ref_logprob is None else pack.select(ref_logprob)
            op = _on(
                partial(
                    prime_kernels.linear_policy_loss,
                    clip_low=config.clip[0],
                    clip_high=config.clip[1],
                    temperature=temperature,
                    entropy_coef=config.entropy_coef,
                    ref_logprob=reference if config.kl_coef else None,
                    kl_coef=config.kl_coef,
                    sampling_logprob=pack.select(sampled) if importance_cap else None,
                    importance_cap=importance_cap or 1.0,
                ),
                pack.targets,
                None if on_policy else pack.select(old_logprob),
                pack.select(advantage),
                pack.select(token_weight),
            )
            result = engine.run(pack, op)
            engine.backward(result.loss)
            total += result.loss.detach()
            if index == 0:
                pack.put(own, result.logprob)
            if pack.answers:
                tokens = total.new_tensor(pack.answers)
                kl = tokens * 0 if reference is None else kl_estimate(reference - result.logprob).sum()
                means = result.clip_fraction * tokens, result.approx_kl * tokens
                here += torch.stack([result.entropy.sum(), *means, kl, tokens])
        if index == 0:
            own = distributed.sum_(own)
            mismatch = _mismatch(own, sampled, batch, rows, engine, importance_cap, top_p)
            if on_policy:
                first = _tokens_of(rows, batch, engine)
                old_logprob = own if old_logprob is None else torch.where(first, own, old_logprob)
        losses.append(float(distributed.sum_(total)) / distributed.world_size())
        steps.append(engine.step(lr))
        if steps[-1].applied:
            measured += here
    *sums, tokens = distributed.sum_(measured).tolist()
    entropy, clip_fraction, approx_kl, reference_kl = (value / tokens if tokens else math.nan for value in sums)
    known_kl = None if ref_logprob is None else reference_kl
    return PolicyPass(updates(losses, steps), entropy, clip_fraction, approx_kl, known_kl, mismatch)


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """ratio - 1 - log(ratio), elementwise, never negative. Ratio q / p: its mean over samples of p is KL(p || q)."""
    return log_ratio.expm1() - log_ratio


def _mismatch(
    own: Tensor, sampled: Tensor, batch: Batch, rows: list[int], engine: Engine, cap: float, top_p: float
) -> dict[str, float]:
    """Engine against trainer on the first mini-batch, whose forward is the policy that the engine sampled from.

    KL(engine || trainer) per token, mean ratio, largest |log ratio|, all over fresh tokens (others were sampled by an
    older policy, which mismatch_kl_AGE tells of); and the share of all tokens that importance_cap cuts.
    """
    used = _tokens_of(rows, batch, engine)
    log_ratio, age = (own - sampled)[used], batch.age.to(engine.device)[used]
    kl = {int(a): float(kl_estimate(log_ratio[age == a]).mean()) for a in age.unique()}
    cut = float((log_ratio.exp() > cap).float().mean()) if cap else 0.0
    told = {f"mismatch_kl_{a}": value for a, value in kl.items() if a} | {"importance_cut": cut}
    log_ratio = log_ratio[age == 0]
    if not len(log_ratio):
        return told
    difference = float((log_ratio - log_ratio.clamp(math.log(top_p), 0)).abs().mean())
    if difference > AGREEMENT[engine.dtype]:
        raise Stop(
            f"the rollout engine and the trainer disagree: their log-probs of fresh samples differ by {difference:.3g} "
            f"nats on average (allowed {AGREEMENT[engine.dtype]:g}); the engine does not hold the policy's weights, or "
            "does not compute what the trainer computes, so the policy was not updated"
        )
    return {
        "mismatch_kl": kl[0],
        "mismatch_ratio": float(log_ratio.exp().mean()),
        "mismatch_max": float(log_ratio.abs().max()),
    } | told


def _tokens_of(rows: list[int], batch: Batch, engine: Engine) -> Tensor:
    """(T,) bool: the response tokens of these rows."""
    chosen = torch.zeros(len(batch.responses), dtype=torch.bool)
    chosen[rows] = True
    return chosen.repeat_interleave(batch.cu_seqlens.diff()).to(engine.device)


def _told(
    what: str, batch: Batch, minis: list[MiniBatch], engine: Engine
) -> Iterator[tuple[MiniBatch, Iterator[Pack]]]:
    """Each mini-batch with its packs of this rank; tells how far the pass has come."""
    with progress(what, sum(map(len, minis)), "micro-batches") as tick:
        for mini in minis:
            yield mini, _packs(batch, mini, engine, tick)


def _packs(batch: Batch, mini: MiniBatch, engine: Engine, tick: Tick) -> Iterator[Pack]:
    for rows in mini:
        yield pack_here(batch, rows, engine)
        tick()


def pack_here(batch: Batch, rows: list[list[int]], engine: Engine) -> Pack:
    """This rank's pack of a micro-batch, or share of one; rows: of every rank, or group of engine.sequence_parallel."""
    offsets = batch.cu_seqlens.tolist()
    return engine.sequence_group.pack(rows, batch.prompts, batch.responses, offsets).to(engine.device)


def _on(op: Callable, *arguments: Tensor | None) -> Callable:
    """The op as the LM head calls it: hidden states and weight first, then these arguments."""
    return lambda hidden, weight, bias: op(hidden, weight, *arguments, bias=bias)


def _flat(batch: Batch, engine: Engine) -> Tensor:
    return torch.zeros(int(batch.cu_seqlens[-1]), device=engine.device)


def _rows(mini: MiniBatch) -> list[int]:
    return [row for ranks in mini for share in ranks for row in share]


def _runs(lengths: list[int]) -> list[list[int]]:
    """0, 1, 2, ... in runs of these lengths."""
    ends = list(accumulate(lengths))
    return [list(range(end - length, end)) for length, end in zip(lengths, ends, strict=True)]


def even(items: list[T], parts: float) -> list[list[T]]:
    """About so many nearly equal parts of the items, at least one and none empty."""
    count = max(1, min(len(items), round(parts)))
    return [[items[i] for i in part] for part in torch.arange(len(items)).tensor_split(count)]


def updates(losses: list[float], steps: list[StepResult]) -> Updates:
    applied = [(loss, step.grad_norm) for loss, step in zip(losses, steps, strict=True) if step.applied]
    means = [sum(values) / len(applied) for values in zip(*applied, strict=True)] or [math.nan, math.nan]
    return Updates(len(steps), len(applied), *means)
