"""The PRIME loop: rollouts, outcomes, online PRM, advantages, policy update, weight sync."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prime_kernels
from prime_fast import passes, preflight, prime
from prime_fast.config import Config, OptimizerConfig
from prime_fast.engine import checkpoint, distributed
from prime_fast.engine.batch import Batch, Group
from prime_fast.engine.zero import Engine
from prime_fast.evaluation import evaluate
from prime_fast.memory import measured
from prime_fast.metrics import MetricsLog, Phases, peak_gib, write_samples
from prime_fast.rewards import RewardPool
from prime_fast.rollout import EngineError, make_engine
from prime_fast.rollout.collect import Collector
from prime_fast.rollout.fleet import Fleet

MAX_SKIPPED = 3  # steps in a row without a usable update before the run stops
MAX_REWARD_WORKERS = 16  # on each rank
SAMPLES_PER_STEP = 2  # completions written to samples.jsonl


class Trainer:
    def __init__(self, config: Config, device: torch.device, inputs: preflight.Inputs) -> None:
        self.config, self.device, self.inputs = config, device, inputs
        self.planned_memory = measured.planned(config, device)
        self.policy = self._engine("policy", config.model.policy, config.policy)
        self.prm = self.reference = None
        if config.uses_prm:
            trained = config.prime.update != "none"
            self.prm = self._engine("prm", config.model.prm or config.model.policy, config.prm if trained else None)
        if config.uses_reference:
            self.reference = self._engine("reference", config.model.reference or config.model.policy, None)
        engine = make_engine(config, config.model.policy, inputs.eos_ids, self.policy.dtype, device)
        self.rollout = Fleet(engine, self.policy.weights)
        reward = {"timeout": config.reward.timeout, "sandbox": config.reward.sandbox}
        cores = max(1, os.cpu_count() // distributed.local_world_size())
        self.pool = RewardPool(config.reward.function, min(cores, MAX_REWARD_WORKERS), **reward)
        self.collector = Collector(config.rollout, config.seed, inputs.train, self.rollout, self.pool, inputs.tokenizer)
        self.phases, self.last_write = Phases(), time.perf_counter()
        self.skipped = self.skipped_in_a_row = 0
        self.updated: dict[str, Any] | None = None  # the record of the step, once its update was made

    def run(self, log: MetricsLog | None, first_step: int = 1) -> None:
        """Train to config.steps. `log` is given on rank 0."""
        config, evaluates = self.config, self.inputs.eval is not None and self.config.log.eval_every > 0
        if first_step == 1:
            preflight.self_check(self.policy, self.prm, self.reference, self.rollout, self.inputs, config)
            if evaluates:
                self._write(log, {"step": 0, "rollouts": 0} | self._evaluate(0))
        for step in range(first_step, config.steps + 1):
            before, self.updated = self._state(), None
            last = step == config.steps
            try:
                record = {"step": step} | self.step(step)
                if evaluates and (step % config.log.eval_every == 0 or last):
                    record |= self._evaluate(step)
            except EngineError:
                self._save_what_was_trained(log, step, before)
                raise
            self._write(log, record)
            if step == first_step and log is not None:
                for sentence in measured.beyond(record):
                    print(sentence, flush=True)
            if last or (config.log.checkpoint_every and step % config.log.checkpoint_every == 0):
                self.save(step)

    def step(self, step: int) -> dict[str, Any]:
        """One PRIME step; returns its metrics."""
        config, phases = self.config, self.phases
        prime_kernels.last_used.clear()
        groups, record, fresh = self.collector.collect(phases)
        if distributed.rank() == 0:
            write_samples(Path(config.run_dir), [self._sample(step, group) for group in fresh[:SAMPLES_PER_STEP]])
        record |= {"groups": len(groups), "surplus": len(self.collector.surplus)}
        if not groups:
            return record | self._skip(
                f"no group of this step has a mean outcome within rollout.keep={list(config.rollout.keep)}; "
                "the data is too easy or too hard for the policy, or rollout.max_rounds too small"
            )
        batch = Batch.of(groups, first_fresh=self.collector.drawn - len(fresh))
        shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        policy_minis = passes.split(batch, config.policy.mini_batch, config.engine.micro_tokens, shuffle)
        prm_minis = passes.split(batch, config.prm.mini_batch, config.engine.micro_tokens)
        record |= {"rows": len(batch.responses), "packing_efficiency": passes.efficiency(batch, policy_minis)}
        self.rollout.sleep()

        with phases("reference"):
            ref_logprob = self._reference_logprob(batch, prm_minis)
        with phases("prm"):
            prm_logprob, prm_applied, prm_record = self._prm_logprob(batch, prm_minis, ref_logprob)
        record |= prm_record
        if prm_logprob is not None and not torch.isfinite(prm_logprob).all():
            self.updated = record  # the PRM may have moved
            return record | self._skip("the PRM's log-probs are not finite")
        with phases("advantage"):
            advantage, advantage_record = self._advantage(batch, prm_logprob, ref_logprob)
        record |= advantage_record
        with phases("old_logprobs"):
            old_logprob = self._old_logprob(batch, policy_minis, ref_logprob)
        with phases("policy"):
            result = passes.train_policy(
                self.policy,
                batch,
                policy_minis,
                advantage,
                old_logprob=old_logprob,
                ref_logprob=ref_logprob if config.policy.kl_coef else None,
                importance_cap=0.0 if config.rollout.old_logprobs == "engine" else config.rollout.importance_cap,
                temperature=config.rollout.temperature,
                config=config.policy,
            )
        record |= {
            "policy_loss": result.loss,
            "entropy": result.entropy,
            "clip_fraction": result.clip_fraction,
            "approx_kl": result.approx_kl,
            "policy_grad_norm": result.grad_norm,
        } | result.mismatch
        self.updated = record
        with phases("sync"):
            self.rollout.wake(changed=result.moved)
        self.rollout.settled()
        record |= self._throughput(batch)
        record |= {f"kernel/{op}": backend for op, backend in prime_kernels.last_used.items()}
        if not (result.applied and prm_applied):
            return record | self._skip("a loss or gradient is not finite")
        if step == 1 and result.grad_norm > 0:
            preflight.check_every_parameter_trains(self.policy, "policy")
        self.skipped_in_a_row = 0
        return record | {"skipped": self.skipped}

    def _save_what_was_trained(self, log: MetricsLog | None, step: int, before: dict[str, Any]) -> None:
        """The rollout engines are lost for good: leave a checkpoint, in which groups that were in work start anew."""
        done = step - 1 if self.updated is None else step
        if self.updated is not None:
            self._write(log, {"step": step, "skipped": self.skipped} | self.updated)
        else:
            self.collector.load_state_dict(before["collector"])
            self.skipped, self.skipped_in_a_row = before["skipped"]
        newest = checkpoint.latest(Path(self.config.run_dir))
        if done and (newest is None or newest.name != f"step-{done:06d}"):
            self.save(done)

    def save(self, step: int) -> None:
        with self.phases("checkpoint"):
            checkpoint.save(Path(self.config.run_dir), step, self._trained(), self.inputs.tokenizer, self._state())

    def restore(self, directory: Path) -> int:
        """Continue from a checkpoint; returns the step to do next."""
        self.rollout.sleep()  # loading needs the most memory of all
        state = checkpoint.load(directory, self._trained())
        self.collector.load_state_dict(state["collector"])
        self.skipped, self.skipped_in_a_row = state["skipped"]
        self.rollout.wake(changed=True)
        return state["step"] + 1

    def close(self) -> None:
        self.rollout.close()
        self.collector.close()
        self.pool.close()

    def _engine(self, role: str, path: str, optimizer: OptimizerConfig | None) -> Engine:
        return Engine(role, path, self.config.model, self.config.engine, optimizer, self.device)

    def _trained(self) -> dict[str, Engine]:
        engines = {"policy": self.policy, "prm": self.prm}
        return {name: engine for name, engine in engines.items() if engine is not None and engine.trains}

    def _state(self) -> dict[str, Any]:
        return {"collector": self.collector.state_dict(), "skipped": (self.skipped, self.skipped_in_a_row)}

    def _reference_logprob(self, batch: Batch, minis: list[passes.MiniBatch]) -> Tensor | None:
        """On the PRM's own packs, so that equal weights give log-ratios of exactly 0."""
        if self.reference is not None:
            return passes.score(self.reference, batch, minis)
        if self.prm is not None:
            return passes.score(self.policy, batch, minis)
        return None

    def _prm_logprob(
        self, batch: Batch, minis: list[passes.MiniBatch], ref_logprob: Tensor | None
    ) -> tuple[Tensor | None, bool, dict[str, Any]]:
        """The PRM's log-probs for the advantage, whether its update was applied, and its metrics."""
        if self.prm is None:
            return None, True, {}
        prime_config, record, applied = self.config.prime, {}, True
        if prime_config.update == "none":
            logprob = passes.score(self.prm, batch, minis)
            cu_seqlens = batch.cu_seqlens.to(self.device)
            score = prime_config.beta * prime.segment_sum(logprob - ref_logprob, cu_seqlens)
        else:
            trained = passes.train_prm(
                self.prm, batch, minis, ref_logprob, beta=prime_config.beta, lr=self.config.prm.lr
            )
            logprob, score, applied = trained.logprob, trained.score, trained.applied
            record = {"prm_loss": trained.loss, "prm_grad_norm": trained.grad_norm}
            if prime_config.update == "before":
                logprob = passes.score(self.prm, batch, minis)
        outcome, score = batch.outcome, score.cpu()
        record["prm_accuracy"] = float(((score > 0) == (outcome > 0.5)).float().mean())
        correct, pairs = prime.pair_accuracy(score, outcome, batch.group)
        record["prm_pair_accuracy"] = correct / pairs if pairs else None
        return logprob, applied, record

    def _advantage(
        self, batch: Batch, prm_logprob: Tensor | None, ref_logprob: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        p = self.config.prime
        if prm_logprob is None:
            ref_logprob = None

        def combine(process_weight: float, outcome_weight: float, whiten: bool) -> prime_kernels.Advantage:
            return prime_kernels.prime_advantage(
                prm_logprob,
                ref_logprob,
                batch.outcome.to(self.device),
                batch.cu_seqlens.to(self.device),
                batch.group.to(self.device),
                beta=p.beta,
                gamma=p.gamma[0],
                outcome_gamma=p.gamma[1],
                process_weight=process_weight,
                outcome_weight=outcome_weight,
                estimator=p.estimator,
                form=p.form,
                normalize=p.normalize,
                whiten=whiten,
            )

        result = combine(p.process_weight, p.outcome_weight, p.whiten)
        record = {}
        if self.prm is not None:
            process = combine(p.process_weight, 0.0, False).advantage.square().mean().sqrt()
            outcome = combine(0.0, p.outcome_weight, False).advantage.square().mean().sqrt()
            record = {
                "process_over_outcome": float(process / outcome) if outcome > 0 else None,
                "process_reward_mean": float(result.token_reward.mean()),
                "process_reward_std": float(result.token_reward.std()),
            }
        return result.advantage, record

    def _old_logprob(
        self, batch: Batch, minis: list[passes.MiniBatch], ref_logprob: Tensor | None
    ) -> list[Tensor | None]:
        """For each mini-batch the old policy's log-probs, or None where its own forward is the old policy.

        "engine" needs no correction: the ratio is that of the new policy to the one which sampled, mismatch included.
        """
        config = self.config
        if config.rollout.old_logprobs == "engine":
            return [batch.engine_logprob.to(self.device)] * len(minis)
        own = 1 if config.rollout.old_logprobs == "update" else 0  # mini-batches before the first update
        scored = None
        if self.reference is None and ref_logprob is not None and config.rollout.temperature == 1:
            scored = ref_logprob  # the policy served as the PRM's reference: these are its log-probs
        elif minis[own:]:
            scored = passes.score(self.policy, batch, minis[own:], config.rollout.temperature)
        return [None] * own + [scored] * len(minis[own:])

    def _throughput(self, batch: Batch) -> dict[str, float]:
        """Trained tokens a second over the whole step so far, prompts included, and the peak memory of any rank."""
        seconds = time.perf_counter() - self.last_write
        return {"tokens_per_second": sum(batch.lengths) / seconds, "peak_memory_gib": distributed.max_(peak_gib())}

    def _skip(self, reason: str) -> dict[str, Any]:
        """Count a step whose update was not applied; stop the run when they come one after another."""
        self.rollout.wake(changed=False)
        self.rollout.settled()
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED:
            newest = checkpoint.latest(Path(self.config.run_dir))
            raise ValueError(
                f"{MAX_SKIPPED} steps in a row were skipped: {reason}. Stopped; "
                + (f"the last good checkpoint is {newest}" if newest else "no checkpoint was written yet")
            )
        return {"skipped": self.skipped, "skip_reason": reason}

    def _evaluate(self, step: int) -> dict[str, float]:
        """Greedy, on the held-out rows; rank 0 keeps the responses in run_dir/eval."""
        outputs = Path(self.config.run_dir) / "eval" / f"step-{step:06d}.jsonl"
        with self.phases("eval"):
            groups = self.collector.greedy(self.inputs.eval)
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
