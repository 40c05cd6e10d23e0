"""An implicit PRM from labelled responses, through the same engine, packs and LM-head ops as the online one.

arXiv 2412.01981: log-ratios of PRM to reference, summed over a response, are trained to tell good responses from bad
ones; what they then say of each token is a process reward that nobody labelled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import prime_kernels
from prime_fast import durable, identity, passes, prime
from prime_fast.config import Config
from prime_fast.data.labelled import Labelled, Reading, load_labelled
from prime_fast.data.models import load_tokenizer
from prime_fast.data.rows import PromptSampler
from prime_fast.engine import distributed, ulysses
from prime_fast.engine.batch import Batch
from prime_fast.engine.packing import Pack
from prime_fast.engine.zero import Engine
from prime_fast.evaluation import discrimination
from prime_fast.identity import Identity
from prime_fast.memory import measured
from prime_fast.memory.plan import alone
from prime_fast.metrics import MetricsLog
from prime_fast.progress import at, progress
from prime_fast.stages import card
from prime_fast.stages.loop import Loop, Work, packs
from prime_fast.stages.reference import batch_of, reference_logprobs

STAGE = "prm"  # whose checkpoints they are


@dataclass(frozen=True)
class Inputs:
    tokenizer: Any
    start: str  # what the PRM begins as
    reference: str
    rows: Labelled
    held_out: Labelled | None
    identity: Identity


def load_inputs(config: Config) -> Inputs:
    """Tokenizer and rows. Raises ValueError in one sentence."""
    ulysses.check(config, distributed.world_size())
    model = config.model
    start, reference = model.prm or model.policy, model.reference or model.policy
    tokenizer = load_tokenizer(start)
    if load_tokenizer(reference).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"the tokenizer of the reference {reference} differs from that of the PRM {start}; share one")
    if not isinstance(config.prime.separators, str):
        raise ValueError("prime.separators is a list of ids, and texts are cut at a regular expression; give one")
    options = {
        "max_tokens": config.data.max_prompt + config.rollout.max_response,
        "reading": Reading(separators=config.prime.separators),
        "drop": config.data.drop,
        "template": config.data.template,
        "template_args": config.data.template_args,
    }
    rows = load_labelled(config.offline.data, tokenizer, **options)
    held_out = load_labelled(config.offline.eval, tokenizer, **options) if config.offline.eval else None
    chosen = None if held_out is None else held_out.sample(config.data.eval_rows)
    for key, part in (("data", rows), ("eval", chosen)):
        if part is not None and config.prm.loss == "dpo" and not len(_mixed(part)):
            raise ValueError(
                f"offline.{key} has no prompt with a better and a worse response, which prm.loss=dpo compares; give "
                "several responses a prompt, or set prm.loss=response"
            )
    if distributed.rank() == 0:
        print(f"prm: {rows.rows}")
        if chosen is not None:
            taken = f", those to {len(np.unique(chosen.group))} prompts, a fixed random sample"
            print(f"eval: {len(chosen)} of {held_out.rows}" + taken * (len(chosen) < len(held_out)))
    told = [] if chosen is None else [chosen.rows[i] for i in range(len(chosen))]
    known = identity.of_prm(config, tokenizer, start, reference, rows.rows, told)
    return Inputs(tokenizer, start, reference, rows, chosen, known)


class Prm(Loop):
    """Trains a PRM on labelled responses; RUN_DIR/report tells how well it judges the held-out ones."""

    stage, role, remedy = STAGE, "prm", "lower prm.lr or check offline.data"

    def __init__(self, config: Config, device: torch.device, inputs: Inputs) -> None:
        self.inputs, self.loss, self.beta = inputs, config.prm.loss, config.prime.beta
        self.rows, self.held_out = inputs.rows, inputs.held_out
        parts = [self.rows] + ([self.held_out] if self.held_out is not None else [])
        known = inputs.identity["models"]["reference"]
        self.reference = reference_logprobs(config, inputs.reference, known, parts, device)
        self.offsets = [np.cumsum([0, *part.tokens]) for part in parts]
        self.intercepts = [_intercepts(part) if self.loss in ("centered", "prefix") else None for part in parts]
        # the log-odds that scores add to, where they only tell responses apart
        self.offset = 0.0 if self.loss == "response" else discrimination.log_odds(float(self.rows.label.mean()))
        # dpo takes all pairs of a prompt at once, so that every response is read once an epoch
        self.units = _mixed(self.rows) if self.loss == "dpo" else [[i] for i in range(len(self.rows))]
        rows = sum(map(len, self.units))
        self.per_step = max(1, round(config.prm.mini_batch * len(self.units) / rows))
        steps = max(1, round(config.offline.epochs * len(self.units) / self.per_step))
        section, model = config.prm, _model(config, inputs, device)
        engine = Engine(STAGE, inputs.start, model, config.engine, section, device, section.lora, config.seed)
        sampler = PromptSampler(len(self.units), config.seed)
        evaluates = self.held_out is not None
        super().__init__(config, inputs.tokenizer, inputs.identity, engine, config.prm, sampler, steps, evaluates)

    def run(self, log: MetricsLog | None, first_step: int = 1) -> None:
        super().run(log, first_step)
        at(self.steps, "eval")
        judged = None if self.held_out is None else self._judge()[1]
        if distributed.rank() == 0:
            self._report(judged)
        distributed.barrier()

    def accumulate(self) -> Work:
        rows = [row for unit in self.sampler.take(self.per_step) for row in self.units[unit]]
        batch, ref_logprob, intercept = self._batch(0, rows)
        micros = packs(self.engine, batch.lengths, self.config.engine.micro_tokens)
        make = self._pairs if self.loss == "dpo" else self._cross_entropy
        loss = make(batch, ref_logprob, intercept, micros)
        told = {"loss": loss, "outcome": float(batch.outcome.mean())}
        told["response_length"] = len(ref_logprob) / len(rows)
        return Work(sum(batch.lengths), told)

    def evaluate(self) -> dict[str, float]:
        loss, judged = self._judge()
        return {"eval_loss": loss} | discrimination.metrics(judged)

    def _cross_entropy(
        self, batch: Batch, ref_logprob: Tensor, intercept: Tensor | None, micros: passes.MiniBatch
    ) -> float:
        """Backward of the mean loss over the batch's rows, which it returns."""
        ranks = distributed.world_size()
        row_weight = torch.full((len(batch.responses),), ranks / len(batch.responses), device=self.engine.device)
        options = {"beta": self.beta, "row_weight": row_weight, "intercept": intercept}
        outcome, total = batch.outcome.to(self.engine.device), ref_logprob.new_zeros(())
        for pack in self._packs(batch, micros):
            result = passes.train_prm_pack(
                self.engine, pack, ref_logprob, outcome, every_prefix=self.loss == "prefix", **options
            )
            total += result.loss.detach()
        return float(distributed.sum_(total)) / ranks

    def _pairs(self, batch: Batch, ref_logprob: Tensor, _: None, micros: passes.MiniBatch) -> float:
        """Backward of the mean DPO loss over the batch's pairs, which it returns.

        A pair's rows may lie in different packs. So a first forward scores the rows; the loss's derivative in each
        score is then what each token's log-prob weighs in the backward of a second.
        """
        logprob = passes.score(self.engine, batch, [micros])
        cu_seqlens = batch.cu_seqlens.to(logprob.device)
        score = (self.beta * prime.segment_sum((logprob - ref_logprob).double(), cu_seqlens)).requires_grad_()
        loss = prime.pair_loss(score, batch.outcome.to(score), batch.group.to(score.device))
        (gradient,) = torch.autograd.grad(loss, score)
        weight = (self.beta * gradient).float().repeat_interleave(cu_seqlens.diff())
        for pack in self._packs(batch, micros):
            # linear in the log-probs with a gradient of -advantage * token_weight: the on-policy policy loss
            op = partial(_weighed, targets=pack.targets, advantage=pack.select(-weight))
            self.engine.backward(distributed.world_size() * self.engine.run(pack, op))
        return float(loss.detach())

    def _packs(self, batch: Batch, micros: passes.MiniBatch) -> Iterator[Pack]:
        """This rank's share."""
        with progress("training", len(micros), "micro-batches") as tick:
            for micro in micros:
                yield passes.pack_here(batch, micro, self.engine)
                tick()

    def _batch(self, part: int, rows: list[int]) -> tuple[Batch, Tensor, Tensor | None]:
        """Rows of the training (0) or held-out (1) ones; log-probs (T,) of the reference; intercepts (R,)."""
        labelled, offsets, device = (self.rows, self.held_out)[part], self.offsets[part], self.engine.device
        ref = [self.reference[part][offsets[i] : offsets[i + 1]] for i in rows]
        known = self.intercepts[part]
        intercept = None if known is None else known[rows].to(device)
        return batch_of([(labelled, i) for i in rows]), torch.from_numpy(np.concatenate(ref)).to(device), intercept

    def _judge(self) -> tuple[float, dict[str, Any]]:
        """The loss on the held-out rows, and how well their scores judge them."""
        batch, ref_logprob, intercept = self._batch(1, list(range(len(self.held_out))))
        micros = packs(self.engine, batch.lengths, self.config.engine.micro_tokens)
        logprob = passes.score(self.engine, batch, [micros]).cpu().double()
        ref_logprob, cu_seqlens = ref_logprob.cpu().double(), batch.cu_seqlens
        score = self.beta * prime.segment_sum(logprob - ref_logprob, cu_seqlens)
        if self.loss == "dpo":
            loss = prime.pair_loss(score, batch.outcome.double(), batch.group)
        else:
            kind = {"response": "ce"}.get(self.loss, self.loss)
            options = {"beta": self.beta, "kind": kind, "intercept": None if intercept is None else intercept.cpu()}
            loss = prime.prm_loss(logprob, ref_logprob, batch.outcome, cu_seqlens, **options)
        return float(loss), discrimination.judge(score, batch.outcome, batch.group, self.offset)

    def _report(self, judged: dict[str, Any] | None) -> None:
        """The held-out numbers and their picture, and the model's card."""
        report = Path(self.config.run_dir, "report")
        if judged is not None:
            report.mkdir(parents=True, exist_ok=True)
            durable.replace(report / "prm.json", json.dumps(judged, indent=1) + "\n")
            discrimination.draw(judged, "Held-out responses").savefig(report / "calibration.png", dpi=130)
        inputs = self.inputs
        text = card.text(self.config, inputs.start, inputs.reference, str(inputs.rows.rows), self.steps, judged)
        durable.replace(self.directory / "README.md", text)


