"""Configurations and tokenizers of checkpoints, and what every loading of one is asked.

A checkpoint brings data alone: its weights are read as safetensors, never as a pickle, and no code of its own is run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig

from prime_fast.progress import say

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def source(path: str) -> dict[str, Any]:
    """Arguments of from_pretrained that say where a checkpoint is: a directory, a hub id, or a hub id at a commit, tag
    or branch, `org/name@revision`."""
    name, revision = located(path)
    return {"pretrained_model_name_or_path": name, "revision": revision, "trust_remote_code": False}


def located(path: str) -> tuple[str, str | None]:
    """The directory or hub id, and the revision that `path` pins it to."""
    name, at, revision = str(path).partition("@")
    return (str(path), None) if Path(path).exists() or not at else (name, revision)


@cache
def check_files(path: str) -> None:
    """Of a directory: raises ValueError where its weights are a pickle; says if it brings code, which is not run."""
    folder = Path(path)
    found = sorted(file.name for kind in PICKLES for file in folder.glob(kind))
    if found and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"the weights in {path} are a pickle ({found[0]}), which can run code when it is read; if you trust it, "
            "write it anew as safetensors: python -c 'import sys, transformers as t; p = sys.argv[1]; "
            f't.AutoModelForCausalLM.from_pretrained(p, dtype="auto").save_pretrained(p)\' {path}'
        )
    if (settings := _own_code(folder)) and os.environ.get("RANK", "0") == "0":  # of torchrun: one of them tells
        say(f"{path} brings code of its own ({settings}), which is not run; transformers' own takes its place")


def _own_code(folder: Path) -> str | None:
    """The file of a checkpoint that asks for code out of its directory or the hub."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and b'"auto_map"' in (folder / name).read_bytes():
            return f"auto_map in {name}"
    return None


def model_config(path: str) -> PretrainedConfig:
    """The Hugging Face config of a checkpoint, or a config.json alone."""
    check_files(path)
    try:
        return AutoConfig.from_pretrained(**source(path))
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{path} needs code of its own (auto_map in its config.json), which is never run; choose a model whose "
                "architecture transformers has"
            ) from error
        raise ValueError(
            f"no Hugging Face config at {path!r}: give a model directory or a hub id that is cached or reachable "
            "(a dry run needs no more than a directory with its config.json)"
        ) from error


def load_tokenizer(path: str) -> Any:
    check_files(path)
    try:
        return AutoTokenizer.from_pretrained(**source(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer at {path!r}; save the model's tokenizer beside its weights") from error


def eos_ids(path: str, tokenizer: Any) -> tuple[int, ...]:
    """Every token id that ends a response: the tokenizer's and the generation config's."""
    try:
        name, revision = located(path)
        listed = GenerationConfig.from_pretrained(name, revision=revision).eos_token_id
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
