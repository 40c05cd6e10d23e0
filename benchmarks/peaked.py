"""How much of the LM head's backward a peaked model leaves empty: blocks of dlogits in which every entry is tiny.

    python -m benchmarks.peaked MODEL_DIR GSM8K.jsonl [--tokens 4096]

Hidden states of a trained model on the answers of GSM8K. A block is 128 tokens x 128 vocabulary entries, the least that
a GEMM kernel could skip; it is empty at a threshold if |one-hot - p| stays below it throughout. For each threshold: the
share of empty blocks, and what skipping them does to the gradients, beside what rounding dlogits to bfloat16 (which
tensor cores need anyway) does to them. Writes benchmarks/results/cpu/peaked.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 128
THRESHOLDS = {f"2^-{n}": 2.0**-n for n in (12, 14, 16, 20)}  # 2^-12: the default of Apple's CCE for bfloat16


@torch.no_grad()
def hidden_states(model_dir: str, rows: Path, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden (N, H), weight (V, H), targets (N,)) of the first `tokens` answer tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    hidden, targets = [], []
    for line in rows.open():
        row = json.loads(line)
        text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["extra_info"]["solution"], add_special_tokens=False)["input_ids"]
        states = model.model(torch.tensor([prompt + answer])).last_hidden_state[0]
        hidden.append(states[len(prompt) - 1 : -1])
        targets.append(torch.tensor(answer))
        if sum(map(len, targets)) >= tokens:
            break
    return torch.cat(hidden)[:tokens], model.get_output_embeddings().weight, torch.cat(targets)[:tokens]


def occupied(dlogits: Tensor, threshold: float) -> Tensor:
    """(N, V) bool: the entry's block holds something of at least the threshold. N is a multiple of BLOCK."""
    rows, columns = dlogits.shape
    padded = torch.nn.functional.pad(dlogits.abs(), (0, -columns % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax((1, 3)) >= threshold
    return blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:, :columns]


class Gradient:
    """dX and dW of one way to treat dlogits, and how far they are from the exact ones."""

    def __init__(self, weight: Tensor):
        self.dhidden, self.dweight, self.kept, self.seen = [], torch.zeros_like(weight), 0.0, 0

    def add(self, dlogits: Tensor, scale: Tensor, hidden: Tensor, weight: Tensor, kept: Tensor | None = None) -> None:
        self.kept += dlogits.numel() if kept is None else kept.sum().item()
        self.seen += dlogits.numel()
        scaled = dlogits * scale[:, None]
        self.dhidden.append(scaled @ weight)
        self.dweight += scaled.T @ hidden

    def against(self, exact: Gradient) -> dict:
        found = {"skipped": 1 - self.kept / self.seen}
        pairs = {"dX": (torch.cat(self.dhidden), torch.cat(exact.dhidden)), "dW": (self.dweight, exact.dweight)}
        for name, (mine, true) in pairs.items():
            found[f"{name} relative error"] = ((mine - true).norm() / true.norm()).item()
            found[f"{name} bfloat16 entries that differ"] = (mine.bfloat16() != true.bfloat16()).float().mean().item()
            found[f"{name} median relative error of a row"] = (
                ((mine - true).norm(dim=1) / true.norm(dim=1)).median().item()
            )
        found["dW rows lost"] = ((self.dweight == 0).all(1) & (exact.dweight != 0).any(1)).float().mean().item()
        return found


@torch.no_grad()
def study(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict:
    """Treatment -> what it skips and changes. Every token's advantage is drawn from a normal distribution.

    "sorted": the vocabulary in the order of the tokens' mean probability, so that blocks have like entries.
    """
    advantage = torch.randn(len(targets), generator=torch.Generator().manual_seed(0))
    chunks = [slice(start, start + BLOCK) for start in range(0, len(targets) - BLOCK + 1, BLOCK)]

    def probs(rows: slice) -> Tensor:
        return torch.softmax(hidden[rows] @ weight.T, -1)

    order = sum(probs(rows).sum(0) for rows in chunks).argsort(descending=True)
    place = order.argsort()
    names = ["exact", "bfloat16 dlogits", *THRESHOLDS, *(f"{name}, sorted" for name in THRESHOLDS)]
    gradients, top = {name: Gradient(weight) for name in names}, []
    for rows in chunks:
        p = probs(rows)
        top.append(p.amax(1))
        dlogits = -p.scatter_add(1, targets[rows, None], -torch.ones(BLOCK, 1))
        rest = advantage[rows], hidden[rows], weight
        gradients["exact"].add(dlogits, *rest)
        gradients["bfloat16 dlogits"].add(dlogits.bfloat16().float(), *rest)
        for name, threshold in THRESHOLDS.items():
            for treatment, kept in (
                (name, occupied(dlogits, threshold)),
                (f"{name}, sorted", occupied(dlogits[:, order], threshold)[:, place]),
            ):
                gradients[treatment].add(dlogits * kept, *rest, kept)
    exact = gradients.pop("exact")
    return {
        "tokens": exact.seen // weight.shape[0],
        "median largest probability": torch.cat(top).median().item(),
        "treatments": {name: gradient.against(exact) for name, gradient in gradients.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peaked", description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/cpu/peaked.json")
    arguments = parser.parse_args()
    found = study(*hidden_states(arguments.model, arguments.rows, arguments.tokens))
    text = json.dumps({"model": Path(arguments.model).name, "rows": arguments.rows.name} | found, indent=1)
    arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
