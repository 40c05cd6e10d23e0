"""A step of a run in seconds, by phase; and the setting that would shorten it most."""

from __future__ import annotations

import math
from typing import Any

from prime_fast.memory.advice import UTILIZATION, apply, row_share
from prime_fast.memory.plan import Plan
from prime_fast.speed import rollouts
from prime_fast.speed.rates import Rates
from prime_fast.speed.step import EVERY, Machine, Pass, Rows, passes_per_step

RESPONSE, PROMPT = 0.4, 0.2  # mean lengths as shares of the longest, unless told: 0.47 and 0.2 in the published run
PASS_RATE = 0.5  # of the groups that are started
NODE = 8
SYNC = "sync and other"
WORTH = 0.02  # of a step: what a setting must save to be named
MICRO = "engine.micro_tokens"
LOGITS = 24  # bytes a logit that sampling moves


class Seconds:
    """What a step of the run that `plan` holds is predicted to take.

    phases: the trainer's own names -> seconds. response: mean tokens of a response, None for RESPONSE of the longest.
    """

    def __init__(self, plan: Plan, rates: Rates, response: float | None = None) -> None:
        config = plan.config
        self.plan, self.config, self.rates = plan, config, rates
        longest = config.rollout.max_response
        if response is not None and response > longest:
            raise ValueError(
                f"--response-tokens {response:g} is more than rollout.max_response={longest}; give the mean of what "
                "responses take, or raise rollout.max_response"
            )
        self.response = max(1.0, RESPONSE * longest) if response is None else response
        self.prompt = max(1.0, PROMPT * config.data.max_prompt)
        self.pass_rate = 1.0 if config.rollout.keep == (0, 1) else PASS_RATE
        prompts = config.rollout.prompts
        started = min(math.ceil(prompts / self.pass_rate), prompts * config.rollout.max_rounds)
        self.generated = started * config.rollout.samples
        self.kept = math.ceil(started * self.pass_rate) * config.rollout.samples
        self.rows, self.every = (Rows.of(self.prompt, self.drawn(n), n) for n in (self.kept, self.generated))
        self.phases = {"generate": self.rollout()}
        for made in passes_per_step(config, plan.recompute)[1:]:
            self.phases[made.phase] = self.phases.get(made.phase, 0.0) + self.trainer_pass(made)
        self.phases[SYNC] = self.sync()

    @property
    def total(self) -> float:
        return sum(self.phases.values()) - self.beside

    @property
    def beside(self) -> float:
        """Seconds of the trainer's that pass while engines of their own decode, at best: none waits for the other."""
        rollout, phases = self.config.rollout, self.phases
        if not self.plan.rollout.apart:
            return 0.0
        if rollout.ahead:
            trainer = sum(spent for phase, spent in phases.items() if phase not in ("generate", SYNC))
        else:
            prm = self.config.prm  # its first pass over groups that are kept: the rest comes after them
            trainer = phases.get("reference", 0.0) + phases.get("prm", 0.0) / prm.passes
            trainer *= self.config.prime.overlap * (1.0 if prm.rows == "kept" else self.kept / self.generated)
        return min(phases["generate"], trainer)

    @property
    def bottleneck(self) -> str:
        return max(self.phases, key=self.phases.get)

    @property
    def tokens_per_second(self) -> float:
        """As a run logs it: tokens trained, prompts included, over the whole step."""
        return self.rows.tokens / self.total

    def drawn(self, rows: int) -> tuple[float, ...]:
        return rollouts.lengths(min(rows, rollouts.SIMULATED), self.response, self.config.rollout.max_response)

    def machine(self, role: str) -> Machine:
        config, plan = self.config, self.plan
        offload = config.engine.offload != "none"
        states = plan.states.get(role, plan.states[config.reference_within or "policy"])
        trained = states.training.count if states.adapter else None
        parallel = config.engine.sequence_parallel
        return Machine(states.shape, self.rates, plan.ranks, NODE, plan.dtype.itemsize, offload, parallel, trained)

    def micro_batches(self, rows: Rows) -> float:
        """Of each rank, for one run over the rows: packs are nearly full."""
        full = self.config.engine.micro_tokens * self.plan.ranks * self.rates.balance
        return max(1.0, rows.tokens / full)

    def trainer_pass(self, made: Pass) -> float:
        role = "policy" if made.phase == "old_logprobs" else made.phase
        machine = self.machine(role)
        epochs = {"policy": self.config.policy.epochs, "prm": self.config.prm.passes}
        runs = epochs[made.phase] if made.trains else min(1.0, made.units)
        rows = self.every if made.rows == EVERY else self.rows
        steps = made.steps * rows.count / self.rows.count
        micro_batches = max(self.micro_batches(rows), steps / runs)
        seconds = machine.pass_seconds(rows, made.units, micro_batches, made.trains, runs, made.kept, made.spared)
        return seconds + steps * machine.optimizer_step()

    @property
    def engines(self) -> int:
        rollout = self.plan.rollout
        cards = len(self.config.rollout.vllm["gpus"]) if rollout.apart else self.plan.ranks
        return max(1, cards // rollout.shards)

    @property
    def slots(self) -> int:
        """Sequences decoded together: rollout.batch, or as many as the KV cache has room for at their mean length."""
        config, rollout = self.config, self.plan.rollout
        if rollout.sequences is None:
            return config.rollout.batch
        drawn = self.drawn(self.kept)
        held = self.prompt + sum(n * n for n in drawn) / sum(drawn) / 2  # longer ones are there for longer
        room = rollout.sequences * (config.data.max_prompt + config.rollout.max_response) / held
        return max(1, min(config.rollout.batch, int(room)))

    def rollout(self) -> float:
        config, rates, rollout = self.config, self.rates, self.plan.rollout
        engine, shards, float32 = rollout.shape, rollout.shards, self.plan.dtype.itemsize == 4
        memory, flops = rates.memory * rates.decode, rates.flops(float32) * rates.layers
        key_values = engine.kv_bytes(self.plan.dtype.itemsize) / shards
        eager = not rollout.vllm or bool(config.rollout.vllm.get("enforce_eager"))
        least = rates.token_eager * engine.layers / 28 if eager else rates.token
        copies = 1 if rollout.vllm else 3  # the embedded engine's cache is made anew at each token: read, read, written
        logits = LOGITS * engine.vocabulary

        def step(sequences: int, tokens: float) -> float:
            moved = rollout.weights + copies * tokens * key_values + sequences * logits
            return least + max(moved / memory, 2 * sequences * engine.count / shards / flops)

        count = math.ceil(self.generated / self.engines)
        decode = rollouts.decode if rollout.vllm else rollouts.in_batches
        drawn = self.drawn(count)
        prefill = 2 * engine.count * self.prompt * count / config.rollout.samples / shards / flops
        return prefill + decode(drawn, self.slots, self.prompt, step) * count / len(drawn)

    def sync(self) -> float:
        rollout = self.plan.rollout
        seconds = rollout.weights * rollout.shards / self.rates.sync
        if self.plan.parks:
            seconds += 2 * sum(states.parked_bytes for states in self.plan.states.values()) / self.rates.pcie
        return seconds + (self.rates.wake if rollout.vllm and rollout.sleep_level else 0.0)


def advice(seconds: Seconds) -> tuple[dict[str, Any], float] | None:
    """The change of a setting that shortens the step most while the run fits its card, and the seconds it saves."""
    best = None
    for change in _changes(seconds):
        plan = Plan(apply(seconds.config, change), seconds.plan.ranks, seconds.plan.card)
        if not plan.fits:
            continue
        saved = seconds.total - Seconds(plan, seconds.rates, seconds.response).total
        if saved > WORTH * seconds.total and (best is None or saved > best[1]):
            best = change, saved
    return best


def _changes(seconds: Seconds) -> list[dict[str, Any]]:
    """Settings that may help and change no result beyond rounding."""
    config, changes = seconds.config, []
    rollout, given = config.rollout, config.rollout.vllm.get("kv_cache_memory_bytes")
    if rollout.engine == "hf":
        changes.append({"rollout.engine": "vllm"})
    elif seconds.slots < rollout.batch and not seconds.plan.sizes_engine and not given:
        share = seconds.plan.rollout.utilization
        changes += [{UTILIZATION: larger / 20} for larger in range(2, 20) if larger / 20 > share]
    if rollout.vllm.get("enforce_eager"):
        changes.append({"rollout.vllm.enforce_eager": False})
    if seconds.slots == rollout.batch and rollout.batch < 1024:
        changes.append({"rollout.batch": 2 * rollout.batch})
    tokens = config.engine.micro_tokens
    if any(found.layers for found in seconds.plan.recompute.values()):
        smaller = [tokens >> i for i in range(1, tokens.bit_length()) if tokens >> i >= row_share(config)]
        sizes = [{}, *({MICRO: size} for size in smaller)]
        now = config.model.recompute
        modes = [{"model.recompute": mode} for mode in ("auto", "attention-saved") if mode != now]
        changes += [mode | size for mode in modes for size in sizes] + (sizes[1:] if now == "auto" else [])
    changes.append({"engine.park": not config.engine.park})
    if config.engine.offload != "none":
        changes.append({"engine.offload": "none"})
    if tokens <= 1 << 20:
        changes.append({MICRO: 2 * tokens})
    return changes
