"""Configurations and tokenizers of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig


def model_config(path: str) -> PretrainedConfig:
    """The Hugging Face config of a checkpoint, or a config.json alone."""
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no Hugging Face config at {path!r}: give a model directory or a hub id that is cached or reachable "
            "(a dry run needs no more than a directory with its config.json)"
        ) from error


def load_tokenizer(path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer at {path!r}; save the model's tokenizer beside its weights") from error


def eos_ids(path: str, tokenizer: Any) -> tuple[int, ...]:
    """Every token id that ends a response: the tokenizer's and the generation config's."""
    try:
        listed = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a checkpoint need not have a generation config
        listed = None
    ids = {listed} if isinstance(listed, int) else set(listed or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise ValueError(
            f"{path} names no EOS token, so no response would end; set eos_token in its tokenizer_config.json"
        )
    return tuple(sorted(ids))


def stop_ids(stop: Sequence[int | str], tokenizer: Any, vocabulary: int) -> tuple[int, ...]:
    """The token ids of rollout.stop, given as ids or strings. Raises ValueError where one is no single token."""
    ids = []
    for token in stop:
        found = [token] if isinstance(token, int) else tokenizer.encode(token, add_special_tokens=False)
        if len(found) != 1:
            raise ValueError(
                f"rollout.stop={token!r} is {len(found)} tokens of this vocabulary; give a single one, or its id"
            )
        if not 0 <= found[0] < vocabulary:
            raise ValueError(f"rollout.stop={token} is not in the model's vocabulary of {vocabulary} tokens")
        ids += found
    return tuple(ids)
