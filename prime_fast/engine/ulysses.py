"""Ulysses sequence parallelism: neighbouring ranks hold a pack together, each a share of its tokens.

Embeddings, norms, MLP and LM head need no more than a rank's own tokens. Attention needs whole rows: before it an
all-to-all turns some tokens of all heads into all tokens of some heads, after it another one turns that back
(DeepSpeed-Ulysses, arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

import prime_kernels
from prime_fast.config import Config
from prime_fast.data.models import model_config
from prime_fast.engine import distributed, packing
from prime_fast.engine.packing import Pack
from prime_kernels.reference import PrmLoss, places, prm_prefix_logit, prm_row_loss, segment_sum


@dataclass(frozen=True)
class SequenceGroup:
    """`size` consecutive ranks. Every one of them must make the same calls in the same order."""

    size: int
    index: int  # of this rank in its group
    number: int  # of the group, of `count`
    count: int
    process_group: dist.ProcessGroup | None  # None where the rank is alone

    def pack(
        self, rows: Sequence[Sequence[int]], prompts: Sequence[Tensor], responses: Sequence[Tensor], offsets: list[int]
    ) -> Pack:
        """This rank's share of its group's pack; rows: of each group, see packing.plan and packing.pack."""
        whole = packing.pack(rows[self.number], prompts, responses, offsets)
        return whole if self.size == 1 else packing.share(whole, self)

    def by_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Each (t, heads, d) of this rank's tokens -> (size * t, heads / size, d) of the group's; all in one message.

        Of fewer heads than ranks, each goes to those ranks whose queries need it.
        """
        copies = [self.size // part.shape[1] for part in parts]
        parts = [part.repeat_interleave(n, 1) if n > 1 else part for part, n in zip(parts, copies, strict=True)]
        parts = [part.unflatten(1, (self.size, -1)) for part in parts]
        joint = torch.cat([part.flatten(2) for part in parts], 2).transpose(0, 1)
        joint = _AllToAll.apply(joint, self.process_group).flatten(0, 1)
        split = joint.split([part.shape[2] * part.shape[3] for part in parts], 1)
        return tuple(got.unflatten(1, part.shape[2:]) for got, part in zip(split, parts, strict=True))

    def by_tokens(self, part: Tensor) -> Tensor:
        """(size * t, heads / size, d) of the group's tokens -> (t, heads, d) of this rank's."""
        part = _AllToAll.apply(part.unflatten(0, (self.size, -1)), self.process_group)
        return part.transpose(0, 1).flatten(1, 2)

    def linear_prm_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ref_logprob: Tensor,
        outcome: Tensor,
        cu_seqlens: Tensor,
        *,
        bias: Tensor | None,
        beta: float,
        row_weight: Tensor,
        intercept: Tensor | None,
        every_prefix: bool,
    ) -> PrmLoss:
        """prime_kernels.linear_prm_loss of rows whose tokens lie on all ranks of the group, some of a row's maybe none
        here. Each rank gets the scores of all rows, and a part of the loss: an equal one, or with every_prefix that of
        its own tokens."""
        if self.size == 1:
            return prime_kernels.linear_prm_loss(
                hidden, weight, targets, ref_logprob, outcome, cu_seqlens,
                bias=bias, beta=beta, row_weight=row_weight, intercept=intercept, every_prefix=every_prefix,
            )  # fmt: skip
        logprob = prime_kernels.linear_logprob(hidden, weight, targets, bias=bias)
        log_ratio = (logprob - ref_logprob).double()
        here = segment_sum(log_ratio, cu_seqlens)
        score = (beta * _Total.apply(here, self)).to(logprob.dtype)
        intercept = torch.zeros_like(outcome) if intercept is None else intercept
        if not every_prefix:
            loss = (row_weight * prm_row_loss(intercept.to(score.dtype) + score, outcome)).sum() / self.size
        else:
            log_ratio = log_ratio[: int(cu_seqlens[-1])]  # a rank without response tokens has one that is no row's
            row, _ = places(cu_seqlens, len(log_ratio))
            logit = prm_prefix_logit(log_ratio, intercept + beta * _Before.apply(here, self), cu_seqlens, beta)
            length = _Total.apply(cu_seqlens.diff(), self)
            loss = ((row_weight / length)[row] * prm_row_loss(logit, outcome.double()[row])).sum().to(logprob.dtype)
        return PrmLoss(loss, logprob.detach(), score.detach())


class _AllToAll(torch.autograd.Function):
    """x[i] goes to rank i of the group, which puts it where this rank stands in it. Its own inverse and adjoint."""

    @staticmethod
    def forward(ctx, x, process_group):
        ctx.process_group = process_group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=process_group)
        return received

    @staticmethod
    def backward(ctx, gradient):
        return _AllToAll.apply(gradient, ctx.process_group), None


class _Total(torch.autograd.Function):
    """The sum over the group, of which every rank goes on to compute the same: so its gradients are equal as well, and
    their sum needs no message."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.size = group.size
        total = x.clone()
        dist.all_reduce(total, group=group.process_group)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.size, None


class _Before(torch.autograd.Function):
    """The sum over the ranks of the group before this one; its adjoint is that over the ranks after it."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _of_all(x, group)[: group.index].sum(0)

    @staticmethod
    def backward(ctx, gradient):
        return _of_all(gradient, ctx.group)[ctx.group.index + 1 :].sum(0), None


def _of_all(x: Tensor, group: SequenceGroup) -> Tensor:
    """(size, *x.shape): x of every rank of the group."""
    x = x.contiguous()
    found = x.new_empty(group.size, *x.shape)
    dist.all_gather(list(found), x, group=group.process_group)
    return found


@cache
def sequence_group(size: int) -> SequenceGroup:
    """This rank's. Every rank must ask for the same sizes in the same order."""
    rank, ranks = distributed.rank(), distributed.world_size()
    check_ranks(size, ranks)
    process_group = None
    if size > 1:
        firsts = range(0, ranks, size)
        made = [dist.new_group(range(first, first + size), timeout=distributed.collective_timeout) for first in firsts]
        process_group = made[rank // size]
    return SequenceGroup(size, rank % size, rank // size, ranks // size, process_group)


def check(config: Config, ranks: int) -> None:
    """Raises ValueError where engine.sequence_parallel suits neither the number of ranks nor a model's heads."""
    size = config.engine.sequence_parallel
    check_ranks(size, ranks)
    for path in (config.model.policy, config.model.prm, config.model.reference):
        if path is None or size == 1:
            continue
        model = model_config(path)
        heads = model.num_attention_heads
        kv_heads = getattr(model, "num_key_value_heads", None) or heads
        if heads % size or (kv_heads % size and size % kv_heads):
            fits = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
            raise ValueError(
                f"engine.sequence_parallel={size} cannot divide the {heads} attention heads and {kv_heads} key-value "
                f"heads of {path} among {size} ranks; set it to one of {', '.join(map(str, fits))}"
            )


def check_ranks(size: int, ranks: int) -> None:
    if ranks % size:
        raise ValueError(
            f"engine.sequence_parallel={size} does not divide the number of ranks, {ranks}; start a multiple of {size} "
            f"(--nproc-per-node, of a dry run --ranks), or set engine.sequence_parallel=1"
        )
