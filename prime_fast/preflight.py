"""What has to hold before step 1: usable inputs, and a trainer and rollout engine that agree with themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from prime_fast import identity, passes
from prime_fast.config import Config
from prime_fast.data.models import eos_ids, load_tokenizer, model_config, stop_ids
from prime_fast.data.rows import MAX_KINDS, Rows, load_rows
from prime_fast.engine import distributed, packing, ulysses
from prime_fast.engine.batch import Batch, Group
from prime_fast.engine.lora import Trunk
from prime_fast.engine.model import longest_row
from prime_fast.engine.zero import Engine
from prime_fast.identity import Identity
from prime_fast.rewards import RewardPool, row_check
from prime_fast.rewards.trial import try_out
from prime_fast.rollout import Request
from prime_fast.rollout.fleet import Fleet

CHECK_PROMPTS, CHECK_TOKENS = 4, 32  # prompts per rollout engine


@dataclass(frozen=True)
class Inputs:
    tokenizer: Any
    eos_ids: tuple[int, ...]  # what ends a response: rollout.stop too
    train: Rows
    eval: list[dict] | None
    kinds: list[dict] = field(default_factory=list)  # a row of each ability and data_source, of at most MAX_KINDS
    identity: Identity = field(default_factory=dict)  # of `identify`, where it was asked


def load_inputs(config: Config) -> Inputs:
    """Tokenizer and rows, checked against the models' configurations. Raises ValueError in one sentence."""
    model = model_config(config.model.policy)
    room = min(getattr(model, "max_position_embeddings", None) or math.inf, longest_row(model))
    asked = config.data.max_prompt + config.rollout.max_response
    if asked > room:
        raise ValueError(
            f"data.max_prompt + rollout.max_response = {asked} tokens, but {config.model.policy} has room for {room}; "
            "lower one of them"
        )
    if config.rollout.ahead and torch.cuda.is_available() and "gpus" not in config.rollout.vllm:
        raise ValueError(
            f"rollout.ahead={config.rollout.ahead} needs engines that work beside the trainer, and here they share its "
            "GPUs; name GPUs of their own in rollout.vllm.gpus, or set rollout.carry=true instead"
        )
    ulysses.check(config, distributed.world_size())
    tokenizer = load_tokenizer(config.model.policy)
    ends = eos_ids(config.model.policy, tokenizer)
    stops = stop_ids(config.rollout.stop, tokenizer, model.vocab_size)
    for key in ("prm", "reference"):
        path = getattr(config.model, key)
        if path is not None:
            _check_same_vocabulary(tokenizer, model, key, path)
    if not config.data.train:
        raise ValueError("data.train is empty; give the path of a .jsonl or .parquet file of rows")
    options = {
        "max_prompt_tokens": config.data.max_prompt,
        "drop": config.data.drop,
        "template": config.data.template,
        "template_args": config.data.template_args,
        "check": row_check(config.reward.function),
    }
    files = [load_rows(path, tokenizer, **options) for path in config.data.eval]
    train = load_rows(config.data.train, tokenizer, **options)
    parts = sample_evenly(files, config.data.eval_rows)
    if distributed.rank() == 0:
        print(f"train: {train}")
        for rows, part in zip(files, parts, strict=True):
            print(f"eval: {len(part)} of {rows}" + ", a fixed random sample" * (len(part) < len(rows)))
    kinds = {kind: rows[index] for rows in (*reversed(files), train) for kind, index in rows.kinds.items()}
    return Inputs(
        tokenizer,
        (*ends, *stops),
        train,
        sum(parts, []) or None,
        list(kinds.values())[-MAX_KINDS:],
    )


def identify(config: Config, inputs: Inputs) -> Identity:
    """What this run is made with. The reward is asked about made-up responses to a row of each kind first.

    Raises ValueError in one sentence if it cannot score one of them.
    """
    reward = config.reward
    with RewardPool(reward.function, None, reward.timeout, reward.sandbox) as pool:
        for sentence in try_out(pool, inputs.kinds):
            print(sentence, flush=True)
        return identity.of(config, inputs.tokenizer, inputs.train, inputs.eval or [], pool.sources)


