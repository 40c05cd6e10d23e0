"""What a step makes of its rollouts: the PRM's update, the credit, the policy's update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prime_fast import passes, preflight, prime, step_labels, token_log
from prime_fast.config import Config, PolicyConfig, PrmConfig
from prime_fast.credit import Credit
from prime_fast.engine import distributed
from prime_fast.engine.batch import Batch, Group
from prime_fast.engine.lora import Trunk
from prime_fast.engine.zero import Engine
from prime_fast.memory.plan import Plan
from prime_fast.metrics import Phases, write_tokens
from prime_fast.schedule import learning_rate
from prime_fast.stream import Passes, Scored, Stream


@dataclass
class Work:
    """A step as far as it has come: the Trainer makes one, both fill it in, and whatever stops the step reads from it
    what there is to keep."""

    step: int = 0
    record: dict[str, Any] = field(default_factory=dict)  # its metrics
    changed: set[str] = field(default_factory=set)  # models whose passes are over and moved their weights
    stream: Stream | None = None  # its passes of reference and PRM, as long as they go on
    whole: bool = False  # nothing but its evaluation is missing

    @property
    def moved(self) -> set[str]:
        """Models whose weights it has changed so far."""
        return self.changed | ({"prm"} if self.stream and self.stream.moved else set())


class Learner:
    """Policy, PRM and reference, and what they learn from groups of verified rollouts."""

    def __init__(self, config: Config, plan: Plan, device: torch.device, tokenizer: Any, phases: Phases) -> None:
        self.config, self.plan, self.device = config, plan, device
        self.tokenizer, self.phases = tokenizer, phases
        self.credit = Credit(config.prime, tokenizer)
        self.step_labels = step_labels.load(config.prime.step_labels) if config.prime.step_labels else None
        self.policy = self._engine("policy", config.policy)
        self.prm = self.reference = None
        if config.uses_prm:
            trained = config.prime.update != "none"
            self.prm = self._engine("prm", config.prm if trained else None)
        if config.uses_reference:
            within = {"policy": self.policy, "prm": self.prm}.get(config.reference_within)
            self.reference = Trunk("reference", within) if within else self._engine("reference", None)
        self.park()

    def _engine(self, role: str, optimizer: PolicyConfig | PrmConfig | None) -> Engine:
        config, adapter = self.config, optimizer and optimizer.lora
        path, model = config.paths[role], self.plan.model(role)
        return Engine(role, path, model, config.engine, optimizer, self.device, adapter, config.seed)

    @property
    def trained(self) -> dict[str, Engine]:
        """The engines that a checkpoint holds, by role."""
        engines = {"policy": self.policy, "prm": self.prm}
        return {name: engine for name, engine in engines.items() if engine is not None and engine.trains}

    def park(self) -> None:
        """Before the rollout engine wakes on the same GPU: the optimizers' states make room for it."""
        if self.plan.parks:
            with self.phases("park"):
                for engine in self.trained.values():
                    engine.park()

    def unpark(self) -> None:
        if self.plan.parks:
            with self.phases("unpark"):
                for engine in self.trained.values():
                    engine.unpark()

    def begin_stream(self, step: int, groups: int, *, waves: bool = False) -> Stream:
        """The reference's and the PRM's passes over so many groups to come.

        One forward of the reference gives log-probs for the PRM's rewards at temperature 1, and for the policy's KL at
        the rollout's. It runs on the PRM's own packs, so that equal weights give log-ratios of exactly 0.
        """
        config, rewards = self.config, (1.0,) if self.prm is not None else ()
        if self.reference is not None:
            reference, temperatures = self.reference, {config.rollout.temperature: None} | dict.fromkeys(rewards)
        else:
            reference, temperatures = self.policy if rewards else None, rewards
        what = Passes(
            reference,
            tuple(temperatures),
            self.prm,
            beta=config.prime.beta,
            lr=learning_rate(config.prm, step, config.steps),
            micro_tokens=config.engine.micro_tokens,
            mini_batch=config.prm.mini_batch,
            loss=config.prm.loss,
            epochs=config.prm.passes,
        )
        return Stream(what, self.phases, groups, config.rollout.samples, waves=waves)

    def stream_of(self, step: int, groups: Sequence[Group]) -> Stream:
        """A stream whose groups have all come: a mini-batch is packed at a time."""
        stream = self.begin_stream(step, len(groups))
        for group in groups:
            stream.put(group)
        return stream

    def for_the_prm_alone(
        self, groups: Sequence[Group], fresh: Sequence[Group], surplus: Sequence[Group]
    ) -> list[Group]:
        """Of the `fresh` groups, those that a step has looked at, the ones which rollout.keep drops, if prm.rows asks
        for them; never one that rollout.filter_truncated does."""
        if self.config.prm.rows == "kept":
            return []
        train = {group.id for group in (*groups, *surplus)}
        strict = self.config.rollout.filter_truncated
        whole = (group for group in fresh if not (strict and any(sample.truncated for sample in group.samples)))
        return [group for group in whole if group.id not in train]

    def learn(
        self, work: Work, batch: Batch | None, others: Sequence[Group] = (), shown: Sequence[Group] = ()
    ) -> str | None:
        """Train PRM and policy on the batch; returns why an update of one of them came to nothing, if so.

        work: its stream must have been given the groups of the batch. Without a batch, and while the PRM warms up, the
        policy stays as it is; the credit is calibrated all the same. others: groups that the PRM alone trains on.
        shown: the groups of the batch, of which tokens.jsonl gets a few; none where no such file is wanted.
        """
        config, phases, warmup = self.config, self.phases, self.config.prm.warmup_steps
        scored = work.stream.finish(others)
        self._note_prm(work, scored, batch)
        if batch is None:
            return _lost({"PRM": scored.updates})
        ref_logprob, prm_logprob = scored.ref_logprob, scored.logprob
        if self.prm is not None and config.prime.update == "before":
            with phases("prm"):
                prm_logprob = work.stream.rescore()
        if prm_logprob is not None and not torch.isfinite(prm_logprob - ref_logprob[1.0]).all():
            return "log-probs of the PRM or its reference are not finite, so there are no advantages"
        with phases("advantage"):
            advantage = self._advantage(work, batch, prm_logprob, ref_logprob, shown)
        if work.step <= warmup:
            return _lost({"PRM": scored.updates})
        shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + work.step)
        budget, attention = config.engine.micro_tokens, self.policy.attention
        packed = {"attention": attention, "sequence_parallel": config.engine.sequence_parallel}
        epochs = [
            passes.split(batch, config.policy.mini_batch, budget, shuffle, **packed)
            for _ in range(config.policy.epochs)
        ]
        efficiency = passes.efficiency(batch, epochs[0], attention)
        work.record |= {"rows": len(batch.responses), "packing_efficiency": efficiency}
        temperature = config.rollout.temperature
        with phases("old_logprobs"):
            old_logprob, own_first = self._old_logprob(batch, epochs, ref_logprob)
        with phases("policy"):
            lr = learning_rate(config.policy, work.step - warmup, config.steps - warmup)
            result = passes.train_policy(
                self.policy,
                batch,
                [mini for minis in epochs for mini in minis],
                advantage,
                old_logprob=old_logprob,
                own_first=own_first,
                ref_logprob=None if self.reference is None else ref_logprob[temperature],
                importance_cap=0.0 if config.rollout.old_logprobs == "engine" else config.rollout.importance_cap,
                temperature=temperature,
                top_p=config.rollout.top_p,
                config=config.policy,
                lr=lr,
            )
        _note(work, "policy", result.updates, lr)
        work.record |= {
            "entropy": result.entropy,
            "clip_fraction": result.clip_fraction,
            "approx_kl": result.approx_kl,
            "reference_kl": result.reference_kl,
        } | result.mismatch
        if work.step == warmup + 1 and result.updates.applied and result.updates.grad_norm > 0:
            preflight.check_every_parameter_trains(self.policy, "policy")
        return _lost({"PRM": scored.updates, "policy": result.updates})

    def _advantage(
        self,
        work: Work,
        batch: Batch,
        prm_logprob: Tensor | None,
        ref_logprob: dict[float, Tensor],
        shown: Sequence[Group],
    ) -> Tensor:
        """(T,) float32, by the calibration of the steps before; told in the record and, of a few groups, token by token
        in tokens.jsonl."""
        base = None if prm_logprob is None else ref_logprob[1.0]
        if base is not None and self.config.prime.rebase:
            base = batch.engine_logprob.to(self.device)
        fit = self.credit.fit  # of the steps before: what follows renews it
        advantage, told = self.credit.advantage(batch, prm_logprob, base, self.device)
        work.record |= told
        if shown and distributed.rank() == 0:
            ratio = None if prm_logprob is None else prm_logprob - base
            kept = token_log.records(work.step, shown, batch, advantage, ratio, self.credit, fit, self.tokenizer)
            write_tokens(self.config.run_dir, kept)
        return advantage

    def _note_prm(self, work: Work, scored: Scored, batch: Batch | None) -> None:
        if scored.updates is not None:
            _note(work, "prm", scored.updates, learning_rate(self.config.prm, work.step, self.config.steps))
        if scored.score is not None and torch.isfinite(scored.score).all():
            outcome, score = batch.outcome, scored.score.cpu()
            correct, pairs = prime.pair_accuracy(score, outcome, batch.group)
            work.record["prm_accuracy"] = float(((score > 0) == (outcome > 0.5)).float().mean())
            work.record["prm_pair_accuracy"] = correct / pairs if pairs else None
            if self.step_labels:
                ratio = (scored.logprob - scored.ref_logprob[1.0]).cpu()
                auc = step_labels.step_auc(self.step_labels, self.tokenizer, batch, ratio)
                work.record["prm_step_auc"] = auc

    def _old_logprob(
        self, batch: Batch, epochs: list[list[passes.MiniBatch]], ref_logprob: dict[float, Tensor]
    ) -> tuple[Tensor | None, bool]:
        """The old policy's log-probs (T,), and whether those of the first mini-batch come from its own forward.

        "engine" needs no correction: the ratio is that of the new policy to the one which sampled, mismatch included.
        """
        rollout = self.config.rollout
        if rollout.old_logprobs == "engine":
            return batch.engine_logprob.to(self.device), False
        own_first = rollout.old_logprobs == "update"
        if self.reference is None and rollout.temperature in ref_logprob:
            return ref_logprob[rollout.temperature], own_first  # the policy served as the PRM's reference
        rest = epochs[0][1:] if own_first else epochs[0]
        return passes.score(self.policy, batch, rest, rollout.temperature) if rest else None, own_first


def _note(work: Work, name: str, updates: passes.Updates, lr: float) -> None:
    """Write down what became of a model's mini-batches; its weights are others now if any was applied."""
    if updates.applied:
        work.changed.add(name)
    work.record |= {
        f"{name}_loss": updates.loss,
        f"{name}_grad_norm": updates.grad_norm,
        f"{name}_lr": lr,
        f"{name}_updates": updates.made,
        f"{name}_applied": updates.applied,
    }


def _lost(made: dict[str, passes.Updates | None]) -> str | None:
    lost = [name for name, updates in made.items() if updates and not updates.applied]
    return f"no mini-batch of the {' and '.join(lost)} has a finite loss and gradient" if lost else None
