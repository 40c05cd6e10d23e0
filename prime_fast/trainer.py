"""The PRIME loop: rollouts, what a step learns from them (`learner`), weight sync, evaluation, checkpoints, and how it
stops."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

import prime_kernels
from prime_fast import preflight, profile
from prime_fast.config import Config
from prime_fast.engine import checkpoint, distributed, interrupt
from prime_fast.engine.batch import Batch, Group
from prime_fast.engine.writing import Checkpoints
from prime_fast.evaluation import evaluate
from prime_fast.learner import Learner, Work
from prime_fast.memory import measured
from prime_fast.metrics import MetricsLog, Phases, peak_gib, write_samples
from prime_fast.progress import at, progress, say
from prime_fast.rewards import RewardPool
from prime_fast.rollout import make_engine
from prime_fast.rollout.collect import Collector
from prime_fast.rollout.fleet import Fleet
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
        self.watch = Watch(limits_of(config))
        self.learner = Learner(config, self.plan, device, inputs.tokenizer, self.phases)
        policy = self.learner.policy
        engine = make_engine(self.plan.engine_config, config.model.policy, inputs.eos_ids, policy.dtype, device)
        self.rollout = Fleet(engine, policy.weights)
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
        self.work = Work()
        self.unwritten: dict[str, Any] | None = None  # the record of a step that lacks its evaluation, after a resume

    def run(self, log: MetricsLog | None, first_step: int = 1) -> None:
        """Train to config.steps, or until nothing is left to learn. `log` is given on rank 0.

        Whatever stops all ranks, a checkpoint of all that was trained is left.
        """
        config, evaluates = self.config, self.inputs.eval is not None and self.config.log.eval_every > 0
        self.phases.begins = self._begins
        if first_step == 1:
            with progress("self-check", at_once=True):
                models = self.learner.policy, self.learner.prm, self.learner.reference
                preflight.self_check(*models, self.rollout, self.inputs, config)
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
                    self.work, self.unwritten = Work(step, self.unwritten), None
                stopped_by = self._stopped_by(step)
                ending = None if stopped_by else self._ending()
                self.work.whole = True
                last = step == config.steps or ending is not None
                if evaluates and (step % config.log.eval_every == 0 or last):
                    self.work.record |= self._evaluate(step)
            except distributed.Stop:
                self._save_what_was_trained(log, step, before)
                raise
            self._write(log, self.work.record)
            if step == first_step and log is not None:
                for sentence in measured.beyond(self.work.record):
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
        """One PRIME step; returns its metrics, which `work` holds as far as they are known at any moment."""
        config, phases, learner = self.config, self.phases, self.learner
        prime_kernels.last_used.clear()
        self.work = work = Work(step, {"step": step})
        if self.overlaps:
            work.stream = learner.begin_stream(step, config.rollout.prompts, waves=True)
        groups, record, fresh = self.collector.collect(phases, work.stream, last=step == config.steps)
        if distributed.rank() == 0:
            write_samples(Path(config.run_dir), [self._sample(step, group) for group in fresh[:SAMPLES_PER_STEP]])
        work.record |= record | {"groups": len(groups), "surplus": len(self.collector.surplus)}
        nothing = f"no group has a mean outcome within rollout.keep={list(config.rollout.keep)}"
        others, batch = learner.for_the_prm_alone(groups, fresh, self.collector.surplus), None
        empty, failure = not groups and not (others and step <= config.prm.warmup_steps), None
        if groups or others:
            batch = Batch.of(groups, self.rollout.version) if groups else None
            self.rollout.sleep()
            learner.unpark()
            work.stream = work.stream or learner.stream_of(step, groups)
            try:
                failure = learner.learn(work, batch, others, groups)
            finally:  # a Stop of the update's own checks comes after the weights have moved
                if "policy" in work.moved:
                    self.rollout.version += 1
                    self.counts["updates"] += work.record["policy_applied"]
            work.stream = None
            learner.park()
        self._count(empty=empty, skip_reason=nothing if empty else failure)
        with phases("sync"):
            self.rollout.wake(changed="policy" in work.moved)
        self.rollout.settled()
        if batch is not None:
            work.record |= self._throughput(batch)
        work.record |= {f"kernel/{op}": backend for op, backend in prime_kernels.last_used.items()}
        if self.counts["failed_in_a_row"] >= MAX_FAILED:
            raise distributed.Stop(f"{MAX_FAILED} steps in a row were skipped: {failure}")
        return work.record

    def _count(self, empty: bool, skip_reason: str | None) -> None:
        failed = skip_reason is not None and not empty
        self.counts["empty_in_a_row"] = self.counts["empty_in_a_row"] + 1 if empty else 0
        self.counts["failed_in_a_row"] = self.counts["failed_in_a_row"] + 1 if failed else 0
        self.counts["skipped"] += skip_reason is not None
        self.work.record |= {"skipped": self.counts["skipped"]} | ({"skip_reason": skip_reason} if skip_reason else {})

    def _watch(self) -> None:
        """Tell what goes wrong from this step on, or no more. Rank 0 looks, for all."""
        for change in self.watch.look(self.work.record) if distributed.rank() == 0 else []:
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
            f"is {self.work.record['outcome']:.2f}"
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
        work = self.work
        at(work.step, phase)
        if phase == "checkpoint":
            return
        urgency = interrupt.agreed()
        can_go_back = work.whole or not work.moved
        if urgency and (can_go_back or (urgency == interrupt.NOW and "policy" not in work.moved)):
            raise interrupt.Preempted(f"asked to leave in step {work.step}, phase {phase}")

    def _save_what_was_trained(self, log: MetricsLog | None, step: int, before: dict[str, Any]) -> None:
        """Leave a checkpoint; of this step if a weight has moved in it, else of the one before, to be made anew.

        A whole step is written down once it is evaluated, after --resume.
        """
        if self.work.whole:
            self.save(step, self.work.record)
            self._finish_saving()
            return
        moved = self.work.moved
        if moved:
            self._write(log, {"skipped": self.counts["skipped"]} | self.work.record)
        else:
            self.collector.load_state_dict(before["collector"])
            self.learner.credit.load_state_dict(before["credit"])
            self.watch.load_state_dict(before["watch"])
            self.counts = before["counts"]
        done = step if moved else step - 1
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
            score = self.work.record.get("eval_accuracy")
            self.checkpoints.save(step, self.learner.trained, self.inputs.tokenizer, state, score)

    def _finish_saving(self) -> None:
        with self.phases("checkpoint"):
            self.checkpoints.finish()

    def restore(self, directory: Path, renewed: Collection[str] = ()) -> int:
        """Continue from a checkpoint; returns the step to do next. renewed: what is other than it was (`identity`)."""
        self.rollout.sleep()  # loading needs the most memory of all
        state = checkpoint.load(directory, self.learner.trained)
        self.collector.load_state_dict(state["collector"], renewed)
        if "credit" in state:  # checkpoints of before it have none
            self.learner.credit.load_state_dict(state["credit"])
        if "watch" in state and not {"data", "reward"} & set(renewed):  # other rows have other lengths and outcomes
            self.watch.load_state_dict(state["watch"])
        self.counts = state["counts"]
        self.unwritten = json.loads(state["unwritten"]) if "unwritten" in state else None
        if {"data", "reward"} & set(renewed):
            self.counts["empty_in_a_row"] = 0
        self.learner.park()
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

    def _state(self) -> dict[str, Any]:
        loop = {"collector": self.collector.state_dict(), "counts": dict(self.counts)}
        loop |= {"credit": self.learner.credit.state_dict(), "watch": self.watch.state_dict()}
        return loop | {"identity": self.inputs.identity}

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
