"""What a step trains on: sampled responses, their groups, and a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    tokens: Tensor  # (L,) int64, ends with EOS or a stop token unless truncated
    logprob: Tensor  # (L,) float32 nats, of what the engine sampled from: its weights, after temperature and top-p
    truncated: bool  # max_tokens was reached before an end
    # (first token, version of the weights) of each stretch between two weight loads; none: all of its group's version
    runs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Group:
    """K responses to one prompt."""

    id: int  # number of the draw, unique in a run
    row: int  # index of the prompt in the data
    prompt: tuple[int, ...]
    samples: tuple[Sample, ...]
    outcomes: tuple[float, ...]
    version: int = 0  # of the weights that its oldest token was sampled with, see Fleet.version
    failures: tuple[tuple[str, str], ...] = ()  # (kind, reason) of each response without a full verdict, in their order
    programs: tuple[Any, ...] = ()  # what those of the responses took that are programs: `rewards.code.Usage`


@dataclass(frozen=True)
class Batch:
    """What a step trains on, the same on every rank. R rows, T response tokens in all, row after row."""

    prompts: list[Tensor]  # R of (P,) int64
    responses: list[Tensor]  # R of (L,) int64
    engine_logprob: Tensor  # (T,) float32
    outcome: Tensor  # (R,) float32
    group: Tensor  # (R,) int64
    cu_seqlens: Tensor  # (R+1,) int32
    age: Tensor  # (T,) int32: updates of the weights since the token was sampled; one is about to come

    @classmethod
    def of(cls, groups: Sequence[Group], version: int = 0) -> Batch:
        """version: of the weights that are about to be updated."""
        rows = [(group, k) for group in groups for k in range(len(group.samples))]
        samples = [group.samples[k] for group, k in rows]
        return cls(
            prompts=[torch.tensor(group.prompt) for group, _ in rows],
            responses=[sample.tokens for sample in samples],
            engine_logprob=torch.cat([sample.logprob for sample in samples]),
            outcome=torch.tensor([group.outcomes[k] for group, k in rows], dtype=torch.float32),
            group=torch.tensor([group.id for group, _ in rows]),
            cu_seqlens=torch.tensor([0, *accumulate(len(sample.tokens) for sample in samples)], dtype=torch.int32),
            age=torch.cat([version - _versions(group.version, group.samples[k]) for group, k in rows]),
        )

    @property
    def fresh(self) -> Tensor:
        """(R,) bool: every token was sampled with the weights that are about to be updated."""
        return torch.stack([(age == 0).all() for age in self.age.split(self.cu_seqlens.diff().tolist())])

    @property
    def lengths(self) -> list[int]:
        """Tokens fed per row: prompt and response but for the last one, which predicts nothing."""
        return [len(prompt) + len(response) - 1 for prompt, response in zip(self.prompts, self.responses, strict=True)]


def _versions(version: int, sample: Sample) -> Tensor:
    """(L,) int32, of the weights that each token was sampled with."""
    runs = sample.runs or ((0, version),)
    starts, versions = torch.tensor(runs, dtype=torch.int32).T
    lengths = torch.cat([starts, starts.new_tensor([len(sample.tokens)])]).diff()
    return versions.repeat_interleave(lengths)
