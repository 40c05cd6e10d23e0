r"""Choosing one of n responses: an offline implicit PRM against majority vote and an outcome reward model (ORM).

    python -m benchmarks.offline_prm runs/offline-prm

The quickstart's task and SFT model. Its rollouts of training prompts train a PRM with each loss, by `prime-fast prm`,
and two ORMs: the same model with a linear head on the hidden state of a response's last token, trained on the same
rows, in mini-batches of as many, for as many epochs, at two learning rates. All choose among the same
samples of held-out prompts. Differences are paired by problem. What is there is not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.machine import RESULTS, cpu_name
from prime_fast import cli, prime
from prime_fast.data.labelled import Labelled, load_labelled
from prime_fast.data.models import load_tokenizer
from prime_fast.data.rows import PromptSampler
from prime_fast.engine import packing
from prime_fast.engine.batch import Batch
from prime_fast.engine.model import PackedLM
from prime_fast.evaluation import intervals
from prime_fast.evaluation.bestofn import best_of, implicit_rewards, majority, pass_at
from prime_fast.evaluation.evaluate import evaluate
from prime_fast.evaluation.settings import Settings
from prime_fast.stages import quickstart
from prime_fast.stages.reference import batch_of

CONFIG = "configs/quickstart.yaml"
PRMS = (("response", 1e-3), ("dpo", 1e-3), ("dpo", 3e-4))  # losses and learning rates
ORM_RATES = (1e-3, 3e-4)
BATCH, EPOCHS, SAMPLES = 64, 1, 8
MICRO_TOKENS = 8192
SIZES = (2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline_prm", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="directory of models and responses")
    parser.add_argument("--prompts", type=int, default=2048, help="training prompts, each with 8 responses")
    parser.add_argument("--problems", type=int, default=512, help="held-out prompts")
    parser.add_argument("--sft", type=Path, metavar="MODEL", help="the quickstart's SFT model, if it is there already")
    parser.add_argument("--json", type=Path, default=RESULTS / "cpu" / "offline_prm.json")
    options = parser.parse_args()
    out = options.out
    if not (out / "data").exists():
        rows = quickstart.make_rows(6, 0, 0, (options.prompts, options.problems, 400 * 64))
        (out / "data").mkdir(parents=True)
        quickstart.write_model(out / "data" / "model", 0)
        for name, split in rows.items():
            (out / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in split))
    sft = options.sft or out / "sft" / "model"
    if not sft.exists():
        words = [f"model.policy={out}/data/model", f"sft.data={out}/data/sft.jsonl", f"run_dir={out}/sft"]
        run(["sft", CONFIG, *words, "--resume"])
    sampling = ["--samples", str(SAMPLES), "--max-response", "40", "--batch", "512"]
    sampling += ["--reward", "prime_fast.stages.quickstart:compute_score", "--out", f"{out}/rollouts"]
    run(["rollouts", str(sft), "--data", f"{out}/data/train.jsonl", *sampling])
    labelled = out / "rollouts" / "rollouts.jsonl"
    for loss, rate in PRMS:
        words = [f"offline.data={labelled}", f"offline.epochs={EPOCHS}", f"model.policy={sft}", f"prm.loss={loss}"]
        run_dir = out / f"prm-{loss}-{rate:g}"
        words += [f"prm.lr={rate}", f"prm.mini_batch={BATCH}", f"run_dir={run_dir}", "--resume"]
        if not (run_dir / "model").exists():
            run(["prm", CONFIG, *words])
    held_out = Settings(
        model=str(sft), data=(f"{out}/data/eval.jsonl",), out=out / "eval", samples=SAMPLES, max_response=40, batch=512,
        reward="prime_fast.stages.quickstart:compute_score", prm=f"{out}/prm-response-0.001/model", reference=str(sft),
    )  # fmt: skip
    evaluate(held_out, Console())
    records = [read(out / "eval" / f"{name}.jsonl") for name in ("samples", "votes")]
    result = compare(*records, {**prms(out, sft, records[0]), **orms(sft, labelled, records[0])})
    about = {"machine": cpu_name(), "prompts": len(labelled.read_text().splitlines())}
    about |= {"samples": SAMPLES, "first_wrong_step": first_wrong_step(out, sft, records[0])}
    about |= {"mini_batch": BATCH, "epochs": EPOCHS}
    options.json.write_text(json.dumps(about | result, indent=1) + "\n")
    print(f"wrote {options.json}")


def run(words: list[str]) -> None:
    if cli.main(words):
        raise SystemExit(f"prime-fast {' '.join(words)} failed")


def read(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda record: record["problem"])


def prms(out: Path, sft: Path, samples: list[dict]) -> dict[str, np.ndarray]:
    """(P, N) beta * Q by each PRM."""
    prompts, responses = tensors(load_tokenizer(str(sft)), samples)
    options = {"beta": 0.05, "dtype": torch.float32, "device": torch.device("cpu")}
    scores = {}
    for loss, rate in PRMS:
        prm = str(out / f"prm-{loss}-{rate:g}" / "model")
        found = implicit_rewards(prm, str(sft), prompts, responses, **options)
        scores[f"prm {loss} {rate:g}"] = found.reshape(len(samples), SAMPLES).numpy()
    return scores


def tensors(tokenizer: Any, samples: list[dict]) -> tuple[list[Tensor], list[Tensor]]:
    """Prompts and responses, problem after problem."""
    asked = [torch.tensor(tokenizer(record["prompt"][0]["content"])["input_ids"]) for record in samples]
    prompts = [prompt for prompt in asked for _ in range(SAMPLES)]
    return prompts, [torch.tensor(tokens) for record in samples for tokens in record["tokens"]]


class Orm(nn.Module):
    """The logit that a response is right, from the hidden state of its last token."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.lm = PackedLM(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
        self.head = nn.Linear(self.lm.lm.config.hidden_size, 1)

    def forward(self, batch: Batch, micro: list[int]) -> tuple[Tensor, tuple[int, ...]]:
        """(R,) of the rows of a micro-batch, and which they are. What predicts a token is the hidden state before it,
        so a whole response is given as a prompt, and any token follows."""
        fed = [torch.cat([prompt, response]) for prompt, response in zip(batch.prompts, batch.responses, strict=True)]
        pack = packing.pack(micro, fed, [row[:1] for row in fed], list(range(len(fed))))
        hidden = self.lm(pack, lambda hidden, weight, bias: hidden)
        return self.head(hidden)[:, 0], pack.rows


