"""What an evaluation is asked, and whether OUT was asked the same before."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prime_fast.config import DataConfig, PrimeConfig, RewardConfig, RolloutConfig
from prime_fast.rewards.pool import SANDBOXES

MAX_RESPONSE = RolloutConfig.model_fields["max_response"].default
# --preset paper (arXiv 2502.01456): greedy, 4096 tokens, 8192 for the benchmarks named here; its avg@16 is at 0.3
PAPER_TOKENS, PAPER_LONG_TOKENS, PAPER_LONG = 4096, 8192, ("math500", "leetcode", "livecodebench")
PAPER_TEMPERATURE = 0.3
# arguments of vllm.LLM and ours that say how to compute, not what: they may change when an evaluation continues
VLLM_RESOURCES = {
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_num_seqs",
    "max_num_batched_tokens",
    "cpu_offload_gb",
    "enforce_eager",
    "gpus",
    "bucket_mib",
}


@dataclass(frozen=True)
class Settings:
    """What to evaluate; `model`, `prm`, `reference` are a run_dir (its newest checkpoint), a checkpoint,
    RUN_DIR/checkpoints/best, or what from_pretrained takes."""

    model: str
    data: tuple[str, ...]
    out: Path
    engine: str = "hf"
    vllm: dict[str, Any] = field(default_factory=dict)  # rollout.vllm
    samples: int = 0  # drawn per problem besides the greedy response
    temperature: float | None = None  # of the samples; None = 1, or the preset's
    max_response: int | None = None  # tokens; None = as in training, or the preset's
    limit: int | None = None  # the first rows of each file
    reward: str = RewardConfig().function
    timeout: float = RewardConfig().timeout
    sandbox: str = SANDBOXES[0]
    preset: str | None = None  # or "paper"
    template: str = DataConfig().template
    template_args: dict[str, Any] = field(default_factory=dict)
    prm: str | None = None
    reference: str | None = None
    beta: float = PrimeConfig().beta
    batch: int = 64  # responses generated together
    seed: int = 0
    against: str | None = None  # a second model to evaluate and compare with, or the OUT of an evaluation


def check(settings: Settings) -> None:
    if bool(settings.prm) != bool(settings.reference):
        raise ValueError("--prm and --reference belong together: the implicit reward is their log-ratio")
    if settings.prm and settings.samples < 2:
        raise ValueError("--prm chooses among samples; set --samples to 2 or more")
    if settings.samples and settings.temperature is not None and settings.temperature <= 0:
        raise ValueError(f"--temperature {settings.temperature}: samples need more than 0 (greedy is always measured)")
    if settings.vllm and settings.engine != "vllm":
        raise ValueError(f"--vllm {next(iter(settings.vllm))}=... is for vLLM; add --engine vllm")

    if settings.against and is_evaluation(settings.against):
        theirs = json.loads((Path(settings.against) / "settings.json").read_text())
        for key, value in _grading(settings).items():
            if theirs.get(key) != value:
                raise ValueError(
                    f"{settings.against} was evaluated with {key} {theirs.get(key)}, now it is {value}; "
                    "only evaluations made in the same way can be compared"
                )


def is_evaluation(place: str) -> bool:
    """Whether it is the OUT of an evaluation."""
    return all((Path(place) / name).is_file() for name in ("settings.json", "greedy.jsonl"))


def _grading(settings: Settings) -> dict[str, Any]:
    """What evaluations that are compared must share besides their data."""
    asked = {"reward": [settings.reward, settings.timeout]}
    return asked | {key: getattr(settings, key) for key in ("max_response", "preset")}


def temperature(settings: Settings) -> float:
    return settings.temperature or (PAPER_TEMPERATURE if settings.preset else 1.0)


def max_tokens(settings: Settings, benchmark: str) -> int:
    if settings.max_response or not settings.preset:
        return settings.max_response or MAX_RESPONSE
    plain = re.sub(r"[^a-z0-9]", "", benchmark.lower())
    return PAPER_LONG_TOKENS if any(name in plain for name in PAPER_LONG) else PAPER_TOKENS


def claim(settings: Settings, models: dict[str, str]) -> None:
    """Write down what is evaluated in OUT, or make sure that it is as before. Samples and a PRM may come later."""
    asked = {
        **{key: [path, _changed(path)] for key, path in models.items()},
        "data": [[path, _changed(path)] for path in settings.data],
        **_grading(settings),
        **{key: getattr(settings, key) for key in ("limit", "seed", "engine")},
        "template": [settings.template, settings.template_args],
        "samples": [settings.samples, temperature(settings)] if settings.samples else None,
        "beta": settings.beta if settings.prm else None,
        "vllm": {key: value for key, value in settings.vllm.items() if key not in VLLM_RESOURCES} or None,
    }
    path = settings.out / "settings.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    for key, value in asked.items():
        later = key in ("samples", "prm", "reference", "beta") and None in (before.get(key), value)
        if before and before.get(key) != value and not later:
            raise ValueError(
                f"{settings.out} holds an evaluation with {key} {before.get(key)}, now it is {value}; "
                "put it back, or choose another --out"
            )
    settings.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(before | {k: v for k, v in asked.items() if v is not None}, indent=1) + "\n")


def _changed(path: str) -> float | None:
    """When a file, or anything in a directory, was last written: weights may be replaced under the same name."""
    place = Path(path)
    files = place.iterdir() if place.is_dir() else [place] if place.is_file() else []
    return max((file.stat().st_mtime for file in files), default=None)