def _model(config: Config, inputs: Inputs, device: torch.device) -> Any:
    """The settings of the model that trains, with as few layers recomputed as memory allows."""
    trained = config.model.model_copy(update={"policy": inputs.start})
    held = alone(config.model_copy(update={"model": trained}), config.prm.lora)
    return measured.plan(held, device).model("policy")


def _mixed(rows: Labelled) -> list[list[int]]:
    """The rows of each prompt that has responses of different labels."""
    order = np.argsort(rows.group, kind="stable")
    ends = [*accumulate(np.unique(rows.group, return_counts=True)[1].tolist())]
    groups = [order[start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]
    return [group for group in groups if len(set(rows.label[group])) > 1]


def _intercepts(rows: Labelled) -> Tensor:
    """(R,) log-odds of a prompt's mean label, of all rows' where a prompt has one response alone."""
    label, group = torch.from_numpy(rows.label), torch.from_numpy(rows.group)
    lonely = group.bincount()[group] == 1
    return prime.prm_intercept(label, group).masked_fill(lonely, discrimination.log_odds(float(label.mean())))


def _weighed(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, targets: Tensor, advantage: Tensor) -> Tensor:
    ones = torch.ones_like(advantage)
    return prime_kernels.linear_policy_loss(hidden, weight, targets, None, advantage, ones, bias=bias).loss
