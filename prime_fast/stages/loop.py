"""What the stages share that train one model on a file of rows: steps, evaluations, checkpoints, resuming, leaving."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prime_fast.config import Config, OptimizerConfig
from prime_fast.data.rows import PromptSampler
from prime_fast.engine import checkpoint, distributed, interrupt, packing
from prime_fast.engine.writing import Checkpoints, export
from prime_fast.engine.zero import Engine
from prime_fast.identity import Identity
from prime_fast.metrics import MetricsLog, peak_gib
from prime_fast.progress import at
from prime_fast.schedule import learning_rate
from prime_fast.trainer import MAX_FAILED


class Work(NamedTuple):
    """What the gradient of a step was made of."""

    tokens: int  # fed
    metrics: dict[str, float]  # loss, ...


class Loop:
    """RUN_DIR/model gets the last weights, checkpoints/best the ones with the lowest validation loss."""

    stage: str  # the command, whose checkpoints they are
    role: str  # of the model in them
    remedy: str  # against a loss that is not finite

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        identity: Identity,
        engine: Engine,
        section: OptimizerConfig,
        sampler: PromptSampler,
        steps: int,
        evaluates: bool,
    ) -> None:
        self.config, self.tokenizer, self.identity = config, tokenizer, identity
        self.engine, self.section, self.sampler, self.steps = engine, section, sampler, steps
        self.evaluates = evaluates and config.log.eval_every > 0
        self.checkpoints = Checkpoints(Path(config.run_dir), config.log.keep)
        self.counts = {"skipped": 0, "failed_in_a_row": 0}
        self.saved = 0  # the last step of which there is a checkpoint
        self.unwritten: dict[str, Any] | None = None  # as in the trainer: of a step that is to be evaluated yet

    def accumulate(self) -> Work:
        """The forwards and backwards of the next rows."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """eval_loss, and what else the held-out rows tell."""
        raise NotImplementedError

    def run(self, log: MetricsLog | None, first_step: int = 1) -> None:
        """Train to the last step. `log` is given on rank 0. Raises Stop, after a checkpoint, where updates fail."""
        every = self.config.log
        if first_step == 1 and self.evaluates:
            at(0, "eval")
            self._write(log, {"step": 0} | self.evaluate())
        for step in range(first_step - (self.unwritten is not None), self.steps + 1):
            self.checkpoints.poll()
            if self.unwritten is None:
                self._leave_if_asked(step - 1)
                at(step, "train")
                record = self.step(step)
            else:
                record, self.unwritten = self.unwritten, None
            last = step == self.steps
            if self.evaluates and (step % every.eval_every == 0 or last):
                self._leave_if_asked(step, record)
                at(step, "eval")
                record |= self.evaluate()
            self._write(log, record)
            stops = self.counts["failed_in_a_row"] >= MAX_FAILED
            if last or stops or (every.checkpoint_every and step % every.checkpoint_every == 0):
                self.save(step, record.get("eval_loss"))
            if stops:
                self.checkpoints.finish()
                raise distributed.Stop(
                    f"{MAX_FAILED} steps in a row were skipped: the loss or its gradient is not finite; {self.remedy}"
                )
        self.checkpoints.finish()
        export(self.engine, self.tokenizer, self.directory)

    @property
    def directory(self) -> Path:
        """Where the trained model goes, for from_pretrained."""
        return Path(self.config.run_dir) / "model"

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        started = time.perf_counter()
        work = self.accumulate()
        lr = learning_rate(self.section, step, self.steps)
        result = self.engine.step(lr)
        self.counts["skipped"] += not result.applied
        self.counts["failed_in_a_row"] = 0 if result.applied else self.counts["failed_in_a_row"] + 1
        seconds = time.perf_counter() - started
        record = {"step": step} | work.metrics | {"grad_norm": result.grad_norm, "lr": lr}
        record |= {"tokens_per_second": work.tokens / seconds, "peak_memory_gib": distributed.max_(peak_gib())}
        return record | {"seconds": seconds, "skipped": self.counts["skipped"]}

    def _leave_if_asked(self, done: int, unwritten: dict[str, Any] | None = None) -> None:
        """With a checkpoint of step `done`. unwritten: its record, if it is to be evaluated yet."""
        if not interrupt.agreed():
            return
        if done > self.saved:
            self.save(done, unwritten=unwritten)
        self.checkpoints.finish()
        raise interrupt.Preempted(f"asked to leave after step {done}")

    def save(self, step: int, eval_loss: float | None = None, unwritten: dict[str, Any] | None = None) -> None:
        """Begin to write a checkpoint. eval_loss: of these very weights."""
        at(step, "checkpoint")
        state = {"stage": self.stage, "sampler": self.sampler.state_dict(), "counts": dict(self.counts)}
        state |= {"identity": self.identity}
        if unwritten is not None:
            state["unwritten"] = json.dumps(unwritten)
        score = None if eval_loss is None else -eval_loss
        self.checkpoints.save(step, {self.role: self.engine}, self.tokenizer, state, score)
        self.saved = step

    def restore(self, directory: Path, renewed: Collection[str] = ()) -> int:
        """Continue from a checkpoint; returns the step to do next. renewed: what is other than it was (`identity`)."""
        state = checkpoint.load(directory, {self.role: self.engine}, self.stage)
        self.sampler.load_state_dict(state["sampler"], "data" in renewed)
        self.counts, self.saved = state["counts"], state["step"]
        self.unwritten = json.loads(state["unwritten"]) if "unwritten" in state else None
        return state["step"] + 1

    def close(self) -> None:
        self.checkpoints.close()

    def kill(self) -> None:
        """Nothing runs elsewhere."""

    def _write(self, log: MetricsLog | None, record: dict[str, Any]) -> None:
        if log is not None:
            log.write(record)
            log.progress(record)


def packs(engine: Engine, lengths: Sequence[int], micro_tokens: int) -> list[list[list[int]]]:
    """All of these rows as micro-batches of every rank; lengths: tokens fed of each."""
    ranks, size = distributed.world_size(), engine.sequence_group.size
    return packing.plan(lengths, micro_tokens, ranks, engine.attention, size)
