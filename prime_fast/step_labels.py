"""Does the PRM find the wrong steps? A metric for rows whose steps a function can judge; training never sees it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from torch import Tensor

from prime_fast import prime
from prime_fast.engine.batch import Batch
from prime_fast.rewards.functions import import_function

Labels = Callable[[str, str], list[tuple[int, bool]]]  # (prompt, response) -> [(character of the response, right)]


def load(name: str) -> Labels:
    """The function `path/to/file.py:function` or `package.module:function`; ValueError if there is none."""
    return import_function(name, "prime.step_labels")


def step_auc(labels: Labels, tokenizer: Any, batch: Batch, log_ratio: Tensor) -> float | None:
    """Chance that the log-ratio at a right step's label exceeds a wrong one's; None without steps of both kinds.

    log_ratio (T,) of the PRM to its reference, nats.
    """
    places: dict[bool, list[int]] = {True: [], False: []}
    for prompt, response, start in zip(batch.prompts, batch.responses, batch.cu_seqlens.tolist(), strict=False):
        for character, right in labels(_text(prompt, tokenizer), _text(response, tokenizer)):
            places[bool(right)].append(start + token_at(character, response, tokenizer))
    if not all(places.values()):
        return None
    return prime.area_under_curve(log_ratio[places[True]], log_ratio[places[False]])


def token_at(character: int, tokens: Tensor, tokenizer: Any) -> int:
    """The token whose text holds this character of the decoded tokens."""
    return bisect_right(range(1, len(tokens)), character, key=lambda count: len(_text(tokens[:count], tokenizer)))


def _text(tokens: Tensor, tokenizer: Any) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)
