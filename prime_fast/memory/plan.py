"""The phases of a run and what each of them holds at its peak, on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch

from prime_fast.config import Config
from prime_fast.engine.model import training_dtype
from prime_fast.memory import passes
from prime_fast.memory.items import Item, total
from prime_fast.memory.rollouts import CONTEXT, NCCL, Rollout
from prime_fast.memory.shapes import shape
from prime_fast.memory.states import RANK_0, States
from prime_fast.preflight import CHECK_PROMPTS, CHECK_TOKENS

SLACK = 0.1  # of what comes and goes: blocks of torch's allocator that are free but of no use
SLACK_NAME = "allocator slack"
STEP = " step"  # "policy step" is the optimizer step inside the phase "policy"

Moment = list[Item]


def models(config: Config) -> dict[str, str]:
    """The trainer's models: role -> path."""
    found = {"policy": config.model.policy}
    if config.uses_prm:
        found["prm"] = config.model.prm or config.model.policy
    if config.uses_reference:
        found["reference"] = config.model.reference or config.model.policy
    return found


class Plan:
    """card: bytes of a rank's GPU, None if unknown (vLLM then takes what rollout.batch sequences need).

    moments: phase -> what is alive at each of its moments that may be the peak, in the order in which the phases come.
    phases: phase -> what is alive at its peak.
    """

    def __init__(self, config: Config, ranks: int, card: int | None = None, on_gpu: bool = True) -> None:
        self.config, self.ranks, self.card, self.on_gpu = config, ranks, card, on_gpu
        self.place = "GPU" if on_gpu else "host"
        self.dtype = training_dtype(config.model, torch.device("cuda:0" if on_gpu else "cpu"))
        optimizers = {"policy": config.policy, "prm": config.prm if config.prime.update != "none" else None}
        self.states = {
            role: States(role, shape(path), self.dtype, ranks, config.engine, optimizers.get(role), on_gpu)
            for role, path in models(config).items()
        }
        self.rollout = Rollout(config, self.states["policy"].shape, self.dtype, card, on_gpu)
        self.moments = dict(self._moments())
        self.phases = {name: max(moments, key=self._size) for name, moments in self.moments.items()}

    @cached_property
    def peaks(self) -> dict[str, int]:
        """Bytes of the GPU at each phase's peak (of the host without a GPU)."""
        return {name: self._size(items) for name, items in self.phases.items()}

    @property
    def tightest(self) -> str:
        return max(self.peaks, key=self.peaks.get)

    @property
    def left(self) -> int:
        """Bytes of the card that the tightest phase leaves free; negative if it does not fit."""
        return self.card - self.peaks[self.tightest]

    @property
    def fits(self) -> bool:
        return self.left >= 0 and (self.rollout.sequences is None or self.rollout.sequences >= 1)

    @property
    def checkpoint_bytes(self) -> int:
        return sum(states.checkpoint_bytes() for states in self.states.values())

    @property
    def kept_bytes(self) -> int:
        """On disk: the checkpoints that are kept, the best among them, and one that is being written."""
        return (self.config.log.keep + self.config.evaluates + 1) * self.checkpoint_bytes

    def trainer_peaks(self) -> dict[str, int]:
        """Bytes that torch's allocator in the trainer hands out (without a GPU: of its process, beyond what it began
        with), by the names of the trainer's stopwatch."""
        peaks: dict[str, int] = {}
        for name, moments in self.moments.items():
            phase = name.removesuffix(STEP)
            for items in moments:
                handed_out = total((item for item in items if item.name != SLACK_NAME), self.place, "trainer")
                peaks[phase] = max(peaks.get(phase, 0), handed_out)
        return peaks

    def node_host_bytes(self, phase: str, node: int) -> int:
        """Of the host of a node of up to `node` ranks; rank 0 alone collects a whole model for its checkpoint."""
        alone = [item for item in self.phases[phase] if item.name.endswith(RANK_0)]
        ranks = min(self.ranks, node)
        return total(self.phases[phase], "host") * ranks - total(alone, "host") * (ranks - 1)

    def _size(self, moment: Moment) -> int:
        return total(moment, self.place)

    def _moments(self) -> Iterator[tuple[str, list[Moment]]]:
        config, rollout = self.config, self.rollout
        yield "load", [self._whole(moment, rest) for rest, moment in self._loading()]
        imported = max((states.imported() for states in self.states.values()), key=lambda items: total(items, "host"))
        yield "resume", [self._whole([*rollout.asleep(), *imported])]
        yield "generate", [self._whole(rollout.awake())]
        policy, prm = self.states["policy"], self.states.get("prm")
        if prm or "reference" in self.states:
            yield "reference", self._scored(self.states.get("reference", policy))
        if prm:
            yield from self._trained(prm) if prm.trained else [("prm", self._scored(prm))]
        if config.rollout.old_logprobs != "engine":
            yield "old_logprobs", self._scored(policy)
        yield from self._trained(policy)
        syncing = [*rollout.loaded(), *policy.gathered_for_export(), *rollout.buckets()]
        yield "sync", [self._whole(syncing), self._whole(rollout.ready())]
        written = [engine for engine in self.states.values() if engine.trained]
        moments = [[*rollout.ready(), *engine.gathered_for_export(), *engine.exported()] for engine in written]
        yield "checkpoint", [self._whole(moment) for moment in moments]

    def _loading(self) -> Iterator[tuple[Moment, Moment]]:
        """(at rest, beside it): engine after engine, then the self-check with the rollout engine awake."""
        done: Moment = []
        for states in self.states.values():
            yield done, states.starting()
            done = [*done, *states.fresh()]
        ready = self.rollout.ready()
        rows = CHECK_PROMPTS * -(-self.ranks // self.rollout.shards)
        tokens = rows * (self.config.data.max_prompt + CHECK_TOKENS)
        for moment in self._scoring(self.states["policy"], min(tokens, self.config.engine.micro_tokens)):
            yield done, [*ready, *moment]

    def _scored(self, states: States) -> list[Moment]:
        return [self._working(moment) for moment in self._scoring(states, self.config.engine.micro_tokens)]

    def _trained(self, states: States) -> Iterator[tuple[str, list[Moment]]]:
        yield states.role, [self._working(moment) for moment in self._training(states)]
        yield states.role + STEP, [self._working(states.stepping())]

    def _training(self, states: States) -> Iterator[Moment]:
        config = self.config
        moments = passes.training(
            states.role,
            states.shape,
            config.engine.micro_tokens,
            self.dtype,
            self.on_gpu,
            config.model.gradient_checkpointing,
        )
        for name, moment in moments.items():
            yield [*self._placed(moment), *states.gathered(), *(states.reducing() if name != "head" else [])]

    def _scoring(self, states: States, tokens: int) -> Iterator[Moment]:
        for moment in passes.scoring(states.role, states.shape, tokens, self.dtype, self.on_gpu):
            yield [*self._placed(moment), *states.gathered()]

    def _working(self, moment: Moment) -> Moment:
        return self._whole([*self.rollout.asleep(), *moment])

    def _rest(self) -> Moment:
        states = self.states.values()
        # the pinned blocks that trained parameters were loaded into serve frozen ones, or are kept for nothing
        blocks = self.states["policy"].loaded_into() if all(engine.trained for engine in states) else []
        return [*(item for engine in states for item in engine.rest()), *blocks]

    def _whole(self, moment: Moment, rest: Moment | None = None) -> Moment:
        """With the states at rest, the driver's share and slack."""
        slack = SLACK * sum(i.size for i in moment if i.where == self.place and i.holder == "trainer")
        items = [*(self._rest() if rest is None else rest), *moment]
        if self.on_gpu:
            items += [Item("trainer: CUDA context", CONTEXT, "GPU", "driver")]
            items += [Item("trainer: NCCL", NCCL, "GPU", "driver")] if self.ranks > 1 else []
        return [*items, Item(SLACK_NAME, int(slack), self.place)]

    def _placed(self, moment: Moment) -> Moment:
        return [item._replace(where=self.place) for item in moment]
