"""Supervised warm start: worked solutions, packed, through the same engine and LM-head op as RL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import prime_kernels
from prime_fast import identity
from prime_fast.config import Config
from prime_fast.data.models import load_tokenizer
from prime_fast.data.rows import PromptSampler, Rows, load_demonstrations
from prime_fast.engine import distributed, ulysses
from prime_fast.engine.packing import Pack
from prime_fast.engine.zero import Engine
from prime_fast.identity import Identity
from prime_fast.memory import measured
from prime_fast.memory.plan import alone
from prime_fast.preflight import sample_evenly
from prime_fast.progress import progress
from prime_fast.stages.loop import Loop, Work, packs

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


class Sft(Loop):
    """Trains a policy on demonstrations."""

    stage, role, remedy = STAGE, "policy", "lower sft.lr or check sft.data"

    def __init__(self, config: Config, device: torch.device, inputs: Inputs) -> None:
        self.rows, self.held_out = inputs.rows, inputs.held_out
        model = measured.plan(alone(config), device).model("policy")
        engine = Engine(STAGE, config.model.policy, model, config.engine, config.sft, device)
        sampler = PromptSampler(len(inputs.rows), config.seed)
        steps, evaluates = config.sft.steps, bool(inputs.held_out)
        super().__init__(config, inputs.tokenizer, inputs.identity, engine, config.sft, sampler, steps, evaluates)

    def accumulate(self) -> Work:
        prompts, responses = _tensors([self.rows[i] for i in self.sampler.take(self.section.mini_batch)])
        loss = accumulate_nll(self.engine, prompts, responses, self.config.engine.micro_tokens)
        return Work(sum(map(len, prompts)) + sum(map(len, responses)), {"loss": loss})

    def evaluate(self) -> dict[str, float]:
        """Mean negative log-likelihood of the held-out responses, nats per token."""
        loss = response_nll(self.engine, *_tensors(self.held_out), self.config.engine.micro_tokens)
        return {"eval_loss": loss}


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
    group, micros = engine.sequence_group, packs(engine, lengths, micro_tokens)
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
