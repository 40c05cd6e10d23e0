"""Stage 4: one trainer step at the shape of a real model, random weights, rows of full length: PRIME, then RLOO.

The rows are given, not sampled (stages 5 and 6 sample); everything after is the trainer's own step, with DeepSpeed, the
optimizers and the weight sync to the embedded engine. Each model and algorithm has a process of its own, so that its
peak is its own.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.facts import PEAK, tflops
from benchmarks.gpu.job import ROOT, Item, Job, Skipped
from benchmarks.machine import installed

NEEDED = ("deepspeed", "hjson", "pydantic", "pyarrow", "rich", "accelerate", "transformers")
TRANSFORMERS = (5, 19)  # the oldest release that pyproject.toml allows
SHAPES = {  # Qwen2.5's
    "1.5B": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960},
    "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96},
}
VOCABULARY, TINY_VOCABULARY = 151936, 300
ROWS = [(4096, 32), (16384, 8)]  # tokens of a row, rows of a step: 131,072 tokens either way
TINY_ROWS = [(32, 8), (48, 8)]
CASES = {("1.5B", "PRIME"): 75, ("0.5B", "PRIME"): 50, ("1.5B", "RLOO"): 50, ("0.5B", "RLOO"): 40}  # seconds
LAYERS = {"hf": 25, "fused": 25}  # beside "auto", the cases' own
PROMPT_SHARE = 16  # a row has one prompt token in so many
K = 4  # rows a group
PARKINGS = 3
FREED = 0.99  # of what the plan counts on: allocators round


def run(job: Job) -> None:
    if absent := missing():
        job.do([Item("step", 0, partial(refuse, absent))])
        return
    with tempfile.TemporaryDirectory(prefix="prime-fast-step-") as folder:
        job.do(items(job, Path(folder)))


def missing() -> list[str]:
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    found = installed("transformers")
    if found and tuple(map(int, found.split(".")[:2])) < TRANSFORMERS:
        absent.append(f"transformers >= {'.'.join(map(str, TRANSFORMERS))} (here {found})")
    return absent


def refuse(absent: list[str]) -> dict:
    raise Skipped(f"the trainer needs {', '.join(absent)}: bring wheels with --wheels FOLDER")


def items(job: Job, folder: Path) -> Iterator[Item]:
    cases = {("tiny", "PRIME"): 0, ("tiny", "RLOO"): 0} if job.small else CASES
    for (shape, algorithm), seconds in cases.items():
        spec = {"shape": shape, "algorithm": algorithm, "folder": str(folder), "device": job.device}
        spec["rows"] = TINY_ROWS if job.small else ROWS
        yield Item(f"{shape} {algorithm}", seconds, partial(apart, job, spec))
    for kind, seconds in LAYERS.items() if not job.small else ():
        spec = {"shape": "0.5B", "algorithm": "RLOO", "folder": str(folder), "device": job.device}
        spec |= {"rows": ROWS[:1], "layers": kind}
        yield Item(f"0.5B RLOO, model.layers={kind}", seconds, partial(layered, job, spec))


def layered(job: Job, spec: dict[str, Any]) -> dict:
    if spec["layers"] == "fused" and installed("liger-kernel") is None:
        raise Skipped("model.layers=fused needs liger-kernel: bring its wheel with --wheels FOLDER")
    return apart(job, spec)


def apart(job: Job, spec: dict[str, Any]) -> dict:
    command = [sys.executable, "-m", "benchmarks.gpu.step", json.dumps(spec)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, job.left))
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    if done.returncode or not lines:
        raise RuntimeError(f"exit code {done.returncode} after {len(lines)} cases: {done.stderr[-1500:]}")
    if "does_not_fit" in lines[0]:
        raise Skipped(lines[0]["does_not_fit"])
    parked = [json.loads(line)["parking"] for line in done.stdout.splitlines() if line.startswith('{"parking"')]
    return {"cases": lines, "parking": parked[0]}


def main(spec: dict[str, Any]) -> None:
    """In a process of its own: a JSON line for each length of row."""
    square = 128 if spec["shape"] == "tiny" else PEAK
    peak = tflops(spec["device"], square, square, square)
    model = Path(spec["folder"], spec["shape"])
    if not model.exists():
        write_model(model, spec["shape"], spec["device"])
    from prime_fast import preflight
    from prime_fast.engine import zero
    from prime_fast.metrics import MetricsLog, read_metrics
    from prime_fast.trainer import Trainer

    config = configuration(spec, model, max(length for length, _ in spec["rows"]))
    if problem := too_large(config, spec["device"]):
        print(json.dumps({"case": spec["shape"], "does_not_fit": problem}), flush=True)
        return
    began = time.perf_counter()
    device = zero.start()
    trainer = Trainer(config, device, preflight.Inputs(Numbers(), (0,), [{"prompt_ids": [1]}], None))
    trainer.collector.close()
    trainer.save = lambda step: None  # 12 bytes a parameter on a disk are not what is measured here
    started = time.perf_counter() - began
    for length, count in spec["rows"]:
        trainer.collector = Given(length, count, trainer.learner.policy.lm.config.vocab_size)
        # not from step 1, whose self-check samples; the first of two steps compiles and makes the optimizer states
        trainer.run(MetricsLog(config.run_dir, config.steps), first_step=config.steps - 1)
        record = read_metrics(config.run_dir)[-1]
        print(json.dumps(summary(spec, length, count, record, trainer, peak, started)), flush=True)
    print(json.dumps({"parking": parking(trainer)}), flush=True)
    trainer.close()


def parking(trainer: Any) -> dict[str, Any]:
    """Seconds in which the optimizer states go to the host and come back, the first time and then; what a GPU gets free
    by it, which must be what the memory plan counts on."""
    from prime_fast.memory.items import total

    states = [trainer.plan.states[role] for role in trainer.learner.trained]
    claimed = sum(total(engine.rest()) - total(engine.parked(engine.rest())) for engine in states)
    found: dict[str, Any] = {"claimed_gib": claimed / 2**30, "park_seconds": [], "unpark_seconds": []}

    def timed(name: str) -> None:
        began = time.perf_counter()
        for engine in trainer.learner.trained.values():
            getattr(engine, name)()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found[f"{name}_seconds"].append(time.perf_counter() - began)

    for _ in range(PARKINGS):
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        timed("park")
        if torch.cuda.is_available():
            freed = before - torch.cuda.memory_allocated()
            found["freed_gib"] = freed / 2**30
            if freed < FREED * claimed:
                raise RuntimeError(f"parking frees {freed / 2**30:.2f} GiB of {claimed / 2**30:.2f} that were planned")
        timed("unpark")
        if torch.cuda.is_available() and torch.cuda.memory_allocated() > before + (1 - FREED) * claimed:
            raise RuntimeError(f"unparked states take {torch.cuda.memory_allocated() - before} bytes more than before")
    return found


def configuration(spec: dict[str, Any], model: Path, longest: int) -> Any:
    from prime_fast.config import Config

    prompt = longest // PROMPT_SHARE
    rows = max(count for _, count in spec["rows"])
    return Config(
        run_dir=str(model.with_name(f"{spec['shape']}-{spec['algorithm']}")),
        steps=3,
        model={"policy": str(model), "layers": spec.get("layers", "auto"), "recompute": "all"},
        data={"max_prompt": prompt},
        rollout={"prompts": rows // K, "samples": K, "max_response": longest - prompt, "batch": 1},
        reward={"function": "prime_fast.stages.quickstart:compute_score"},  # never called
        prime={"process_weight": 1.0 if spec["algorithm"] == "PRIME" else 0.0},
        policy={"mini_batch": rows},
        prm={"mini_batch": rows},
        engine={"micro_tokens": longest},
        log={"eval_every": 0, "checkpoint_every": 0},
    )


def too_large(config: Any, device: str) -> str | None:
    """Why the trainer's own plan says that this card cannot hold the run."""
    if device == "cpu":
        return None
    from prime_fast.memory.plan import Plan

    plan = Plan(config, 1, torch.cuda.mem_get_info()[1])
    if plan.fits:
        return None
    needs, has = plan.peaks[plan.tightest] / 2**30, plan.card / 2**30
    return f"{config.model.policy} needs {needs:.0f} GiB at its peak ({plan.tightest}), this card has {has:.0f}"


