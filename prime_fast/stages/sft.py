"""Supervised warm start: worked solutions, packed, through the same engine and LM-head op as RL."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prime_kernels
from prime_fast import identity
from prime_fast.config import Config
from prime_fast.data.models import load_tokenizer
from prime_fast.data.rows import PromptSampler, Rows, load_demonstrations
from prime_fast.engine import checkpoint, distributed, interrupt, packing, ulysses
from prime_fast.engine.packing import Pack
from prime_fast.engine.writing import Checkpoints, export
from prime_fast.engine.zero import Engine
from prime_fast.identity import Identity
from prime_fast.memory import measured
from prime_fast.memory.plan import alone
from prime_fast.metrics import MetricsLog, peak_gib
from prime_fast.preflight import sample_evenly
from prime_fast.progress import at, progress
from prime_fast.schedule import learning_rate
from prime_fast.trainer import MAX_FAILED

STAGE = "sft"  # whose checkpoints they are


@dataclass(frozen=True)
class Inputs:
    tokenizer: Any
    rows: Rows
    held_out: list[dict]
    identity: Identity


def load_inputs(config: Config) -> Inputs:
    """Tokenizer and rows. Raises ValueError in one sentence."""
    ulysses.check(config, distributed.world_size())
    tokenizer = load_tokenizer(config.model.policy)
    options = {
        "max_tokens": config.data.max_prompt + config.rollout.max_response,
        "response": config.sft.response,
        "drop": config.data.drop,
        "template": config.data.template,
        "template_args": config.data.template_args,
    }
    rows = load_demonstrations(config.sft.data, tokenizer, **options)
    files = [load_demonstrations(path, tokenizer, **options) for path in config.sft.eval]
    parts = sample_evenly(files, config.data.eval_rows)
    if distributed.rank() == 0:
        print(f"sft: {rows}")
        for all_rows, part in zip(files, parts, strict=True):
            print(f"eval: {len(part)} of {all_rows}" + ", a fixed random sample" * (len(part) < len(all_rows)))
    held_out = sum(parts, [])
    return Inputs(tokenizer, rows, held_out, identity.of_sft(config, tokenizer, rows, held_out))


class Sft:
    """Trains a policy on demonstrations; RUN_DIR/model gets the last weights, checkpoints/best the ones with the lowest
    validation loss."""

    def __init__(self, config: Config, device: torch.device, inputs: Inputs) -> None:
        self.config, self.inputs = config, inputs
        self.sampler = PromptSampler(len(inputs.rows), config.seed)
        model = measured.plan(alone(config), device).model("policy")
        self.engine = Engine(STAGE, config.model.policy, model, config.engine, config.sft, device)
        self.checkpoints = Checkpoints(Path(config.run_dir), config.log.keep)
        self.counts = {"skipped": 0, "failed_in_a_row": 0}
        self.saved = 0  # the last step of which there is a checkpoint
        self.unwritten: dict[str, Any] | None = None  # as in the trainer: of a step that is to be evaluated yet

    def run(self, log: MetricsLog | None, first_step: int = 1) -> None:
        """Train to config.sft.steps. `log` is given on rank 0. Raises Stop, after a checkpoint, where updates fail."""
        section, every = self.config.sft, self.config.log
        evaluates = bool(self.inputs.held_out) and every.eval_every > 0
        if first_step == 1 and evaluates:
            at(0, "eval")
            self._write(log, {"step": 0, "eval_loss": self.validation_loss()})
        for step in range(first_step - (self.unwritten is not None), section.steps + 1):
            self.checkpoints.poll()
            if self.unwritten is None:
                self._leave_if_asked(step - 1)
                at(step, "train")
                record = self.step(step)
            else:
                record, self.unwritten = self.unwritten, None
            last = step == section.steps
            if evaluates and (step % every.eval_every == 0 or last):
                self._leave_if_asked(step, record)
                at(step, "eval")
                record["eval_loss"] = self.validation_loss()
            self._write(log, record)
            stops = self.counts["failed_in_a_row"] >= MAX_FAILED
            if last or stops or (every.checkpoint_every and step % every.checkpoint_every == 0):
                self.save(step, record.get("eval_loss"))
            if stops:
                self.checkpoints.finish()
                raise distributed.Stop(
                    f"{MAX_FAILED} steps in a row were skipped: the loss or its gradient is not finite; "
                    "lower sft.lr or check sft.data"
                )
        self.checkpoints.finish()
        export(self.engine, self.inputs.tokenizer, self.directory)

    @property
    def directory(self) -> Path:
        """Where the trained model goes, for from_pretrained."""
        return Path(self.config.run_dir) / "model"

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        section, started = self.config.sft, time.perf_counter()
        prompts, responses = _tensors([self.inputs.rows[i] for i in self.sampler.take(section.mini_batch)])
        loss = accumulate_nll(self.engine, prompts, responses, self.config.engine.micro_tokens)
        lr = learning_rate(section, step, section.steps)
        result = self.engine.step(lr)
        self.counts["skipped"] += not result.applied
        self.counts["failed_in_a_row"] = 0 if result.applied else self.counts["failed_in_a_row"] + 1
        seconds = time.perf_counter() - started
        tokens = sum(map(len, prompts)) + sum(map(len, responses))
        record = {"step": step, "loss": loss, "grad_norm": result.grad_norm, "lr": lr}
        record |= {"tokens_per_second": tokens / seconds, "peak_memory_gib": distributed.max_(peak_gib())}
        return record | {"seconds": seconds, "skipped": self.counts["skipped"]}

    def validation_loss(self) -> float:
        """Mean negative log-likelihood of the held-out responses, nats per token."""
        return response_nll(self.engine, *_tensors(self.inputs.held_out), self.config.engine.micro_tokens)

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
        state = {"stage": STAGE, "sampler": self.sampler.state_dict(), "counts": dict(self.counts)}
        state |= {"identity": self.inputs.identity}
        if unwritten is not None:
            state["unwritten"] = json.dumps(unwritten)
        score = None if eval_loss is None else -eval_loss
        self.checkpoints.save(step, {"policy": self.engine}, self.inputs.tokenizer, state, score)
        self.saved = step

    def restore(self, directory: Path, renewed: Collection[str] = ()) -> int:
        """Continue from a checkpoint; returns the step to do next. renewed: what is other than it was (`identity`)."""
        state = checkpoint.load(directory, {"policy": self.engine}, STAGE)
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


def accumulate_nll(engine: Engine, prompts: Sequence[Tensor], responses: Sequence[Tensor], micro_tokens: int) -> float:
    """Backward of the mean negative log-likelihood (nats per response token) over all ranks' rows; returns it."""
    total = sum(map(len, responses))
    weight = torch.full((total,), distributed.world_size() / total, device=engine.device)
    nll = torch.zeros((), device=engine.device)
    for pack in _packs("training", engine, prompts, responses, micro_tokens):
        token_weight = pack.select(weight)
        # cross-entropy is the on-policy loss with advantage 1: the same gradient, three GEMMs instead of four
        op = partial(_nll, targets=pack.targets, token_weight=token_weight)
        result = engine.run(pack, op)
        engine.backward(result.loss)
        nll -= (token_weight * result.logprob).sum()
    return float(distributed.sum_(nll)) / distributed.world_size()


