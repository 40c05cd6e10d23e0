"""Rollout engines for the tests that hold for every engine."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from prime_fast.rollout import RolloutEngine
from prime_fast.rollout.hf import HFEngine
from prime_fast.rollout.process import EngineProcess
from prime_fast.rollout.vllm import SLEEP_LEVEL, check_installed

EOS = 1


def needs_vllm() -> None:
    try:
        check_installed()
    except ValueError as error:
        pytest.skip(str(error))


def start_engine(
    name: str,
    model: Path | str,
    *,
    batch: int = 64,
    longest: int = 64,
    options: dict | None = None,
    ends: Sequence[int] = (EOS,),
) -> RolloutEngine:
    """On the CPU in float32. The buckets are small, so that several of them make a sync."""
    cpu = torch.device("cpu")
    if name == "hf":
        return HFEngine(str(model), ends, dtype=torch.float32, device=cpu, batch=batch)
    needs_vllm()
    settings = {"path": str(model), "eos_ids": list(ends), "dtype": torch.float32, "longest": longest, "batch": batch}
    settings |= {"sleep_level": SLEEP_LEVEL, "options": options or {}}
    return EngineProcess(settings, cpu, bucket_bytes=1 << 20)
