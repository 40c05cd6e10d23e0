"""What a checkpoint costs the training that it interrupts: copied and written behind it, or written while it waits.

    python -m benchmarks.checkpoint [--models quickstart smollm2-135m] [--tokens 4096] [--rounds 3]

An SFT step of so many tokens on a random model of the quickstart's size or of SmolLM2-135M's, float32, one rank. In
turns in each round: a step; a checkpoint of which training sees the copy alone; a step beside its writing; the rest of
that; a checkpoint that training waits for. Seconds by the clock, and of the processor in the training's own thread,
which other programs on the machine do not change. The first copy, into fresh memory, stands apart. A PRIME step makes
several such passes and saves two models. Writes, model by model, into benchmarks/results/<device>/checkpoint.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from benchmarks.machine import cpu_name, installed, results
from prime_fast.config import EngineConfig, ModelConfig, OptimizerConfig
from prime_fast.data.models import load_tokenizer
from prime_fast.engine import zero
from prime_fast.engine.writing import Checkpoints
from prime_fast.stages.quickstart import write_model
from prime_fast.stages.sft import accumulate_nll

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
MODELS = ("quickstart", "smollm2-135m")
ROW = 256  # tokens of a row


def timed(work: Callable[[], object]) -> dict[str, float]:
    clock, thread = time.perf_counter(), time.thread_time()
    work()
    return {"clock": time.perf_counter() - clock, "thread": time.thread_time() - thread}


def measure(name: str, folder: Path, tokens: int, rounds: int, device: torch.device) -> dict:
    write_model(folder / "quickstart", seed=0)
    path = folder / name
    if name != "quickstart":
        AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2), dtype=torch.float32).save_pretrained(path)
    tokenizer = load_tokenizer(str(folder / "quickstart"))
    model = ModelConfig(policy=str(path), dtype="float32")
    engine = zero.Engine("policy", str(path), model, EngineConfig(), OptimizerConfig(lr=1e-5), device)
    checkpoints = Checkpoints(folder / f"{name}-run", keep=1)
    vocabulary = AutoConfig.from_pretrained(path).vocab_size
    rows = torch.randint(vocabulary, (tokens // ROW, ROW), generator=torch.Generator().manual_seed(0))
    prompts, responses = [row[: ROW // 4] for row in rows], [row[ROW // 4 :] for row in rows]

    def step() -> None:
        accumulate_nll(engine, prompts, responses, 4 * ROW)
        engine.step(1e-5)

    def copy() -> None:
        checkpoints.save(1, {"policy": engine}, tokenizer, {})

    def wait() -> None:
        copy()
        checkpoints.finish()

    step()
    first = timed(copy)
    checkpoints.finish()
    arms: dict[str, list[dict]] = {"step": [], "copy": [], "step_beside": [], "rest": [], "waited_for": []}
    for _ in range(rounds):
        for arm, work in zip(arms, (step, copy, step, checkpoints.finish, wait), strict=True):
            arms[arm].append(timed(work))
    seconds = {
        arm: {kind: statistics.median(run[kind] for run in runs) for kind in ("clock", "thread")}
        for arm, runs in arms.items()
    }
    share = {
        arm: {kind: seconds[arm][kind] / seconds["step"][kind] for kind in ("clock", "thread")}
        for arm in ("copy", "waited_for")
    }
    size = sum(file.stat().st_size for file in checkpoints.root.rglob("*") if file.is_file())
    return {
        "parameters": sum(parameter.ds_numel for parameter in engine.lm.parameters()),
        "checkpoint_bytes": size,
        "first_copy": first,
        "seconds": seconds,
        "share_of_a_step": share,
        "runs": arms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    device = zero.start()
    path = results(device.type) / "checkpoint.json"
    for name in arguments.models:
        load = os.getloadavg()[0]  # programs that wanted a core when it began
        with tempfile.TemporaryDirectory() as folder:
            made = measure(name, Path(folder), arguments.tokens, arguments.rounds, device)
        facts = {"machine": cpu_name(), "threads": torch.get_num_threads(), "load": load, "tokens": arguments.tokens}
        facts["packages"] = {package: installed(package) for package in ("torch", "deepspeed", "transformers")}
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(before | {name: facts | made}, indent=1) + "\n")
        seconds, share = made["seconds"], made["share_of_a_step"]
        print(
            f"{name}: a step {seconds['step']['thread']:.2f} s of the processor, the copy for a checkpoint "
            f"{1000 * seconds['copy']['thread']:.0f} ms ({share['copy']['thread']:.2%}); by the clock "
            f"{seconds['step']['clock']:.2f} s and {1000 * seconds['copy']['clock']:.0f} ms "
            f"({share['copy']['clock']:.2%}), one that is waited for {1000 * seconds['waited_for']['clock']:.0f} ms",
            flush=True,
        )
    print(path)


if __name__ == "__main__":
    main()
