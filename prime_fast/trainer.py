"""The PRIME loop: rollouts, outcomes, online PRM, advantages, policy update, weight sync."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prime_kernels
from prime_fast import passes, preflight, prime, profile, step_labels, token_log
from prime_fast.config import Config, PolicyConfig, PrmConfig
from prime_fast.credit import Credit
from prime_fast.engine import checkpoint, distributed, interrupt
from prime_fast.engine.batch import Batch, Group
from prime_fast.engine.lora import Trunk
from prime_fast.engine.writing import Checkpoints
from prime_fast.engine.zero import Engine
from prime_fast.evaluation import evaluate
from prime_fast.memory import measured
from prime_fast.metrics import MetricsLog, Phases, peak_gib, write_samples, write_tokens
from prime_fast.progress import at, progress, say
from prime_fast.rewards import RewardPool
from prime_fast.rollout import make_engine
from prime_fast.rollout.collect import Collector
from prime_fast.rollout.fleet import Fleet
from prime_fast.schedule import learning_rate
from prime_fast.stream import Passes, Scored, Stream
from prime_fast.watch import Watch, limits_of

MAX_FAILED = 3  # steps in a row whose update came to nothing before the run stops
MAX_REWARD_WORKERS = 16  # on each rank
SAMPLES_PER_STEP = 2  # completions written to samples.jsonl


class Trainer:
    def __init__(self, config: Config, device: torch.device, inputs: preflight.Inputs) -> None:
        self.config, self.device, self.inputs = config, device, inputs
        self.plan = measured.plan(config, device)
        self.planned_memory = measured.planned(self.plan)
        if distributed.rank() == 0:
            for sentence in self.plan.chosen():
                say(sentence)
        self.phases = Phases()
        self.credit = Credit(config.prime, inputs.tokenizer)
        self.step_labels = step_labels.load(config.prime.step_labels) if config.prime.step_labels else None
        self.watch = Watch(limits_of(config))
        self.policy = self._engine("policy", config.policy)
        self.prm = self.reference = None
        if config.uses_prm:
            trained = config.prime.update != "none"
            self.prm = self._engine("prm", config.prm if trained else None)
        if config.uses_reference:
            within = {"policy": self.policy, "prm": self.prm}.get(config.reference_within)
            self.reference = Trunk("reference", within) if within else self._engine("reference", None)
        self._park()
        engine = make_engine(self.plan.engine_config, config.model.policy, inputs.eos_ids, self.policy.dtype, device)
        self.rollout = Fleet(engine, self.policy.weights)
        apart = device.type == "cpu" or "gpus" in config.rollout.vllm
        self.overlaps = config.prime.overlap and self.rollout.concurrent and apart
        reward = {"timeout": config.reward.timeout, "sandbox": config.reward.sandbox}
        cores = max(1, os.cpu_count() // distributed.local_world_size())
        self.pool = RewardPool(config.reward.function, min(cores, MAX_REWARD_WORKERS), **reward)
        self.collector = Collector(
            config.rollout,
            config.seed,
            inputs.train,
            self.rollout,
            self.pool,
            inputs.tokenizer,
            config.reward.max_failures,
        )
        self.checkpoints = Checkpoints(Path(config.run_dir), config.log.keep)
        self.last_write = time.perf_counter()
        self.profile = profile.off
        self.counts = {"updates": 0, "skipped": 0, "failed_in_a_row": 0, "empty_in_a_row": 0}
        self.record: dict[str, Any] = {}  # metrics of the step in work, as far as they are known
        self.moved: set[str] = set()  # models whose weights it has changed so far
        self.stream: Stream | None = None  # its passes of reference and PRM, as long as they go on
        self.whole = False  # nothing but its evaluation is missing
        self.unwritten: dict[str, Any] | None = None  # the record of such a step, after a resume

    def run(self, log: MetricsLog | None, first_step: int = 1) -> None:
        """Train to config.steps, or until nothing is left to learn. `log` is given on rank 0.

        Whatever stops all ranks, a checkpoint of all that was trained is left.
        """
        config, evaluates = self.config, self.inputs.eval is not None and self.config.log.eval_every > 0
        self.phases.begins = self._begins
        if first_step == 1:
            with progress("self-check", at_once=True):
                preflight.self_check(self.policy, self.prm, self.reference, self.rollout, self.inputs, config)
            if evaluates:
                self._write(log, {"step": 0, "rollouts": 0} | self._evaluate(0))
        for step in range(first_step - (self.unwritten is not None), config.steps + 1):
            self.checkpoints.poll()
            before = self._state()
            try:
                if self.unwritten is None:
                    with self.profile(step, self.phases):
                        self.step(step)
                    self._watch()
                else:
                    self.record, self.unwritten = self.unwritten, None
                stopped_by = self._stopped_by(step)
                ending = None if stopped_by else self._ending()
                self.whole = True
                last = step == config.steps or ending is not None
                if evaluates and (step % config.log.eval_every == 0 or last):
                    self.record |= self._evaluate(step)
            except distributed.Stop:
                self._save_what_was_trained(log, step, before)
                raise
            self._write(log, self.record)
            if step == first_step and log is not None:
                for sentence in measured.beyond(self.record):
                    print(sentence, flush=True)
            if last or stopped_by or (config.log.checkpoint_every and step % config.log.checkpoint_every == 0):
                self.save(step)
            if stopped_by:
                self._finish_saving()
                raise distributed.Stop(f"stopped after step {step} by {stopped_by}, which watch.stop names")
            if ending is not None:
                if log is not None:
                    print(ending, flush=True)
                break
        self._finish_saving()

    def step(self, step: int) -> dict[str, Any]:
        """One PRIME step; returns its metrics, which `self.record` holds as far as they are known at any moment."""
        config, phases = self.config, self.phases
        prime_kernels.last_used.clear()
        self.record, self.moved, self.whole = {"step": step}, set(), False
        self.stream = stream = self._stream(step, config.rollout.prompts, waves=True) if self.overlaps else None
        try:
            groups, record, fresh = self.collector.collect(phases, stream, last=step == config.steps)
        finally:
            self.moved |= {"prm"} if stream and stream.moved else set()
        if distributed.rank() == 0:
            write_samples(Path(config.run_dir), [self._sample(step, group) for group in fresh[:SAMPLES_PER_STEP]])
        self.record |= record | {"groups": len(groups), "surplus": len(self.collector.surplus)}
        nothing = f"no group has a mean outcome within rollout.keep={list(config.rollout.keep)}"
        others, batch = self._for_the_prm_alone(groups, fresh), None
        warms_up = step <= config.prm.warmup_steps
        empty = not groups and not (others and warms_up)
        if groups or others:
            batch = Batch.of(groups, self.rollout.version) if groups else None
            self.rollout.sleep()
            self._unpark()
            self.stream = stream or self._given(step, groups)
            failure = self._update(step, batch, others, self.stream, groups)
            self.stream = None
            self._park()
        self._count(empty=empty, skip_reason=nothing if empty else failure)
        with phases("sync"):
            self.rollout.wake(changed="policy" in self.moved)
        self.rollout.settled()
        if batch is not None:
            self.record |= self._throughput(batch)
        self.record |= {f"kernel/{op}": backend for op, backend in prime_kernels.last_used.items()}
        if self.counts["failed_in_a_row"] >= MAX_FAILED:
            raise distributed.Stop(f"{MAX_FAILED} steps in a row were skipped: {failure}")
        return self.record

    def _update(
        self, step: int, batch: Batch | None, others: list[Group], stream: Stream, groups: Sequence[Group] = ()
    ) -> str | None:
        """Train PRM and policy on the batch; returns why an update of one of them came to nothing, if so.

        stream: has been given the groups of the batch. Without one, and while the PRM warms up, the policy stays as it
        is; the credit is calibrated all the same. others: groups that the PRM alone trains on. groups: those of the
        batch, of which tokens.jsonl gets a few.
        """
        config, phases, warmup = self.config, self.phases, self.config.prm.warmup_steps
        scored = stream.finish(others)
        self._note_prm(step, scored, batch)
        if batch is None:
            return _lost({"PRM": scored.updates})
        ref_logprob, prm_logprob = scored.ref_logprob, scored.logprob
        if self.prm is not None and config.prime.update == "before":
            with phases("prm"):
                prm_logprob = stream.rescore()
        if prm_logprob is not None and not torch.isfinite(prm_logprob - ref_logprob[1.0]).all():
            return "log-probs of the PRM or its reference are not finite, so there are no advantages"
        with phases("advantage"):
            base = None if prm_logprob is None else ref_logprob[1.0]
            if base is not None and config.prime.rebase:
                base = batch.engine_logprob.to(self.device)
            fit = self.credit.fit  # of the steps before
            advantage, told = self.credit.advantage(batch, prm_logprob, base, self.device)
            if groups and distributed.rank() == 0:
                ratio = None if prm_logprob is None else prm_logprob - base
                kept = token_log.records(step, groups, batch, advantage, ratio, self.credit, fit, self.inputs.tokenizer)
                write_tokens(config.run_dir, kept)
        self.record |= told
        if step <= warmup:
            return _lost({"PRM": scored.updates})
        shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        budget, attention = config.engine.micro_tokens, self.policy.attention
        work = {"attention": attention, "sequence_parallel": config.engine.sequence_parallel}
        epochs = [
            passes.split(batch, config.policy.mini_batch, budget, shuffle, **work) for _ in range(config.policy.epochs)
        ]
        efficiency = passes.efficiency(batch, epochs[0], attention)
        self.record |= {"rows": len(batch.responses), "packing_efficiency": efficiency}
        temperature = config.rollout.temperature
        with phases("old_logprobs"):
            old_logprob, own_first = self._old_logprob(batch, epochs, ref_logprob)
        with phases("policy"):
            lr = learning_rate(config.policy, step - warmup, config.steps - warmup)
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
        self._note("policy", result.updates, lr)
        self.record |= {
            "entropy": result.entropy,
            "clip_fraction": result.clip_fraction,
            "approx_kl": result.approx_kl,
            "reference_kl": result.reference_kl,
        } | result.mismatch
        if step == warmup + 1 and result.updates.applied and result.updates.grad_norm > 0:
            preflight.check_every_parameter_trains(self.policy, "policy")
        return _lost({"PRM": scored.updates, "policy": result.updates})

    def _note(self, name: str, updates: passes.Updates, lr: float) -> None:
        """Write down what became of a model's mini-batches; its weights are others now if any was applied."""
        if updates.applied:
            self.rollout.version += name == "policy" and name not in self.moved
            self.moved.add(name)
            self.counts["updates"] += updates.applied if name == "policy" else 0
        self.record |= {
            f"{name}_loss": updates.loss,
            f"{name}_grad_norm": updates.grad_norm,
            f"{name}_lr": lr,
            f"{name}_updates": updates.made,
            f"{name}_applied": updates.applied,
        }

    def _count(self, empty: bool, skip_reason: str | None) -> None:
        failed = skip_reason is not None and not empty
        self.counts["empty_in_a_row"] = self.counts["empty_in_a_row"] + 1 if empty else 0
        self.counts["failed_in_a_row"] = self.counts["failed_in_a_row"] + 1 if failed else 0
        self.counts["skipped"] += skip_reason is not None
        self.record |= {"skipped": self.counts["skipped"]} | ({"skip_reason": skip_reason} if skip_reason else {})

    def _watch(self) -> None:
        """Tell what goes wrong from this step on, or no more. Rank 0 looks, for all."""
        for change in self.watch.look(self.record) if distributed.rank() == 0 else []:
            say(change.told)

    def _stopped_by(self, step: int) -> str | None:
        """The watcher that ends the run because it began in this step, if one does; rank 0 decides for all."""
        stop = self.config.watch.stop
        if not stop:
            return None
        began = (name for name, since in self.watch.on.items() if since == step and name in stop)
        return distributed.gather_lists([next(began, None)])[0]

    def _ending(self) -> str | None:
        """Why the run ends before its last step: what it learns from has come to an end.

        Raises Stop if it never had any.
        """
        patience, keep = self.config.rollout.patience, list(self.config.rollout.keep)
        if not 0 < patience <= self.counts["empty_in_a_row"]:
            return None
        nothing = (
            f"no group of the last {patience} steps has a mean outcome within rollout.keep={keep}; their mean outcome "
            f"is {self.record['outcome']:.2f}"
        )
        if not self.counts["updates"]:
            raise distributed.Stop(
                f"{nothing} and the policy was not trained yet: look at samples.jsonl in run_dir whether "
                "reward.function is right; else give easier or harder rows, a wider rollout.keep, or "
                "rollout.patience=0 to go on"
            )
        return f"finished early: {nothing}. Harder rows (--resume --accept data) teach more; rollout.patience=0 waits"

    def _begins(self, phase: str) -> None:
        """Every phase begins here, on every rank at the same point: where the run is asked to leave, it stops.

        At once as long as the last whole step is what can be saved; else the step is made to its end, or what of it was
        trained is kept if time is up before the policy's turn.
        """
        step = self.record.get("step", 0)
        at(step, phase)
        if phase == "checkpoint":
            return
        urgency = interrupt.agreed()
        if self.stream and self.stream.moved:
            self.moved.add("prm")
        can_go_back = self.whole or not self.moved
        if urgency and (can_go_back or (urgency == interrupt.NOW and "policy" not in self.moved)):
            raise interrupt.Preempted(f"asked to leave in step {step}, phase {phase}")

    def _save_what_was_trained(self, log: MetricsLog | None, step: int, before: dict[str, Any]) -> None:
        """Leave a checkpoint; of this step if a weight has moved in it, else of the one before, to be made anew.

        A whole step is written down once it is evaluated, after --resume.
        """
        if self.whole:
            self.save(step, self.record)
            self._finish_saving()
            return
        if self.moved:
            self._write(log, {"skipped": self.counts["skipped"]} | self.record)
        else:
            self.collector.load_state_dict(before["collector"])
            self.credit.load_state_dict(before["credit"])
            self.watch.load_state_dict(before["watch"])
            self.counts = before["counts"]
        done = step if self.moved else step - 1
        self._finish_saving()
        newest = checkpoint.latest(Path(self.config.run_dir))
        if done and (newest is None or newest.name != f"step-{done:06d}"):
            self.save(done)
            self._finish_saving()

    def save(self, step: int, unwritten: dict[str, Any] | None = None) -> None:
        """Begin to write a checkpoint, which `_finish_saving` waits for."""
        state = self._state()
        if unwritten is not None:
            state["unwritten"] = json.dumps(unwritten)
        with self.phases("checkpoint"):
            score = self.record.get("eval_accuracy")
            self.checkpoints.save(step, self._trained(), self.inputs.tokenizer, state, score)

    def _finish_saving(self) -> None:
        with self.phases("checkpoint"):
            self.checkpoints.finish()

    def restore(self, directory: Path, renewed: Collection[str] = ()) -> int:
        """Continue from a checkpoint; returns the step to do next. renewed: what is other than it was (`identity`)."""
        self.rollout.sleep()  # loading needs the most memory of all
        state = checkpoint.load(directory, self._trained())
        self.collector.load_state_dict(state["collector"], renewed)
        if "credit" in state:  # checkpoints of before it have none
            self.credit.load_state_dict(state["credit"])
        if "watch" in state and not {"data", "reward"} & set(renewed):  # other rows have other lengths and outcomes
            self.watch.load_state_dict(state["watch"])
        self.counts = state["counts"]
        self.unwritten = json.loads(state["unwritten"]) if "unwritten" in state else None
        if {"data", "reward"} & set(renewed):
            self.counts["empty_in_a_row"] = 0
        self._park()
        self.rollout.wake(changed=True)
        return state["step"] + 1

    def close(self) -> None:
        with self.phases("checkpoint"):
            self.checkpoints.close()
        self.rollout.close()
        self.collector.close()
        self.pool.close()

    def kill(self) -> None:
        """From any thread: this process ends at once, and the reward's workers with it. So must the engine."""
        self.rollout.kill()

    def _engine(self, role: str, optimizer: PolicyConfig | PrmConfig | None) -> Engine:
        config, adapter = self.config, optimizer and optimizer.lora
        path, model = config.paths[role], self.plan.model(role)
        return Engine(role, path, model, config.engine, optimizer, self.device, adapter, config.seed)

    def _park(self) -> None:
        """Before the rollout engine wakes on the same GPU: the optimizers' states make room for it."""
        if self.plan.parks:
            with self.phases("park"):
                for engine in self._trained().values():
                    engine.park()

    def _unpark(self) -> None:
        if self.plan.parks:
            with self.phases("unpark"):
                for engine in self._trained().values():
                    engine.unpark()

    def _trained(self) -> dict[str, Engine]:
        engines = {"policy": self.policy, "prm": self.prm}
        return {name: engine for name, engine in engines.items() if engine is not None and engine.trains}

    def _state(self) -> dict[str, Any]:
        loop = {"collector": self.collector.state_dict(), "counts": dict(self.counts)}
        loop |= {"credit": self.credit.state_dict(), "watch": self.watch.state_dict()}
        return loop | {"identity": self.inputs.identity}

    def _stream(self, step: int, groups: int, waves: bool = False) -> Stream:
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

    def _given(self, step: int, groups: list[Group]) -> Stream:
        """A stream whose groups have all come: a mini-batch is packed at a time."""
        stream = self._stream(step, len(groups))
        for group in groups:
            stream.put(group)
        return stream

    def _for_the_prm_alone(self, groups: list[Group], fresh: list[Group]) -> list[Group]:
        """Of the groups that a step has looked at those which rollout.keep drops, if prm.rows asks for them; never one
        that rollout.filter_truncated does."""
        if self.config.prm.rows == "kept":
            return []
        train = {group.id for group in (*groups, *self.collector.surplus)}
        strict = self.config.rollout.filter_truncated
        whole = (group for group in fresh if not (strict and any(sample.truncated for sample in group.samples)))
        return [group for group in whole if group.id not in train]

    def _note_prm(self, step: int, scored: Scored, batch: Batch | None) -> None:
        if scored.updates is not None:
            self._note("prm", scored.updates, learning_rate(self.config.prm, step, self.config.steps))
        if scored.score is not None and torch.isfinite(scored.score).all():
            outcome, score = batch.outcome, scored.score.cpu()
            correct, pairs = prime.pair_accuracy(score, outcome, batch.group)
            self.record["prm_accuracy"] = float(((score > 0) == (outcome > 0.5)).float().mean())
            self.record["prm_pair_accuracy"] = correct / pairs if pairs else None
            if self.step_labels:
                ratio = (scored.logprob - scored.ref_logprob[1.0]).cpu()
                auc = step_labels.step_auc(self.step_labels, self.inputs.tokenizer, batch, ratio)
                self.record["prm_step_auc"] = auc

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

    def _throughput(self, batch: Batch) -> dict[str, float]:
        """Trained tokens a second over the whole step so far, prompts included, and the peak memory of any rank."""
        seconds = time.perf_counter() - self.last_write
        return {"tokens_per_second": sum(batch.lengths) / seconds, "peak_memory_gib": distributed.max_(peak_gib())}

    def _evaluate(self, step: int) -> dict[str, float]:
        """Greedy, on the held-out rows; rank 0 keeps the responses in run_dir/eval."""
        outputs = Path(self.config.run_dir) / "eval" / f"step-{step:06d}.jsonl"
        quiet = Phases()  # rollouts that count as the evaluation
        quiet.begins = lambda _: self._begins("eval")
        with self.phases("eval"):
            groups = self.collector.greedy(self.inputs.eval, quiet)
            here = outputs if distributed.rank() == 0 else None
            return evaluate.during_training(self.inputs.eval, groups, self.inputs.tokenizer, here)

    def _sample(self, step: int, group: Group) -> dict[str, Any]:
        decode = self.inputs.tokenizer.decode
        sample = group.samples[0]
        return {
            "step": step,
            "row": group.row,
            "prompt": decode(list(group.prompt)),
            "response": decode(sample.tokens),
            "outcome": group.outcomes[0],
            "truncated": sample.truncated,
        }

    def _write(self, log: MetricsLog | None, record: dict[str, Any]) -> None:
        """Log the record with the seconds since the last one; a checkpoint counts in the step after it."""
        now = time.perf_counter()
        record |= self.phases.seconds() | {"seconds": now - self.last_write}
        record |= measured.beside(self.phases.memory(), self.planned_memory)
        self.last_write = now
        self.phases.reset()
        if log is not None:
            log.write(record)
            log.progress(record)


def _lost(made: dict[str, passes.Updates | None]) -> str | None:
    lost = [name for name, updates in made.items() if updates and not updates.applied]
    return f"no mini-batch of the {' and '.join(lost)} has a finite loss and gradient" if lost else None
