"""Stage 5: the vLLM engine as the trainer drives it: agreement, weight sync, sleep, what it carries over, a kill."""

from __future__ import annotations

import importlib.util
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.job import Item, Job, Skipped
from benchmarks.gpu.step import write_model

PROMPT, PROMPTS, SAMPLES, TOKENS = 128, 64, 4, 256
SHARE = 0.3  # of the card that the engine may have
TRAINER = 0.4  # of the card that a trainer is given to hold while the engine restarts
SYNCS = 3
TRIES = 5  # at stopping the engine amid its work: it does not wait


def run(job: Job) -> None:
    for name, loss in {"vllm": "pip install vllm==0.25.1", "pydantic": "bring it with --wheels FOLDER"}.items():
        if importlib.util.find_spec(name) is None:
            job.do([Item("engine", 0, lambda name=name, loss=loss: refuse(f"{name} is not installed: {loss}"))])
            return
    with tempfile.TemporaryDirectory(prefix="prime-fast-engine-") as folder:
        bench = Bench(job, Path(folder))
        try:
            job.do(bench.items())
        finally:
            bench.close()


def refuse(reason: str) -> dict:
    raise Skipped(reason)


class Bench:
    """One model on both sides: in vLLM's process and as the trainer's weights here. Built when an item needs it."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.device = torch.device(job.device, 0) if job.device == "cuda" else torch.device("cpu")
        self.tokens = 48 if job.small else TOKENS
        self.start_seconds, self.starting = 0.0, False

    def items(self) -> Iterator[Item]:
        yield Item("agreement", 150, self.agreement)
        yield Item("sync", 60, self.sync)
        yield Item("sleep", 60, self.sleep)
        yield Item("carried", 60, self.carried)
        yield Item("killed", 150, self.killed)

    @cached_property
    def model(self) -> torch.nn.Module:
        from transformers import AutoModelForCausalLM

        shape = "tiny" if self.job.small else "1.5B"
        write_model(self.folder / shape, shape, self.job.device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(self.folder / shape, dtype=dtype)
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def fleet(self) -> Any:
        from prime_fast.config import Config
        from prime_fast.rollout import make_engine
        from prime_fast.rollout.fleet import Fleet

        if self.starting:
            raise Skipped("the engine did not start: see the item before")
        self.starting = True
        path = self.model.name_or_path
        options = {"gpu_memory_utilization": SHARE} if self.device.type == "cuda" else {}
        config = Config(
            run_dir="-",
            model={"policy": path},
            data={"max_prompt": PROMPT if not self.job.small else 8},
            rollout={"engine": "vllm", "max_response": self.tokens, "batch": PROMPTS * SAMPLES, "vllm": options},
        )
        began = time.perf_counter()
        engine = make_engine(config, path, [], self.model.dtype, self.device)
        self.start_seconds = time.perf_counter() - began
        return Fleet(engine, self.model.named_parameters)

    @cached_property
    def prompts(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        shape = (4, 8) if self.job.small else (PROMPTS, PROMPT)
        return torch.randint(self.model.config.vocab_size, shape, generator=generator).tolist()

    def requests(self) -> list[Any]:
        from prime_fast.rollout import Request

        seeds = [[1000 * i + k for k in range(SAMPLES)] for i in range(len(self.prompts))]
        return [Request(i, tuple(p), seeds[i], self.tokens, 1.0) for i, p in enumerate(self.prompts)]

    def compare(self, stale: bool = False) -> dict:
        """Samples of every prompt, their log-probs against a plain forward of the weights here: as close as the trainer
        asks, or, where the engine's are stale, not."""
        began = time.perf_counter()
        results = self.fleet.generate(self.requests())
        seconds = time.perf_counter() - began
        tokens = sum(len(sample.tokens) for row in results.values() for sample in row)
        return self.judged(results, stale) | {"tokens_per_second": tokens / seconds}

    def judged(self, results: dict[int, list], stale: bool = False) -> dict:
        from benchmarks.rollout import mismatch
        from prime_fast.passes import AGREEMENT

        found = mismatch(self.model, self.prompts, [results[i] for i in range(len(self.prompts))], self.device)
        if (found["mismatch_mean"] <= AGREEMENT[self.model.dtype]) == stale:
            what = "hardly moved" if stale else "are not those it was given"
            raise RuntimeError(f"the engine's weights {what}, by its log-probs: {found}")
        return found

    def agreement(self) -> dict:
        first = {"first_tokens_per_second": self.compare()["tokens_per_second"], "start_seconds": self.start_seconds}
        return first | self.compare()

    def sync(self) -> dict:
        """Every weight moved and sent, checked by its checksum on arrival and where it computes, and by its effect."""
        generator = torch.Generator(self.device).manual_seed(1)
        for parameter in self.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=self.device)
            parameter += (parameter.float().std().clamp(min=1e-3) * noise).to(parameter.dtype)
        stale = self.compare(stale=True)["mismatch_mean"]
        seconds = []
        for _ in range(SYNCS):
            began = time.perf_counter()
            self.fleet.sync()  # raises where a checksum is not reproduced
            seconds.append(time.perf_counter() - began)
        found = {"first_seconds": seconds[0], "seconds_each": statistics.median(seconds[1:]), "gib": self.gib}
        return found | {"stale_mismatch_mean": stale} | self.compare()

    @property
    def gib(self) -> float:
        return sum(p.numel() * p.element_size() for p in self.model.parameters()) / 2**30

    def sleep(self) -> dict:
        """Memory of the whole card before, during and after, and a tensor of what was given back."""
        if self.device.type == "cpu":
            raise Skipped("vLLM sleeps on a GPU alone")
        from benchmarks.rollout import used_gib

        self.compare()
        torch.cuda.empty_cache()
        before, began = used_gib(), time.perf_counter()
        self.fleet.sleep()
        slept, asleep = time.perf_counter() - began, used_gib()
        if before - asleep < self.gib:
            raise RuntimeError(f"sleep gave back {before - asleep:.1f} GiB, less than the weights' {self.gib:.1f}")
        torch.empty(int(0.9 * (before - asleep) * 2**30), dtype=torch.uint8, device=self.device).fill_(1)
        torch.cuda.empty_cache()
        began = time.perf_counter()
        self.fleet.wake(changed=True)
        woke = time.perf_counter() - began
        found = {"awake_gib": before, "asleep_gib": asleep, "sleep_seconds": slept, "wake_and_sync_seconds": woke}
        return found | self.compare() | {"awake_again_gib": used_gib()}

    def carried(self) -> dict:
        """Asleep in the middle of responses, and given weights: these go on, and have their log-probs."""
        first, *rest = self.requests()
        for _ in range(TRIES):
            self.fleet.submit([first._replace(max_tokens=self.tokens // 8), *rest])
            results: dict[int, list] = {}
            while not results:
                results |= dict(self.fleet.step())
            self.fleet.sleep()
            self.fleet.version += 1
            began = time.perf_counter()
            self.fleet.wake(changed=True)
            woke = time.perf_counter() - began
            while len(results) < len(self.prompts):
                results |= dict(self.fleet.step())
            carried = sum(len(sample.runs) > 1 for samples in results.values() for sample in samples)
            if carried:
                return {"carried": carried, "wake_and_sync_seconds": woke} | self.judged(results)
        raise RuntimeError("no response was ever unfinished when the engine slept, so this shows nothing")

    def killed(self) -> dict:
        """At work, beside a trainer that holds memory: the engine comes back, redoes its work and is right."""
        self.compare()
        held = 0
        if self.device.type == "cuda":
            held = int(TRAINER * torch.cuda.mem_get_info()[1])
        block = torch.empty(held, dtype=torch.uint8, device=self.device).fill_(1)
        first, *rest = self.requests()
        self.fleet.submit(rest)
        os.kill(self.fleet.engine.process.pid, signal.SIGKILL)
        self.fleet.submit([first])  # it may have been done with the others
        results, began = {}, time.perf_counter()
        while len(results) < len(self.prompts):
            results |= dict(self.fleet.step())
        seconds = time.perf_counter() - began
        if self.fleet.restarts != 1:
            raise RuntimeError(f"the engine was restarted {self.fleet.restarts} times, not once")
        self.fleet.settled()
        del block
        return {"restart_and_work_seconds": seconds, "held_gib": held / 2**30} | self.judged(results)

    def close(self) -> None:
        if "fleet" in self.__dict__:
            self.fleet.close()