def sample_evenly(files: Sequence[Rows], limit: int) -> list[list[dict]]:
    """At most `limit` rows in all, the same number of each file as far as it has them; always the same random ones."""
    counts, left = [0] * len(files), limit
    for done, i in enumerate(sorted(range(len(files)), key=lambda i: len(files[i]))):
        counts[i] = min(len(files[i]), left // (len(files) - done))
        left -= counts[i]
    return [
        [rows[int(i)] for i in sorted(np.random.default_rng(0).choice(len(rows), count, replace=False))]
        for rows, count in zip(files, counts, strict=True)
    ]


def self_check(
    policy: Engine, prm: Engine | None, reference: Engine | Trunk | None, rollout: Fleet, inputs: Inputs, config: Config
) -> None:
    """Sample a few responses of every engine and compare: packed with row by row, engine with trainer, PRM with
    reference.

    Raises ValueError naming what disagrees and by how much. Every rank does the same work.
    """
    temperature = config.rollout.temperature
    rows = [inputs.train[i] for i in range(min(CHECK_PROMPTS * rollout.engines, len(inputs.train)))]
    tokens = min(CHECK_TOKENS, config.rollout.max_response)
    prompts = [tuple(row["prompt_ids"]) for row in rows]
    samples = rollout.generate([Request(i, prompt, [i], tokens, temperature) for i, prompt in enumerate(prompts)])
    batch = Batch.of([Group(i, i, prompt, tuple(samples[i]), (0.0,)) for i, prompt in enumerate(prompts)])
    size, groups = policy.sequence_group.size, policy.sequence_group.count
    micros = packing.plan(batch.lengths, config.engine.micro_tokens, size, sequence_parallel=size)
    together = [[share * groups for share in micros]]
    one_by_one = [[[[i]] * groups for i in range(len(rows))]]
    packed = _score_replicated(policy, batch, together, temperature)
    single = _score_replicated(policy, batch, one_by_one, temperature)
    bound = passes.AGREEMENT[policy.dtype]
    _compare("packed rows and the same rows one at a time", packed, single, bound)
    _compare("the rollout engine and the trainer", batch.engine_logprob.to(packed.device), packed, bound)
    if prm is not None and reference is not None and config.paths["prm"] == config.paths["reference"]:
        scored, base = (_score_replicated(engine, batch, together, 1.0) for engine in (prm, reference))
        _compare("the PRM and its reference, which start from the same weights,", scored, base, 0.0)


def check_every_parameter_trains(engine: Engine, name: str) -> None:
    """After an optimizer step with a gradient: raises Stop naming parameters that got none."""
    frozen = engine.parameters_without_gradient()
    if frozen:
        raise distributed.Stop(
            f"{len(frozen)} parameters of the {name} got no gradient in the first step, among them {frozen[0]}; "
            "a part of this architecture does not train here"
        )


def _score_replicated(
    engine: Engine | Trunk, batch: Batch, minis: list[passes.MiniBatch], temperature: float
) -> Tensor:
    """passes.score where every sequence group was given all rows: the sum over ranks counts each once a group."""
    return passes.score(engine, batch, minis, temperature) / engine.sequence_group.count


def _compare(what: str, left: Tensor, right: Tensor, bound: float) -> None:
    difference = float((left - right).abs().mean())
    if not difference <= bound:
        raise ValueError(
            f"{what} disagree: their log-probs differ by {difference:.3g} nats on average (allowed {bound:g}); "
            "this model does not run as the trainer assumes, so it refuses to train it"
        )


def _check_same_vocabulary(tokenizer: Any, model: PretrainedConfig, key: str, path: str) -> None:
    other = model_config(path)
    if other.vocab_size != model.vocab_size:
        raise ValueError(
            f"model.{key}={path} has a vocabulary of {other.vocab_size}, the policy one of {model.vocab_size}; "
            "policy, PRM and reference must share one tokenizer"
        )
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"the tokenizer of model.{key}={path} differs from the policy's; policy, PRM and reference must share one"
        )
