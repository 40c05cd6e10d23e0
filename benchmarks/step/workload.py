"""What every arm trains on: a random model, a PRM a little away from it, and rows with their rollouts.

Rollouts are given, not sampled: random tokens with the log-probs that the model itself gives them, so that the
trainer's check of engine against trainer holds, and outcomes 0 and 1 in every group. With a learning rate of 0, which
every arm uses, each step computes the same numbers again: arms can be compared in every round.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from prime_fast.engine.batch import Group, Sample

K = 4  # rows a group
SPREAD = 0.8  # of the logarithm of a length: the mean row is 0.4 of the longest, as reasoning leaves it
MEDIAN = 0.3  # of the longest
SHORT = 8  # uniform rows are so many times shorter than the longest
WARM = 8  # response tokens of the rows that warm an arm up
PRM_NOISE = 0.02  # of a parameter's spread: a PRM equal to its reference would reward nothing
END, FIRST = 0, 2  # the token that ends a response; ordinary ones from FIRST on (1 pads)

SHAPES: dict[str, dict[str, Any]] = {  # "30M" is Llama's, SmolLM2's vocabulary; the others are Qwen2.5's
    "30M": {"hidden_size": 320, "num_hidden_layers": 12, "num_attention_heads": 5, "intermediate_size": 864},
    "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864},
    "1.5B": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96},
}
VOCABULARY = {"30M": 49152, "0.5B": 151936, "1.5B": 151936, "tiny": 300}
CASES = ("long-tailed", "uniform")


def lengths(case: str, rows: int, longest: int) -> list[int]:
    """Response tokens of each row: the quantiles of the case's distribution, in a fixed random order."""
    if case == "uniform":
        return [longest // SHORT] * rows
    normal = statistics.NormalDist(math.log(MEDIAN * longest), SPREAD)
    quantiles = [normal.inv_cdf((i + 0.5) / rows) for i in range(rows)]
    found = [min(longest, max(2, round(math.exp(value)))) for value in quantiles]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order]


def prompt_room(longest: int) -> int:
    """Tokens of the longest prompt."""
    return max(4, longest // 32)


def write_models(folder: Path, shape: str, longest: int, device: str) -> None:
    """folder/policy and folder/prm, as transformers loads them."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    make, heads = (Qwen2Config, 2) if shape in ("0.5B", "1.5B") else (LlamaConfig, None)
    config = make(
        **SHAPES[shape],
        num_key_value_heads=heads or SHAPES[shape]["num_attention_heads"],
        vocab_size=VOCABULARY[shape],
        max_position_embeddings=2 * longest,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype_of(device))
        model.save_pretrained(folder / "policy")
        with torch.no_grad():
            for parameter in model.parameters():
                spread = parameter.float().std() if parameter.numel() > 1 else 0.0
                parameter.add_(torch.randn_like(parameter) * (PRM_NOISE * spread))
        model.save_pretrained(folder / "prm")


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


@torch.no_grad()
def make_groups(folder: Path, case: str, rows: int, longest: int, device: str) -> list[Group]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype_of(device)).to(device).eval()
    generator = torch.Generator().manual_seed(len(case))
    room, drawn = prompt_room(longest), lengths(case, rows, longest)

    def draw(size: int) -> torch.Tensor:
        return torch.randint(FIRST, model.config.vocab_size, (size,), generator=generator)

    def sample(prompt: torch.Tensor, length: int) -> Sample:
        tokens = torch.cat([draw(length - 1), torch.tensor([END])])
        ids = torch.cat([prompt, tokens]).to(device)
        hidden = model.base_model(ids[None, :-1]).last_hidden_state[0, len(prompt) - 1 :]
        parts = [  # not all logits at once
            model.get_output_embeddings()(part).float().log_softmax(-1).gather(1, target[:, None])[:, 0].cpu()
            for part, target in zip(hidden.split(1024), ids[len(prompt) :].split(1024), strict=True)
        ]
        return Sample(tokens, torch.cat(parts), False)

    groups = []
    for g in range(rows // K):
        prompt = draw(int(torch.randint(room // 2, room + 1, (1,), generator=generator)))
        samples = tuple(sample(prompt, length) for length in drawn[g * K : (g + 1) * K])
        groups.append(Group(g, g, tuple(prompt.tolist()), samples, tuple(float(k <= g % (K - 1)) for k in range(K))))
    return groups


def shortened(groups: list[Group]) -> list[Group]:
    """The same groups, responses cut to a few tokens: a step on them makes the optimizer states and loads libraries."""
    return [
        Group(g.id, g.row, g.prompt, tuple(Sample(s.tokens[:WARM], s.logprob[:WARM], True) for s in g.samples),
              g.outcomes)
        for g in groups
    ]  # fmt: skip


def make(settings: dict[str, Any]) -> None:
    """The models, and the groups of every case in folder/CASE.pt."""
    folder, device = Path(settings["folder"]), settings["device"]
    if device == "cpu":
        torch.set_num_threads(settings["threads"])
    write_models(folder, settings["shape"], settings["longest"], device)
    for case in settings["cases"]:
        groups = make_groups(folder, case, settings["rows"], settings["longest"], device)
        torch.save(groups, folder / f"{case}.pt")


def load(settings: dict[str, Any]) -> list[Group]:
    return torch.load(Path(settings["folder"], f"{settings['case']}.pt"), weights_only=False)


def micro_tokens(settings: dict[str, Any]) -> int:
    """Tokens of a micro-batch in every arm that has a choice: room for the longest row."""
    return settings["longest"] + prompt_room(settings["longest"])


if __name__ == "__main__":  # in a process of its own, so that nothing stays on the device
    make(json.loads(sys.argv[1]))
