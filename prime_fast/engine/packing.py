"""Rows of different lengths -> packed micro-batches without padding, balanced over ranks; and back."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from prime_fast.engine.ulysses import SequenceGroup


@dataclass(frozen=True)
class Layout:
    """Row boundaries of a pack, as attention needs them: rows sorted by length, runs of equal rows precomputed; and the
    ranks that hold its tokens."""

    cu_seqlens: Tensor  # (R+1,) int32
    max_length: int
    runs: tuple[tuple[int, int, int], ...]  # (first token, rows, row length): consecutive rows of one length
    group: SequenceGroup | None = None  # whose ranks have an equal share of the tokens each; None: all are here

    def to(self, device: torch.device | str) -> Layout:
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=True))


@dataclass(frozen=True)
class Pack:
    """One micro-batch: whole rows end to end, or a rank's share of that (`share`). T input tokens, N response tokens,
    R rows.

    The last token of a row predicts nothing, so it is not fed. A filler pack (`rows` empty) holds one token of one row
    and keeps a rank without work in step with the others: `select` gives it zeros, so every weight is zero. A share
    without response tokens has such a token too.
    """

    rows: tuple[int, ...]  # indices into the batch
    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, restarting per row
    layout: Layout
    predict: Tensor  # (N,) int64, positions in the pack whose next token is a response token
    targets: Tensor  # (N,) int64, those next tokens
    cu_response: Tensor  # (R+1,) int32, response boundaries within targets
    token_index: Tensor  # (N,) int64, where these response tokens lie in the flat batch; empty for a filler

    def to(self, device: torch.device | str) -> Pack:
        tensors = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "position_ids", "predict", "targets", "cu_response", "token_index")
        }
        return replace(self, layout=self.layout.to(device), **tensors)

    @property
    def answers(self) -> int:
        """Response tokens that are none of a filler."""
        return len(self.token_index)

    def select(self, flat: Tensor) -> Tensor:
        """The pack's share (N,) of per-response-token values (T_batch,)."""
        return flat[self.token_index] if self.answers else flat.new_zeros(1)

    def select_rows(self, per_row: Tensor) -> Tensor:
        """The pack's share (R,) of per-row values."""
        return per_row[list(self.rows)] if self.rows else per_row.new_zeros(1)

    def put(self, flat: Tensor, values: Tensor) -> None:
        """Write the pack's per-response-token values (N,) to their places in `flat`."""
        if self.answers:
            flat[self.token_index] = values

    def put_rows(self, per_row: Tensor, values: Tensor) -> None:
        """Write the pack's per-row values (R,) to their places in `per_row`, on one of the ranks that hold it."""
        if self.rows and (self.layout.group is None or self.layout.group.index == 0):
            per_row[list(self.rows)] = values