def first_wrong_step(out: Path, sft: Path, samples: list[dict]) -> dict[str, Any]:
    """What `prime-fast score-steps` tells of the true labels of steps, on the problems of odd numbers, with the
    threshold that is best on the others. Only responses whose steps can all be read."""
    for name, part in (("even", samples[::2]), ("odd", samples[1::2])):
        with (out / f"steps-{name}.jsonl").open("w") as file:
            for record in part:
                for text, outcome in zip(record["responses"], record["outcomes"], strict=True):
                    right = quickstart.step_labels(record["prompt"][0]["content"], text)
                    if right and len(right) == text.count(",") + 1:
                        row = {"prompt": record["prompt"], "response": text, "label": outcome}
                        file.write(json.dumps(row | {"step_labels": [int(good) for _, good in right]}) + "\n")
    words = ["--reference", str(sft), "--separators", ",", "--threshold-from", f"{out}/steps-even.jsonl"]
    words += ["--out", f"{out}/steps.jsonl"]
    run(["score-steps", f"{out}/prm-response-0.001/model", f"{out}/steps-odd.jsonl", *words])
    (numbers,) = json.loads((out / "steps.summary.json").read_text())["files"].values()
    return numbers


def orms(sft: Path, labelled: Path, samples: list[dict]) -> dict[str, np.ndarray]:
    """(P, N) logits by the ORM of each learning rate."""
    tokenizer = load_tokenizer(str(sft))
    rows = load_labelled(str(labelled), tokenizer, max_tokens=64)
    scores = {}
    for rate in ORM_RATES:
        made = labelled.parents[1] / f"orm-{rate:g}.pt"
        if not made.exists():
            torch.save(train_orm(sft, rows, rate).state_dict(), made)
        orm = Orm(sft).eval()
        orm.load_state_dict(torch.load(made))
        scores[f"orm {rate:g}"] = logits(orm, *tensors(tokenizer, samples)).reshape(len(samples), SAMPLES).numpy()
    return scores


def train_orm(sft: Path, rows: Labelled, rate: float) -> Orm:
    torch.manual_seed(0)
    orm, sampler = Orm(sft), PromptSampler(len(rows), 0)
    adam = torch.optim.AdamW(orm.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(round(EPOCHS * len(rows) / BATCH)):
        batch = batch_of([(rows, i) for i in sampler.take(BATCH)])
        for (micro,) in packing.plan([length + 1 for length in batch.lengths], MICRO_TOKENS):
            logit, order = orm(batch, micro)
            loss = nn.functional.binary_cross_entropy_with_logits(logit, batch.outcome[list(order)], reduction="sum")
            (loss / BATCH).backward()
        nn.utils.clip_grad_norm_(orm.parameters(), 10.0)
        adam.step()
        adam.zero_grad()
    return orm


@torch.inference_mode()
def logits(orm: Orm, prompts: list[Tensor], responses: list[Tensor]) -> Tensor:
    lengths, zeros = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], torch.zeros(1)
    batch = Batch(prompts, responses, zeros, zeros, zeros, zeros, zeros)
    flat = torch.zeros(len(lengths))
    for (micro,) in packing.plan(lengths, MICRO_TOKENS):
        values, order = orm(batch, micro)
        flat[list(order)] = values
    return flat


def compare(samples: list[dict], votes: list[dict], scores: dict[str, np.ndarray]) -> dict:
    """Best-of-n accuracy of every method, AUC of its scores, and the paired differences of the best of 8."""
    right = np.array([[outcome >= 1 for outcome in record["outcomes"]] for record in samples])
    given = [record["votes"] for record in votes]
    chance = {"random": {n: right.mean(1) for n in SIZES}, "oracle": {n: pass_at(right, n) for n in SIZES}}
    chance["majority"] = {n: majority(given, right, n) for n in SIZES}
    chance |= {name: {n: best_of(score, right, n) for n in SIZES} for name, score in scores.items()}
    last = {name: curve[max(SIZES)] for name, curve in chance.items()}
    flat = torch.from_numpy(right.reshape(-1))
    auc = {name: area(torch.from_numpy(score.reshape(-1)), flat) for name, score in scores.items()}
    prm = {name for name in scores if name.startswith("prm")}
    others = ["majority", *(name for name in scores if name not in prm)]
    return {
        "problems": len(samples),
        "best_of": {name: {n: intervals.mean([v]) for n, v in curve.items()} for name, curve in chance.items()},
        "auc": auc,
        "best_of_8_minus": {
            name: {other: intervals.difference([last[name] - last[other]]) for other in others} for name in sorted(prm)
        },
    }


def area(score: Tensor, good: Tensor) -> float:
    return prime.area_under_curve(score[good], score[~good])


if __name__ == "__main__":
    main()
