"""The whole tree, and what must hold between its sections."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator

from prime_fast.config.sections import (
    DataConfig,
    EngineConfig,
    LogConfig,
    ModelConfig,
    OfflineConfig,
    PolicyConfig,
    PrimeConfig,
    PrmConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    SftConfig,
    WatchConfig,
)
from prime_fast.values import Name, Number, Positive

WHOLE_REWARDS = ("math", "math-strict", "code-strict", "auto-strict")  # their outcomes are 0 or 1, nothing between
ROUNDING = 1e-6  # of means, as in prime.keep_groups


class Config(Section):
    run_dir: Name  # where everything of the run is written
    steps: Positive = 100  # rollout steps
    seed: Annotated[int, Number, Field(ge=0, lt=1 << 32)] = 0  # of the order of the prompts and of sampling
    model: ModelConfig
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    prime: PrimeConfig = PrimeConfig()
    policy: PolicyConfig = PolicyConfig()
    prm: PrmConfig = PrmConfig()
    sft: SftConfig = SftConfig()
    offline: OfflineConfig = OfflineConfig()
    engine: EngineConfig = EngineConfig()
    watch: WatchConfig = WatchConfig()
    log: LogConfig = LogConfig()

    @property
    def evaluates(self) -> bool:
        return bool(self.data.eval) and self.log.eval_every > 0

    @property
    def parks(self) -> bool:
        """Whether optimizer states leave a GPU for the engine that wakes there."""
        rollout = self.rollout
        shares = rollout.engine == "vllm" and "gpus" not in rollout.vllm and rollout.vllm.get("sleep_level") != 0
        return self.engine.park and self.engine.offload == "none" and shares

    @property
    def uses_prm(self) -> bool:
        return self.prime.process_weight > 0

    @property
    def uses_reference(self) -> bool:
        return (self.uses_prm and self.prime.reference == "sft") or self.policy.kl_coef > 0

    @property
    def paths(self) -> dict[str, str]:
        """The models of a run: role -> where its weights come from. A PRM of prm.lora has its reference's."""
        start = self.model.policy
        reference = self.model.reference or start
        found = {"policy": start}
        if self.uses_prm:
            found["prm"] = self.model.prm or (reference if self.prm.lora and self.uses_reference else start)
        if self.uses_reference:
            found["reference"] = reference
        return found

    @property
    def reference_within(self) -> str | None:
        """The model that is the reference where its adapter is off; None where the reference has weights of its own."""
        if not self.uses_reference:
            return None
        if self.uses_prm and self.prm.lora:
            return "prm"
        return "policy" if self.policy.lora and self.paths["reference"] == self.model.policy else None

    @model_validator(mode="after")
    def consistent(self) -> Config:
        if self.rollout.samples < 2 and self.prime.estimator in ("rloo", "grpo"):
            raise ValueError(
                f"rollout.samples={self.rollout.samples} leaves nothing to compare with in the "
                f"{self.prime.estimator} baseline; set rollout.samples to 2 or more, or prime.estimator=reinforce "
                "and rollout.keep=[0, 1]"
            )
        if self.prime.process_weight == 0 and self.prime.outcome_weight == 0:
            raise ValueError(
                "prime.process_weight and prime.outcome_weight are both 0, so there is no reward; raise one of them"
            )
        if self.uses_prm and self.prime.update == "none" and self.model.prm is None:
            raise ValueError(
                "prime.update=none never trains the PRM, and a PRM equal to its reference rewards nothing; "
                "set model.prm to a trained PRM, or prime.update=after"
            )
        _check_prm(self)
        _check_lora(self)
        if self.prime.reference == "policy" and self.uses_prm and self.rollout.old_logprobs == "engine":
            raise ValueError(
                "prime.reference=policy needs the trainer's own log-probs (the engine's differ by rounding, which the "
                "batch norm would blow up); set rollout.old_logprobs=recompute"
            )
        if self.prime.reference == "policy" and self.policy.kl_coef > 0:
            raise ValueError("policy.kl_coef needs a frozen reference; set prime.reference=sft, or policy.kl_coef=0")
        longest = self.data.max_prompt + self.rollout.max_response
        held = self.engine.micro_tokens * self.engine.sequence_parallel
        if held < longest:
            raise ValueError(
                f"engine.micro_tokens * engine.sequence_parallel = {held} cannot hold one row of data.max_prompt + "
                f"rollout.max_response = {longest} tokens; raise engine.micro_tokens"
            )
        _check_credit(self)
        for name in self.watch.stop:
            if self.watch.limits.get(name, 0.0) is None:
                raise ValueError(f"watch.stop names {name}, which watch.limits turns off; leave it out of one of them")
        low, high = self.rollout.keep
        if low > high:
            raise ValueError(f"rollout.keep={[low, high]} must satisfy 0 <= low <= high <= 1")
        _check_keep(self)
        for key in ("carry", "ahead"):
            value = f"rollout.{key}={getattr(self.rollout, key)!s}".lower()
            if getattr(self.rollout, key) and self.rollout.engine != "vllm":
                raise ValueError(
                    f"{value} needs an engine that keeps unfinished responses while its weights change, which "
                    f"{self.rollout.engine} does not; set rollout.engine=vllm, or leave rollout.{key} out"
                )
            if getattr(self.rollout, key) and not self.rollout.max_age:
                raise ValueError(
                    f"{value} trains on responses that an older policy began, which rollout.max_age=0 forbids; set "
                    f"rollout.max_age=1, or leave rollout.{key} out"
                )
        if self.rollout.top_p < 1 and self.rollout.old_logprobs == "engine":
            raise ValueError(
                f"rollout.top_p={self.rollout.top_p:g} makes the engine's log-probs those of the most probable tokens "
                "alone, which are no old log-probs of the policy; set rollout.old_logprobs=update, or rollout.top_p=1"
            )
        return self