def plan(
    lengths: Sequence[int], budget: int, ranks: int = 1, attention: float = 0.0, sequence_parallel: int = 1
) -> list[list[list[int]]]:
    """Assign rows to micro-batches of at most `budget` tokens a rank, as many on every rank: plan[micro][rank] = row
    indices; plan[micro][group] where `sequence_parallel` consecutive ranks hold a micro-batch together.

    The row of most work first onto the micro-batch of least work that has room for it, which leaves all of them nearly
    equal; micro-batches of neighbouring work run at the same time on different ranks. A rank may get an empty list.
    attention: see `work`. Raises ValueError when one row alone exceeds the budget.
    """
    budget, ranks = budget * sequence_parallel, ranks // sequence_parallel
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] > budget:
        raise ValueError(
            f"row {longest} has {lengths[longest]} tokens, more than engine.micro_tokens * engine.sequence_parallel = "
            f"{budget}; raise engine.micro_tokens"
        )
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    steps = max(1, -(-sum(lengths) // (budget * ranks)))
    while (bins := _fill(order, lengths, budget, steps * ranks, attention)) is None:
        steps += 1
    return [bins[step * ranks : (step + 1) * ranks] for step in range(steps)]


def _fill(
    order: Sequence[int], lengths: Sequence[int], budget: int, count: int, attention: float
) -> list[list[int]] | None:
    """The rows in `count` bins, by falling work; None where one finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [budget] * count
    heap = [(0.0, index) for index in range(count)]
    for row in order:
        full = []
        while heap and room[heap[0][1]] < lengths[row]:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, index = heap[0]
        bins[index].append(row)
        room[index] -= lengths[row]
        heapq.heapreplace(heap, (load + work(lengths[row], attention), index))
        for item in full:
            heapq.heappush(heap, item)
    return [bins[index] for _, index in sorted(heap, key=lambda item: (-item[0], item[1]))]


def work(length: int, attention: float) -> float:
    """What a row costs, in units of a token without attention: matrix products grow with its length, causal attention
    with its square. attention: the share that the latter adds for every token before, H * L / N for attention heads of
    H values in all on L layers and N parameters, since 2 N n + 2 H L n^2 FLOPs make the forward of n tokens."""
    return length * (1 + attention * length)


def efficiency(micro_batches: list[list[list[int]]], lengths: Sequence[int], attention: float = 0.0) -> float:
    """Work done over the work that fits in the time: a rank waits for the busiest one in each micro-batch."""
    loads = [[sum(work(lengths[row], attention) for row in rows) for rows in ranks] for ranks in micro_batches]
    slots = sum(max(ranks) * len(ranks) for ranks in loads)
    return sum(map(sum, loads)) / slots if slots else 1.0


def pack(rows: Sequence[int], prompts: Sequence[Tensor], responses: Sequence[Tensor], offsets: Sequence[int]) -> Pack:
    """Lay the given rows end to end.

    prompts, responses: 1-D int64 token ids of every row of the batch; offsets: where each row's response starts in the
    flat batch of response tokens.
    """
    if not rows:
        filler = torch.zeros(1, dtype=torch.int64)
        boundary = torch.tensor([0, 1], dtype=torch.int32)
        return Pack((), filler, filler, Layout(boundary, 1, ((0, 1, 1),)), filler, filler, boundary, filler[:0])
    rows = sorted(rows, key=lambda row: (len(prompts[row]) + len(responses[row]), row))
    fed = [len(prompts[row]) + len(responses[row]) - 1 for row in rows]
    starts = [0, *accumulate(fed)]
    answered = [len(responses[row]) for row in rows]
    runs, first = [], 0
    for length, run in groupby(fed):
        count = sum(1 for _ in run)
        runs.append((first, count, length))
        first += count * length
    return Pack(
        rows=tuple(rows),
        input_ids=torch.cat([part for row in rows for part in (prompts[row], responses[row][:-1])]),
        position_ids=torch.cat([torch.arange(length) for length in fed]),
        layout=Layout(torch.tensor(starts, dtype=torch.int32), max(fed), tuple(runs)),
        predict=torch.cat([torch.arange(starts[i + 1] - answered[i], starts[i + 1]) for i in range(len(rows))]),
        targets=torch.cat([responses[row] for row in rows]),
        cu_response=torch.tensor([0, *accumulate(answered)], dtype=torch.int32),
        token_index=torch.cat([torch.arange(offsets[row], offsets[row] + len(responses[row])) for row in rows]),
    )


def share(pack: Pack, group: SequenceGroup) -> Pack:
    """What one rank of the group holds of a pack: as many consecutive tokens as the others, filled up at the end with a
    row of up to group.size - 1 tokens that predict nothing. Rows may begin or end elsewhere: `rows` and `layout` are
    those of the whole pack, cu_response (R+1,) counts the response tokens that are here, of some rows none."""
    tokens = len(pack.input_ids)
    length = -(-tokens // group.size)
    missing = length * group.size - tokens
    first = group.index * length
    part = slice(first, first + length)
    layout = replace(pack.layout, group=group)
    if missing:
        layout = replace(
            layout,
            cu_seqlens=F.pad(layout.cu_seqlens, (0, 1), value=tokens + missing),
            max_length=max(layout.max_length, missing),
            runs=(*layout.runs, (tokens, 1, missing)),
        )
    pack = replace(
        pack,
        input_ids=F.pad(pack.input_ids, (0, missing))[part],
        position_ids=torch.cat([pack.position_ids, torch.arange(missing)])[part],
        layout=layout,
    )
    if not pack.rows:
        return pack
    here = (pack.predict >= first) & (pack.predict < part.stop)
    count = F.pad(here.cumsum(0), (1, 0))  # of response tokens before each
    predict, targets = pack.predict[here] - first, pack.targets[here]
    return replace(
        pack,
        predict=predict if len(predict) else predict.new_zeros(1),
        targets=targets if len(targets) else targets.new_zeros(1),
        cu_response=count[pack.cu_response.long()].int(),
        token_index=pack.token_index[here],
    )
