"""Supervised warm start: worked solutions, packed, through the same engine and LM-head op as RL."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch

import prime_kernels
from prime_fast.config import Config, OptimizerConfig
from prime_fast.data.models import load_tokenizer
from prime_fast.data.rows import PromptSampler, load_demonstrations
from prime_fast.engine import distributed, packing
from prime_fast.engine.zero import Engine
from prime_fast.metrics import MetricsLog, peak_gib

WARMUP_SHARE = 0.05


def sft(config: Config, device: torch.device, log: MetricsLog | None) -> Path:
    """Train config.sft.steps optimizer steps on the demonstrations; returns the Hugging Face directory written."""
    section = config.sft
    tokenizer = load_tokenizer(config.model.policy)
    rows = load_demonstrations(
        section.data,
        tokenizer,
        max_tokens=config.data.max_prompt + config.rollout.max_response,
        response=section.response,
        drop=config.data.drop,
        template=config.data.template,
        template_args=config.data.template_args,
    )
    if distributed.rank() == 0:
        print(rows)
    optimizer = OptimizerConfig(
        lr=section.lr, weight_decay=config.policy.weight_decay, grad_clip=config.policy.grad_clip
    )
    engine = Engine("sft", config.model.policy, config.model, config.engine, optimizer, device)
    sampler = PromptSampler(len(rows), config.seed)
    warmup = max(1, round(WARMUP_SHARE * section.steps))
    for step in range(1, section.steps + 1):
        started = time.perf_counter()
        demonstrations = [rows[i] for i in sampler.take(section.mini_batch)]
        prompts = [torch.tensor(row["prompt_ids"]) for row in demonstrations]
        responses = [torch.tensor(row["response_ids"]) for row in demonstrations]
        loss = accumulate_nll(engine, prompts, responses, config.engine.micro_tokens)
        result = engine.step(section.lr * min(1.0, step / warmup))
        if not result.applied:
            raise ValueError(f"step {step}: the loss is not finite; lower sft.lr or check sft.data")
        seconds = time.perf_counter() - started
        tokens = sum(map(len, prompts)) + sum(map(len, responses))
        record = {"step": step, "loss": loss, "grad_norm": result.grad_norm, "tokens_per_second": tokens / seconds}
        record |= {"peak_memory_gib": distributed.max_(peak_gib()), "seconds": seconds}
        if log is not None:
            log.write(record)
            log.progress(record)
    directory = Path(config.run_dir) / "model"
    engine.save_hf(directory, tokenizer)
    return directory


def accumulate_nll(
    engine: Engine, prompts: Sequence[torch.Tensor], responses: Sequence[torch.Tensor], micro_tokens: int
) -> float:
    """Backward of the mean negative log-likelihood (nats per response token) over all ranks' rows; returns it."""
    offsets = [0, *accumulate(map(len, responses))]
    lengths = [len(prompt) + len(response) - 1 for prompt, response in zip(prompts, responses, strict=True)]
    weight = torch.full((offsets[-1],), distributed.world_size() / offsets[-1], device=engine.device)
    nll = torch.zeros((), device=engine.device)
    for ranks in packing.plan(lengths, micro_tokens, distributed.world_size()):
        pack = packing.pack(ranks[distributed.rank()], prompts, responses, offsets).to(engine.device)
        token_weight = pack.select(weight)
        # cross-entropy is the on-policy loss with advantage 1: the same gradient, three GEMMs instead of four
        op = partial(_nll, targets=pack.targets, token_weight=token_weight)
        result = engine.run(pack, op)
        engine.backward(result.loss)
        nll -= (token_weight * result.logprob).sum()
    return float(distributed.sum_(nll)) / distributed.world_size()


def _nll(hidden, weight, bias, *, targets, token_weight):
    ones = torch.ones_like(token_weight)
    return prime_kernels.linear_policy_loss(hidden, weight, targets, None, ones, token_weight, bias=bias)
