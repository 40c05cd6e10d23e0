"""Rollout engines: prompts of token ids in, sampled token ids with their log-probs out."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prime_fast.config import Config
from prime_fast.engine.batch import Sample
from prime_fast.engine.distributed import Stop
from prime_fast.progress import progress


class Request(NamedTuple):
    """One group to generate: len(seeds) samples of one prompt, which share its prefill."""

    key: int  # the caller's name for it
    prompt: Sequence[int]
    seeds: Sequence[int]  # each fixes its sample's random draws whatever else is in the batch
    max_tokens: int
    temperature: float  # 0 is greedy
    top_p: float = 1.0  # sample from the smallest set of tokens that has at least this probability, renormalised


class EngineError(Stop):
    """The engine cannot be trusted or brought back; the run has to stop."""


class EngineDied(EngineError):
    """The engine's process ended or went silent; a new one may take over its work."""


TICK_SECONDS = 0.2  # between two looks at what has come


class RolloutEngine:
    """What the trainer asks of an engine. Groups are submitted, `step` works on them, and each comes back when done."""

    batch = 256  # sequences that it decodes at a time
    ended = 0  # finished sequences of unfinished groups
    concurrent = False  # whether it goes on working between two steps
    forgets = False  # whether its weights are gone after a sleep
    patience = TICK_SECONDS  # how long a step of one that is concurrent listens when nothing finishes
    version = 0  # of the weights that `load_weights` brings next; see Sample.runs

    def submit(self, request: Request) -> None:
        raise NotImplementedError

    def step(self) -> list[tuple[int, list[Sample]]]:
        """Work for a while; (key, samples) of the groups that finished, in any order."""
        raise NotImplementedError

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over (name, full tensor) pairs; every parameter must come. A tensor is valid until the next is asked
        for. Raises EngineError naming the tensor that is missing or arrived changed. What a concurrent engine has in
        work stops, and goes on with them."""
        raise NotImplementedError

    def sleep(self) -> None:
        """Give accelerator memory back while the trainer works."""

    def wake(self) -> None:
        """After a sleep: be ready to take weights."""

    def ready(self) -> None:
        """After `wake` and the weights: be ready to generate."""

    def restart(self, room: float) -> None:
        """After EngineDied: a new engine without work, as after `wake`, which needs the weights again and `ready`.

        room: the share of a GPU that is free beside the trainer now; 1 without a GPU."""
        raise NotImplementedError

    def close(self) -> None:
        """Release everything."""

    def kill(self) -> None:
        """End what runs in other processes, at once, whatever this one does."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
    ) -> list[list[Sample]]:
        """len(seeds[i]) samples of prompt i."""
        for key, (prompt, row) in enumerate(zip(prompts, seeds, strict=True)):
            self.submit(Request(key, prompt, row, max_tokens, temperature, top_p))
        results: dict[int, list[Sample]] = {}
        while len(results) < len(prompts):
            results.update(self.step())
        return [results[key] for key in range(len(prompts))]


def release_cached() -> None:
    """Give the GPU memory that torch only keeps in store back to the driver: vLLM's allocator cannot use it."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


def make_engine(
    config: Config,
    path: str,
    eos_ids: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    trains: bool = True,
) -> RolloutEngine:
    """The engine that config.rollout asks for, with the weights at `path`; trains: others will follow."""
    with progress(f"starting the rollout engine ({config.rollout.engine})", at_once=True):
        if config.rollout.engine == "vllm":
            from prime_fast.rollout.process import EngineProcess

            return EngineProcess.for_config(config, path, eos_ids, dtype, device, trains=trains)
        from prime_fast.rollout.hf import HFEngine

        return HFEngine(path, eos_ids, dtype=dtype, device=device, batch=config.rollout.batch)
