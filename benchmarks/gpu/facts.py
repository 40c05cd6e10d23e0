"""Stage 1: what this machine is, how fast it multiplies and copies, and what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

import prime_kernels
from benchmarks.advantage import copy_bandwidth
from benchmarks.gpu.job import PACKAGES, Item, Job
from benchmarks.lm_head import Clock
from benchmarks.machine import cpu_name, gpu_facts, installed
from benchmarks.peers import CHUNK, HEADS

MODULES = {  # what goes without them
    "triton": "the Triton kernels (stages 2 and 3)",
    "deepspeed": "the trainer (stages 4 and 6): bring it with --wheels",
    "pydantic": "the trainer (stages 4, 5 and 6): bring it with --wheels",
    "vllm": "stage 5",
    "math_verify": "SmolLM2 on GSM8K (stage 6): bring it with --wheels",
    "flash_attn": "flash-attn's attention; torch's varlen_attn serves",
    "liger_kernel": "Liger's rows of stage 3",
    "cut_cross_entropy": "CCE's rows of stage 3",
    "xdist": "several processes for the kernel tests of stage 2",
    "matplotlib": "the pictures",
}
PROGRAMS = {
    "nvcc": "the CUDA kernel of the advantages, unless it is built already",
    "compute-sanitizer": "the memory and race checks of stage 2",
}
PEAK = 8192  # a square product of this size is what is called the peak
ROUNDS = 12


def run(job: Job) -> None:
    job.do(items(job))


def items(job: Job) -> Iterator[Item]:
    yield Item("machine", 0, lambda: machine(job))
    yield Item("gemm", 5, lambda: {"tflops": gemms(job)})
    numbers = 2**16 if job.small else 2**28
    yield Item("copy", 3, lambda: {"gb_per_s": copy_bandwidth(job.device, ROUNDS, numbers) / 1e9})


def machine(job: Job) -> dict:
    facts = {"python": platform.python_version(), "cores": os.cpu_count(), "cpu": cpu_name()}
    facts |= {"host_memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30}
    facts |= gpu_facts() if job.device == "cuda" else {"device": cpu_name()}
    packages = {name: installed(name) for name in PACKAGES}
    lacking = missing()
    for name, loss in lacking.items():
        print(f"    without {name}: {loss}", flush=True)
    facts |= {"packages": packages, "build": job.settings["build"], "backends": prime_kernels.backends()}
    return facts | {"missing": lacking}


def missing() -> dict[str, str]:
    """What is not here -> what goes without it."""
    lacking = {name: loss for name, loss in MODULES.items() if importlib.util.find_spec(name) is None}
    return lacking | {name: loss for name, loss in PROGRAMS.items() if program(name) is None}


def program(name: str) -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", name)
    return shutil.which(name) or (str(home) if home.exists() else None)


def gemms(job: Job) -> dict[str, float]:
    """TFLOP/s of the peak and, of every LM head, of the three products of a chunk of tokens."""
    heads = {"tiny": (16, 300)} if job.small else HEADS
    square, chunk = (128, 64) if job.small else (PEAK, CHUNK)
    found = {"peak": tflops(job.device, square, square, square)}
    for name, (size, vocabulary) in heads.items():
        found[f"{name} logits"] = tflops(job.device, chunk, size, vocabulary)
        found[f"{name} dX"] = tflops(job.device, chunk, vocabulary, size)
        found[f"{name} dW"] = tflops(job.device, vocabulary, chunk, size)
    return found


def tflops(device: str, m: int, k: int, n: int) -> float:
    """Of (m, k) @ (k, n), of random numbers: bfloat16 on a GPU, float32 on a CPU. Median of the rounds."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    out, clock = torch.empty(m, n, device=device, dtype=dtype), Clock(device)
    seconds = [clock(lambda: torch.mm(a, b, out=out))[0] for _ in range(3 + ROUNDS)][3:]
    return 2 * m * k * n / statistics.median(seconds) / 1e12