@torch.no_grad()
def response_nll(engine: Engine, prompts: Sequence[Tensor], responses: Sequence[Tensor], micro_tokens: int) -> float:
    """The same mean, without a gradient; summed in float64, for there may be many rows."""
    nll = torch.zeros((), dtype=torch.float64, device=engine.device)
    for pack in _packs("evaluating", engine, prompts, responses, micro_tokens):
        op = partial(_logprob, targets=pack.targets)
        nll -= engine.run(pack, op)[: pack.answers].double().sum()
    return float(distributed.sum_(nll)) / sum(map(len, responses))


def _packs(
    what: str, engine: Engine, prompts: Sequence[Tensor], responses: Sequence[Tensor], micro_tokens: int
) -> Iterator[Pack]:
    """This rank's share of all ranks' rows."""
    offsets = [0, *accumulate(map(len, responses))]
    lengths = [len(prompt) + len(response) - 1 for prompt, response in zip(prompts, responses, strict=True)]
    group = engine.sequence_group
    micros = packing.plan(lengths, micro_tokens, distributed.world_size(), engine.attention, group.size)
    with progress(what, len(micros), "micro-batches") as tick:
        for rows in micros:
            yield group.pack(rows, prompts, responses, offsets).to(engine.device)
            tick()


def _tensors(rows: Sequence[dict]) -> tuple[list[Tensor], list[Tensor]]:
    """Prompts and responses."""
    return [torch.tensor(row["prompt_ids"]) for row in rows], [torch.tensor(row["response_ids"]) for row in rows]


def _nll(hidden, weight, bias, *, targets, token_weight):
    ones = torch.ones_like(token_weight)
    return prime_kernels.linear_policy_loss(hidden, weight, targets, None, ones, token_weight, bias=bias)


def _logprob(hidden, weight, bias, *, targets):
    return prime_kernels.linear_logprob(hidden, weight, targets, bias=bias)