def write_model(path: Path, shape: str, device: str) -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config

    vocabulary, longest = (TINY_VOCABULARY, 64) if shape == "tiny" else (VOCABULARY, 32768)
    config = Qwen2Config(
        **SHAPES[shape],
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
    if device == "cuda":
        torch.cuda.empty_cache()


class Numbers:
    """In the place of a tokenizer, for what a run keeps of its tokens."""

    def decode(self, tokens: Any) -> str:
        return "".join(f"{int(token)} " for token in tokens)


class Given:
    """In the place of the collector: the same random groups at every step, sampled by weights that never were."""

    surplus: tuple = ()

    def __init__(self, length: int, count: int, vocabulary: int) -> None:
        from prime_fast.engine.batch import Group, Sample

        generator = torch.Generator().manual_seed(length)
        prompt, response = length // PROMPT_SHARE, length - length // PROMPT_SHARE + 1  # the last token is not fed
        # about what a random model gives to any token, so that the importance weights are about 1
        logprob = torch.full((response,), -math.log(vocabulary))

        def draw(size: int) -> torch.Tensor:
            return torch.randint(vocabulary, (size,), generator=generator)

        self.groups = [
            Group(
                i, i, tuple(draw(prompt).tolist()), tuple(Sample(draw(response), logprob, True) for _ in range(K)),
                tuple(float(k % 2) for k in range(K)), version=-1,
            )
            for i in range(count // K)
        ]  # fmt: skip
        self.drawn = len(self.groups)

    def collect(self, phases: Any, stream: None, last: bool) -> tuple[list, dict, list]:
        return self.groups, {}, []

    def state_dict(self) -> dict:
        return {}

    def close(self) -> None:
        pass


def summary(
    spec: dict, length: int, count: int, record: dict, trainer: Any, peak: float, started: float
) -> dict[str, Any]:
    def under(prefix: str) -> dict[str, float]:
        return {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}

    shape = trainer.learner.policy.lm.config
    units = {"policy": 3} | ({"reference": 1, "prm": 3} if spec["algorithm"] == "PRIME" else {})
    parts = flops(shape, length, count)
    forward = sum(parts.values())
    seconds = under("seconds/")
    rates = {name: unit * forward / seconds[name] / 1e12 / peak for name, unit in units.items()}
    found = {
        "case": f"{spec['shape']} {spec['algorithm']} {length}" + (f", {spec['layers']}" if "layers" in spec else ""),
        "shape": spec["shape"],
        "algorithm": spec["algorithm"],
        "row_tokens": length,
        "rows": count,
        "start_seconds": started,
        "step_seconds": record["seconds"],
        "seconds": seconds,
        "tokens_per_second": length * count / record["seconds"],
        "peak_tflops": peak,
        "forward_flops": parts,
        "mfu": sum(units.values()) * forward / record["seconds"] / 1e12 / peak,
        "mfu_of_phases": rates,
        "measured_gib": under("memory/"),
        "planned_gib": under("memory_plan/"),
        "kernels": under("kernel/"),
    }
    if torch.cuda.is_available():
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return found


def flops(shape: Any, length: int, count: int) -> dict[str, float]:
    """Of one forward over the rows: layers, causal attention, the head on response tokens; not what is recomputed."""
    size, layers, heads = shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads
    head_size = getattr(shape, "head_dim", None) or size // heads
    projections = size * head_size * 2 * (heads + shape.num_key_value_heads)
    tokens = count * length
    return {
        "layers": tokens * layers * 2 * (projections + 3 * size * shape.intermediate_size),
        "attention": tokens * layers * 4 * heads * head_size * length / 2,
        "head": tokens * 2 * size * shape.vocab_size * (1 - 1 / PROMPT_SHARE),
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
