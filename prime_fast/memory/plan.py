"""The phases of a run and what each of them holds at its peak, on one rank."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property

import torch

from prime_fast.config import Config, LoraConfig, ModelConfig
from prime_fast.engine.model import training_dtype
from prime_fast.engine.recompute import Recompute
from prime_fast.memory import passes
from prime_fast.memory.items import Item, total
from prime_fast.memory.rollouts import CONTEXT, NCCL, OWN_GPU_SHARE, Rollout
from prime_fast.memory.shapes import adapter, shape
from prime_fast.memory.states import RANK_0, States
from prime_fast.preflight import CHECK_PROMPTS, CHECK_TOKENS

MARGIN = 0.05  # of the card: what the choices that are made here leave free
SLACK = 0.1  # of what comes and goes: blocks of torch's allocator that are free but of no use
SLACK_NAME = "allocator slack"
STEP = " step"  # "policy step" is the optimizer step inside the phase "policy"

Moment = list[Item]


def alone(config: Config, lora: LoraConfig | None = None) -> Config:
    """Of a run that trains the policy as this one does, or an adapter of it, and holds nothing else."""
    changes = {"prime": {"process_weight": 0.0}, "policy": {"kl_coef": 0.0, "lora": lora}, "rollout": {"engine": "hf"}}
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=change) for name, change in changes.items()}
    )


class Plan:
    """card: bytes of a rank's GPU, None if unknown (vLLM then takes what rollout.batch sequences need).

    parks: whether optimizer states leave the GPU for the engine.
    recompute: role of a trained model -> which of its layers are recomputed.
    moments: phase -> what is alive at each of its moments that may be the peak, in the order in which the phases come.
    phases: phase -> what is alive at its peak.
    """

    def __init__(self, config: Config, ranks: int, card: int | None = None, on_gpu: bool = True) -> None:
        self.config, self.ranks, self.card, self.on_gpu = config, ranks, card, on_gpu
        self.place = "GPU" if on_gpu else "host"
        self.dtype = training_dtype(config.model, torch.device("cuda:0" if on_gpu else "cpu"))
        self.states = {
            role: self._states(role, path)
            for role, path in config.paths.items()
            if role != "reference" or config.reference_within is None
        }
        self.rollout = Rollout(config, self.states["policy"].shape, self.dtype, card, on_gpu)
        # an engine whose share was given may have room beside them
        self.parks = False
        self.parks = config.parks and on_gpu and (self.sizes_engine or card is None or self._awake() > self.limit)
        if self.sizes_engine:
            self.rollout = self.rollout._replace(room=self._room())
        self.recompute = {role: self._recompute(states) for role, states in self.states.items() if states.trained}
        self.moments = dict(self._moments())
        self.phases = {name: max(moments, key=self._size) for name, moments in self.moments.items()}

    def _states(self, role: str, path: str) -> States:
        config = self.config
        optimizers = {"policy": config.policy, "prm": config.prm if config.prime.update != "none" else None}
        optimizer = optimizers.get(role)
        adapted = adapter(path, role, optimizer and optimizer.lora)
        return States(role, shape(path), self.dtype, self.ranks, config.engine, optimizer, self.on_gpu, adapted)

    @property
    def limit(self) -> float:
        """Bytes of the card up to which it is filled by what is chosen here."""
        return (1 - MARGIN) * self.card

    @property
    def sizes_engine(self) -> bool:
        """Whether gpu_memory_utilization is chosen here: for a vLLM that sleeps beside the trainer."""
        given = {"gpu_memory_utilization", "kv_cache_memory_bytes"} & self.config.rollout.vllm.keys()
        beside = self.rollout.vllm and self.rollout.sleep_level > 0
        return beside and self.on_gpu and self.card is not None and not given

    def model(self, role: str) -> ModelConfig:
        """The section `model` with recompute as this plan says."""
        setting = self.recompute[role].setting if role in self.recompute else "none"
        return self.config.model.model_copy(update={"recompute": setting})

    @property
    def engine_config(self) -> Config:
        """The configuration for the rollout engine, with the share of the card that this plan leaves it."""
        if not self.sizes_engine:
            return self.config
        rollout, share = self.config.rollout, {"gpu_memory_utilization": self.rollout.room}
        return self.config.model_copy(update={"rollout": rollout.model_copy(update={"vllm": rollout.vllm | share})})

    def chosen(self) -> list[str]:
        """A sentence for what was chosen here instead of in the configuration."""
        sentences = []
        if self.config.model.recompute == "auto" and self.on_gpu:
            layers = [f"{found.layers} of {found.of} ({role})" for role, found in self.recompute.items()]
            known = "" if self.card else ", as long as the card is not known"
            sentences.append(f"model.recompute=auto recomputes layers: {', '.join(layers)}{known}.")
        if self.sizes_engine:
            sentences.append(f"rollout.vllm.gpu_memory_utilization is {self.rollout.room:g}, by the memory plan.")
        return sentences

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
        yield "load", [*self._loading(), *self._checking()]
        imported = max((states.imported() for states in self.states.values()), key=lambda items: total(items, "host"))
        yield "resume", [self._whole([*rollout.asleep(), *imported])]
        yield "generate", [self._beside_engine(rollout.awake())]
        policy, prm = self.states["policy"], self.states.get("prm")
        if prm or config.uses_reference:
            within = self.states[config.reference_within or "policy"]
            yield "reference", self._scored(self.states.get("reference", within))
        if prm:
            yield from self._trained(prm) if prm.trained else [("prm", self._scored(prm))]
        if config.rollout.old_logprobs != "engine":
            yield "old_logprobs", self._scored(policy)
        yield from self._trained(policy)
        syncing = [*rollout.loaded(), *policy.gathered_for_export(), *rollout.buckets()]
        yield "sync", [self._beside_engine(syncing), self._beside_engine(rollout.ready())]
        yield "checkpoint", list(self._writing())

    def _writing(self) -> Iterator[Moment]:
        for engine in self.states.values():
            if engine.trained:
                written = [] if self._copies() else [i for states in self.states.values() for i in states.copied()]
                yield self._beside_engine([*self.rollout.ready(), *engine.gathered_for_export(), *written])

    def _loading(self) -> Iterator[Moment]:
        """Engine after engine."""
        done: Moment = []
        for states in self.states.values():
            yield self._whole(states.starting(), done)
            done = [*done, *states.fresh()]

    def _checking(self) -> Iterator[Moment]:
        """The self-check with the rollout engine awake, before the first step."""
        rows = CHECK_PROMPTS * -(-self.ranks // self.rollout.shards)
        engine = self.config.engine
        tokens = -(-rows * (self.config.data.max_prompt + CHECK_TOKENS) // engine.sequence_parallel)
        for moment in self._scoring(self.states["policy"], min(tokens, engine.micro_tokens)):
            yield self._beside_engine([*self.rollout.ready(), *moment], fresh=True)

    def _room(self) -> float:
        """The share of the card that is left at all times at which vLLM holds its cache, in steps of 1%."""
        self.rollout = self.rollout._replace(room=0.0)
        room = (self.limit - self._awake()) / self.card
        return min(max(int(100 * room), 1) / 100, OWN_GPU_SHARE)

    def _awake(self) -> int:
        """Bytes at the peak of what is held while vLLM holds its cache."""
        moments = [*self._checking(), self._beside_engine(self.rollout.ready()), *self._writing()]
        return max(map(self._size, moments))

    def _recompute(self, states: States) -> Recompute:
        setting, of = self.config.model.recompute, states.shape.layers
        if setting != "auto":
            return Recompute.fixed(setting, of, self.config.paths[states.role])
        if not self.on_gpu or self.card is None:
            return Recompute(0, of)

        def fits(layers: int) -> bool:
            moments = map(self._working, self._training(states, Recompute(layers, of)))
            return max(map(self._size, moments)) <= self.limit

        return Recompute(bisect_left(range(of), True, key=fits), of)

    def _scored(self, states: States) -> list[Moment]:
        return [self._working(moment) for moment in self._scoring(states, self.config.engine.micro_tokens)]

    def _trained(self, states: States) -> Iterator[tuple[str, list[Moment]]]:
        moments = self._training(states, self.recompute[states.role])
        yield states.role, [self._working(moment) for moment in moments]
        yield states.role + STEP, [self._working(states.stepping())]

    def _training(self, states: States, recompute: Recompute) -> Iterator[Moment]:
        config = self.config
        tokens = config.engine.micro_tokens
        longest = config.rollout.max_response if states.role == "prm" and config.prm.loss == "response" else None
        ranks = states.optimizer.lora.rank * (len(states.adapter) // 2) // states.shape.layers if states.adapter else 0
        sizes = states.shape, tokens, self.dtype, self.on_gpu
        moments = passes.training(states.role, *sizes, recompute, longest, ranks)
        for name, moment in moments.items():
            yield [*self._placed(moment), *states.gathered(), *(states.reducing() if name != "head" else [])]

    def _scoring(self, states: States, tokens: int) -> Iterator[Moment]:
        for moment in passes.scoring(states.role, states.shape, tokens, self.dtype, self.on_gpu):
            yield [*self._placed(moment), *states.gathered()]

    def _working(self, moment: Moment) -> Moment:
        return self._whole([*self.rollout.asleep(), *moment])

    def _beside_engine(self, moment: Moment, fresh: bool = False) -> Moment:
        """While the rollout engine is awake: without what is parked. fresh: before the first step."""
        rest = []
        for states in self.states.values():
            items = states.fresh() if fresh else states.rest()
            rest += states.parked(items) if self.parks else items
        return self._whole(moment, [*rest, *([] if fresh else [*self._blocks(), *self._copies()])])

    def _blocks(self) -> Moment:
        """The pinned blocks that trained parameters were loaded into serve frozen ones, or are kept for nothing."""
        frozen = any(states.adapter or not states.trained for states in self.states.values())
        return [] if frozen else self.states["policy"].loaded_into()

    def _copies(self) -> Moment:
        """Of a checkpoint that is being written, where steps follow one."""
        follows = 0 < self.config.log.checkpoint_every < self.config.steps
        return [item for states in self.states.values() for item in states.copied()] if follows else []

    def _rest(self) -> Moment:
        rest = (item for states in self.states.values() for item in states.rest())
        return [*rest, *self._blocks(), *self._copies()]

    def _whole(self, moment: Moment, rest: Moment | None = None) -> Moment:
        """With the states at rest, the driver's share and slack."""
        slack = SLACK * sum(i.size for i in moment if i.where == self.place and i.holder == "trainer")
        items = [*(self._rest() if rest is None else rest), *moment]
        if self.parks:
            items += [item for states in self.states.values() for item in states.parking()]
        if self.on_gpu:
            items += [Item("trainer: CUDA context", CONTEXT, "GPU", "driver")]
            items += [Item("trainer: NCCL", NCCL, "GPU", "driver")] if self.ranks > 1 else []
        return [*items, Item(SLACK_NAME, int(slack), self.place)]

    def _placed(self, moment: Moment) -> Moment:
        return [item._replace(where=self.place) for item in moment]
