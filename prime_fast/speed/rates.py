"""How fast a card does what a step asks of it: one table, with the source of every number; measurements replace them.

S: published measurement, D: data sheet, E: estimate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # of `make gpu`, in a checkout


@dataclass(frozen=True)
class Rates:
    """FLOP/s and bytes/s of one GPU, shares of these, seconds."""

    peak: float
    peak_float32: float
    memory: float
    link: float
    network: float
    pcie: float
    host: float
    layers: float
    hf_layers: float
    attention: float
    head: float
    streaming: float
    decode: float
    collective: float
    exposed: float
    balance: float
    layer: float
    token: float
    token_eager: float
    sync: float
    wake: float

    def flops(self, float32: bool) -> float:
        return self.peak_float32 if float32 else self.peak


class Row(NamedTuple):
    values: tuple[float, float, float, float] | float  # of CARDS, or of all
    what: str
    source: str


CARDS = ("a100-40", "a100-80", "h100", "h200")
# The shares of layers and attention on an A100 are the two rates that give all four of llm-foundry's tokens/s (7B, full
# checkpointing, 8k to 64k: 3206, 2453, 1672, 1013) within 1%: 247 and 89 TFLOP/s, causal, recomputation counted.
FOUNDRY = "S: llm-foundry's table of 7B on 8 A100-80"
TABLE = {
    "peak": Row((312e12, 312e12, 989e12, 989e12), "dense bfloat16 FLOP/s", "D: NVIDIA A100, H100 and H200 SXM"),
    "peak_float32": Row((19.5e12, 19.5e12, 67e12, 67e12), "float32 FLOP/s without TF32", "D"),
    "memory": Row((1.555e12, 2.039e12, 3.35e12, 4.8e12), "bytes/s of HBM", "D"),
    "link": Row((300e9, 300e9, 450e9, 450e9), "bytes/s of NVLink, one way", "D"),
    "network": Row((25e9, 25e9, 50e9, 50e9), "bytes/s a GPU between nodes", "D: 200 and 400 Gb/s a GPU"),
    "pcie": Row((25e9, 25e9, 50e9, 50e9), "bytes/s to pinned host memory", "D: gen 4 and 5 x16, less protocol"),
    "host": Row(20e9, "bytes/s of host memory a rank, for an optimizer there", "E: 160 GB/s a socket pair, 8 ranks"),
    "layers": Row(
        (0.79, 0.79, 0.53, 0.53), "of the peak: all of a layer but attention", f"{FOUNDRY}; Hopper E: 40% MFU with 4/3"
    ),
    "hf_layers": Row(0.9, "of that speed with the norms, RoPE and SwiGLU of transformers", "E: Liger's A100 tables"),
    "attention": Row(
        (0.285, 0.285, 0.285, 0.285), "of the peak: causal attention, forward and backward", f"{FOUNDRY}; Hopper E"
    ),
    "head": Row((0.76, 0.76, 0.69, 0.69), "of the peak: LM-head ops", "E: 0.90 / 0.87 of 265 / 790 TFLOP/s GEMMs"),
    "streaming": Row((0.86, 0.86, 0.9, 0.9), "of HBM: an optimizer step", "S: copies of 1.75 and 4.3 TB/s"),
    "decode": Row(0.7, "of HBM: weights and KV in decoding", "E"),
    "collective": Row(0.7, "of the link: gathers and reductions of ZeRO-3", "E"),
    "exposed": Row(0.6, "of the shorter of computing and traffic: not hidden behind the longer", "E"),
    "balance": Row(0.97, "work over what the time allows: packing", "simulated log-normal rows"),
    "layer": Row(1e-3, "least seconds of a layer's forward under ZeRO-3's hooks", "E"),
    "token": Row(4e-3, "seconds a decoding step beside its bytes, with CUDA graphs", "E"),
    "token_eager": Row(25e-3, "the same without graphs: 28 layers in eager mode", "E"),
    "sync": Row(10e9, "bytes/s of a checked weight sync", "E: 1.5 s at 7B; verl below 0.3 s"),
    "wake": Row(2.0, "seconds an engine sleeps and wakes", "E"),
}  # fmt: skip


def known(card: str) -> bool:
    """Whether the speed of what `--gpu` names is known: a number of GiB has none."""
    return card.lower() in CARDS


def rates(card: str) -> Rates:
    index = CARDS.index(card.lower())
    return Rates(**{k: row.values[index] if isinstance(row.values, tuple) else row.values for k, row in TABLE.items()})


def measured(card: str, path: str | None) -> tuple[Rates, str]:
    """The card's rates with what was measured in their place, and where from.

    path: a folder that `make gpu` wrote or a JSON object of names in the table; None: the checkout's folder of this
    card, where there is one. Raises ValueError if it is neither.
    """
    found, place = rates(card), Path(path) if path else _results(card)
    if place is None:
        return found, "the table of prime_fast/speed/rates.py"
    if place.is_dir():
        changes = of_gpu_results(place, found)
    elif place.is_file():
        changes = _read(place)
    else:
        raise ValueError(f"--rates {path} does not exist; give a folder that `make gpu` wrote or a JSON file of rates")
    if not changes:
        raise ValueError(f"{place} holds no rate; `make gpu` writes facts.json, step.json and engine.json there")
    names = ", ".join(sorted(changes))
    return replace(found, **changes), f"{names} from {place}, else the table of prime_fast/speed/rates.py"


def of_gpu_results(folder: Path, table: Rates) -> dict[str, float]:
    """What the JSON files of `make gpu` say: copies, weight sync, and layers and attention from trainer steps at two
    lengths of row."""
    changes = {}
    if copy := _item(folder, "facts", "copy").get("gb_per_s"):
        changes["streaming"] = min(1.0, copy * 1e9 / table.memory)
    if (sync := _item(folder, "engine", "sync")).get("seconds_each"):
        changes["sync"] = sync["gib"] * 2**30 / sync["seconds_each"]
    for item in _items(folder, "step").values():  # the largest model first
        cases = [case for case in item.get("cases", []) if "forward_flops" in case]
        if len(cases) >= 2 and (pair := _two_rates(cases, table)):
            return changes | {"layers": pair[0] / table.peak, "attention": pair[1] / table.peak, "hf_layers": 1.0}
    return changes


def _two_rates(cases: list[dict], table: Rates) -> tuple[float, float] | None:
    """FLOP/s of layers and of attention that explain the policy's seconds at the shortest and the longest rows: with
    checkpointing four forwards of these, three of the head. None where no positive rates do."""
    rows = []
    for case in (min(cases, key=_length), max(cases, key=_length)):
        flops = case["forward_flops"]
        seconds = case["seconds"]["policy"] - 3 * flops["head"] / (table.head * table.peak)
        rows.append((4 * flops["layers"], 4 * flops["attention"], seconds))
    (a, b, s), (c, d, t) = rows
    if not (determinant := a * d - b * c):
        return None
    slow, steep = (s * d - b * t) / determinant, (a * t - s * c) / determinant
    return (1 / slow, 1 / steep) if slow > 0 and steep > 0 else None


def _length(case: Mapping) -> int:
    return case["row_tokens"]


def _results(card: str) -> Path | None:
    """The folder of this card's results in the checkout: nvidia-a100-sxm4-80gb is an a100-80."""
    for folder in sorted(RESULTS.glob("*")):
        if all(part in folder.name for part in card.lower().split("-")) and (folder / "step.json").is_file():
            return folder
    return None


def _items(folder: Path, stage: str) -> dict:
    path = folder / f"{stage}.json"
    return json.loads(path.read_text("utf-8")).get("items", {}) if path.is_file() else {}


def _item(folder: Path, stage: str, name: str) -> dict:
    return _items(folder, stage).get(name, {})


def _read(path: Path) -> dict[str, float]:
    try:
        tree = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"--rates {path} is no JSON: {error}") from None
    names = [field.name for field in fields(Rates)]
    if not isinstance(tree, dict):
        raise ValueError(f"--rates {path} must be a JSON object of rates such as {{'layers': 0.7}}")
    for name, value in tree.items():
        if name not in names:
            raise ValueError(f"--rates {path}: unknown rate {name}; known: {', '.join(names)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"--rates {path}: {name} is {value}; give a number above 0")
    return {name: float(value) for name, value in tree.items()}
