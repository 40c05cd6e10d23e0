"""Of each step a few responses with every token's reward, advantage and value, for `prime-fast show`: tokens.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from prime_fast.calibration import Fit
from prime_fast.credit import Credit
from prime_fast.engine.batch import Batch, Group
from prime_fast.views.show.record import record

TOKENS = 1 << 15  # of a step that are kept at most, beyond one response: 40 bytes each, so a GiB in 800 long steps
PROMPT = 1024  # tokens at a prompt's end that are kept


def records(
    step: int,
    groups: Sequence[Group],
    batch: Batch,
    advantage: Tensor,
    log_ratio: Tensor | None,
    credit: Credit,
    fit: Fit,
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """One for each response of two groups, as long as they fit in TOKENS.

    batch: of these groups. advantage, log_ratio: (T,) of the batch, nats; without a PRM there is no log-ratio, and no
    token reward. credit, fit: for the value, as it was calibrated when these advantages were made.
    """
    kept = seen(groups)
    here, starts = Batch.of(kept), batch.cu_seqlens.tolist()
    chosen = torch.isin(batch.group, here.group).nonzero().flatten().tolist()
    where = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen])
    numbers = {"advantage": advantage[where.to(advantage.device)].cpu()}
    if log_ratio is not None:
        ratio = log_ratio[where.to(log_ratio.device)].cpu()
        numbers["reward"] = credit.config.beta * ratio
        value = credit.value(here, ratio, fit)
        if torch.isfinite(value).all():
            numbers["value"] = value
    number = credit.steps(here)
    result, left = [], TOKENS
    for group, k, start, end in _rows(kept, here):
        sample = group.samples[k]
        if end - start > left and result:
            continue
        left -= end - start
        found = record(
            sample.tokens.tolist(),
            tokenizer,
            step=step,
            row=group.row,
            group=group.id,
            outcome=group.outcomes[k],
            truncated=sample.truncated,
            prompt=tokenizer.decode(list(group.prompt[-PROMPT:])),
            steps=None if number is None else _steps(number[start:end]),
            **{name: values[start:end] for name, values in numbers.items()},
        )
        result.append(found)
    return result


def seen(groups: Sequence[Group]) -> list[Group]:
    """The first one, and of the others the first whose outcomes differ most: one by chance, one that teaches."""

    def spread(group: Group) -> float:
        mean = sum(group.outcomes) / len(group.outcomes)
        return sum((outcome - mean) ** 2 for outcome in group.outcomes)

    return [groups[0], *sorted(groups[1:], key=spread, reverse=True)[:1]]


def _rows(groups: Sequence[Group], batch: Batch) -> Iterator[tuple[Group, int, int, int]]:
    """Group, number in it, first token and end of each row of a batch of these groups."""
    rows = ((group, k) for group in groups for k in range(len(group.samples)))
    for (group, k), (start, end) in zip(rows, pairwise(batch.cu_seqlens.tolist()), strict=True):
        yield group, k, start, end


def _steps(number: Tensor) -> list[list[int]]:
    ends = [*((number.diff() != 0).nonzero().flatten() + 1).tolist(), len(number)]
    return [list(step) for step in pairwise([0, *ends])]