def _check_credit(config: Config) -> None:
    """What only some forms of credit know must not stand beside another one, as if it did something."""
    prime, rollout = config.prime, config.rollout
    if prime.credit == "published":
        for key, value, default in (("shrink", prime.shrink, 0), ("segment", prime.segment, "token")):
            if value != default:
                raise ValueError(
                    f"prime.{key}={value} is not a part of prime.credit=published; set prime.credit=critic (with "
                    f"prime.process_weight=0 that is RLOO) or another, or leave prime.{key} out"
                )
    else:
        for key, value, needed in (("estimator", prime.estimator, "rloo"), ("granularity", prime.granularity, "token")):
            if value != needed:
                raise ValueError(f"prime.credit={prime.credit} needs prime.{key}={needed}, not {value}")
    if not prime.rebase:
        return
    if rollout.temperature != 1 or rollout.top_p != 1:
        raise ValueError(
            "prime.rebase takes the engine's log-probs for the policy's, which they are at rollout.temperature=1 and "
            f"rollout.top_p=1 alone, not {rollout.temperature:g} and {rollout.top_p:g}; leave it out"
        )
    if prime.credit == "published" and prime.normalize == "batch":
        raise ValueError(
            "prime.rebase takes the engine's log-probs, whose rounding prime.normalize=batch would blow up; set "
            "prime.normalize=none, or another prime.credit"
        )


def _check_prm(config: Config) -> None:
    """What asks for more than the published training of the PRM must have a PRM that trains, and something to train."""
    prm, defaults = config.prm, PrmConfig()
    trains = config.uses_prm and config.prime.update != "none"
    for key in ("loss", "rows", "passes", "warmup_steps"):
        if not trains and getattr(prm, key) != getattr(defaults, key):
            what = "prime.update=none" if config.uses_prm else "prime.process_weight=0"
            raise ValueError(
                f"prm.{key}={getattr(prm, key)} has no effect with {what}, which trains no PRM; set prm.{key}="
                f"{getattr(defaults, key)}, or train one"
            )
    if prm.loss != "response" and config.rollout.samples == 1:
        raise ValueError(
            f"prm.loss={prm.loss} starts from a group's mean outcome, which with rollout.samples=1 is the outcome "
            "itself; set rollout.samples to 2 or more, or prm.loss=response"
        )
    if prm.warmup_steps >= config.steps:
        raise ValueError(
            f"prm.warmup_steps={prm.warmup_steps} are the first of steps={config.steps} and leave none that trains the "
            "policy; raise steps, or lower prm.warmup_steps"
        )


def _check_lora(config: Config) -> None:
    """An adapter needs something that trains it, and the PRM's the weights that it is to share with the reference."""
    if config.prm.lora and not (config.uses_prm and config.prime.update != "none"):
        what = "prime.update=none" if config.uses_prm else "prime.process_weight=0"
        raise ValueError(f"prm.lora has no effect with {what}, which trains no PRM; leave it out, or train one")
    if config.prm.lora and config.uses_reference and config.paths["prm"] != config.paths["reference"]:
        raise ValueError(
            f"prm.lora is an adapter on the weights of the reference, {config.paths['reference']}, and "
            f"model.prm={config.model.prm} names others; leave model.prm out, or prm.lora"
        )
    if config.engine.offload == "disk" and (config.prm.lora or config.policy.lora):
        raise ValueError(
            "engine.offload=disk is not tested with adapters, whose states are small; set engine.offload=cpu or none, "
            "or leave lora out"
        )


def _check_keep(config: Config) -> None:
    """Groups of outcomes that are 0 or 1 have a mean of k/K: some of those in keep must teach something.

    Fractions can have any mean, so that only rewards which give none are looked at; and K = 1 with any reward, where a
    keep between 0 and 1 would choose responses by their outcome instead of prompts by their difficulty.
    """
    (low, high), count, prime = config.rollout.keep, config.rollout.samples, config.prime
    kept = [k for k in range(count + 1) if low - ROUNDING <= k / count <= high + ROUNDING]
    if config.reward.function not in WHOLE_REWARDS and (count > 1 or kept):
        return
    mixed, alike = any(0 < k < count for k in kept), {k > 0 for k in kept if k in (0, count)}
    if prime.process_weight > 0:
        teaches = bool(kept)  # the process reward tells responses of one outcome apart
    elif prime.estimator == "reinforce":
        teaches = mixed or (alike == {True, False} if prime.whiten else True in alike)
    else:
        teaches = mixed
    if teaches:
        return
    wider = [0, 1]
    if count > 1:
        k = min(range(1, count), key=lambda k: max(low - k / count, k / count - high))
        wider = [min(low, math.floor(100 * k / count) / 100), max(high, math.ceil(100 * k / count) / 100)]
    what = f"only groups whose outcomes are all {max(alike):d}" if kept else "no group"
    raise ValueError(
        f"rollout.keep={[low, high]} keeps {what} where each of rollout.samples={count} outcomes is 0 or 1, so nothing "
        f"would be learnt; set rollout.keep={wider}"
    )
