"""Does a PRM that saw only outcomes find the wrong steps? On the runs that benchmarks.learning left behind.

    python -m benchmarks.credit --task chain6 --out runs/learning --seeds 0 1 2

The tasks know which steps are right; training never does. For fresh responses of the SFT policy and of the
trained one, each PRM's log-ratio to the reference at a step's result digit is compared between right and wrong steps:
the AUC is the chance that a right step's is larger, 0.5 for a PRM that knows nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import prime_kernels
from benchmarks.learning.arms import TASKS
from benchmarks.learning.study import Study
from prime_fast.data.rows import load_rows
from prime_fast.engine import packing
from prime_fast.engine.checkpoint import latest
from prime_fast.engine.model import PackedLM
from prime_fast.prime import area_under_curve
from prime_fast.rollout.hf import HFEngine

PROBLEMS, SAMPLES, LONGEST = 256, 4, 64
CPU = torch.device("cpu")


class Responses:
    """Sampled responses of one policy, packed, with the places of their result digits."""

    def __init__(self, policy: Path, data: Path, step_labels: Callable) -> None:
        tokenizer = AutoTokenizer.from_pretrained(policy)
        rows = load_rows(str(data), tokenizer, max_prompt_tokens=LONGEST, limit=PROBLEMS)
        rows = [rows[i] for i in range(len(rows))]
        engine = HFEngine(str(policy), [tokenizer.eos_token_id], dtype=torch.float32, device=CPU)
        seeds = [[SAMPLES * i + k for k in range(SAMPLES)] for i in range(len(rows))]
        results = engine.generate([row["prompt_ids"] for row in rows], seeds, max_tokens=LONGEST, temperature=1.0)
        prompts, responses, self.right, self.wrong, offset = [], [], [], [], [0]
        for row, samples in zip(rows, results, strict=True):
            for sample in samples:
                prompts.append(torch.tensor(row["prompt_ids"]))
                responses.append(sample.tokens)
                text = tokenizer.decode(sample.tokens, skip_special_tokens=True)
                for position, is_right in step_labels(row["prompt"][0]["content"], text):
                    (self.right if is_right else self.wrong).append(offset[-1] + position)
                offset.append(offset[-1] + len(sample.tokens))
        self.pack = packing.pack(range(len(responses)), prompts, responses, offset)

    @torch.no_grad()
    def logprob(self, model: Path) -> Tensor:
        """(T,) log-probs of the response tokens under a Hugging Face checkpoint."""
        lm = PackedLM(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)).eval()
        values = lm(self.pack, lambda h, w, bias: prime_kernels.linear_logprob(h, w, self.pack.targets, bias=bias))
        flat = torch.zeros(len(values))
        self.pack.put(flat, values)
        return flat

    def step_auc(self, prm: Path, reference: Path) -> float:
        ratio = self.logprob(prm) - self.logprob(reference)
        return area_under_curve(ratio[self.right], ratio[self.wrong])


def measure(out: Path, task: str, arm: str, seed: int) -> dict[str, dict[str, float]]:
    per_seed = Study(out / task, "", (), 0, True, task=task)
    study = per_seed if per_seed.start("sft", seed).exists() else replace(per_seed, sft_per_seed=False)
    sft, rows = study.start("sft", seed) / "model", study.start("task", seed) / "eval.jsonl"
    step_labels = import_module(study.made.module).step_labels
    newest = latest(study.run(arm, seed))
    if newest is None:
        raise SystemExit(f"benchmarks.credit: {study.run(arm, seed)} has no checkpoint; run benchmarks.learning first")
    prms = {"online": newest / "prm"}
    offline = latest(study.run("offline", seed))
    if offline is not None:
        prms["frozen"] = offline / "prm"
    result = {}
    for name, policy in (("SFT policy", sft), ("trained policy", newest / "policy")):
        responses = Responses(policy, rows, step_labels)
        shares = {"wrong_steps": len(responses.wrong) / (len(responses.right) + len(responses.wrong))}
        result[name] = shares | {prm: responses.step_auc(path, sft) for prm, path in prms.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.credit", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--task", choices=TASKS, default="chain6")
    parser.add_argument("--arm", default="published", help="whose PRM and policy")
    options = parser.parse_args()
    results = {seed: measure(options.out, options.task, options.arm, seed) for seed in options.seeds}
    (options.out / options.task / "credit.json").write_text(json.dumps(results, indent=1) + "\n")
    print("| seed | responses of | wrong steps | step AUC, online PRM | step AUC, frozen PRM |\n|---|---|---|---|---|")
    for seed, policies in results.items():
        for policy, row in policies.items():
            numbers = [row["online"], row.get("frozen", float("nan"))]
            cells = [str(seed), policy, f"{row['wrong_steps']:.3f}", *(f"{number:.2f}" for number in numbers)]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
