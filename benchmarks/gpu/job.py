"""One stage: named items in the order of their worth, each result on disk as soon as it is there.

FOLDER/STAGE.json holds a record: `made_by` (what the numbers are of), `planned` (the items' names), `items` (name ->
result, {"skipped": why} or {"error": text}), `running` (started, not finished), `tried` (started in the latest call),
`seconds` (of all calls together). A stage continues where its record ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "vllm",
    "flash-attn",
    "liger-kernel",
)  # whose versions count
LOST = 75  # exit code of a stage whose GPU context is spoiled: it goes on in a new process


class Stage(NamedTuple):
    name: str  # of its JSON
    seconds: float  # its limit
    what: str
    sources: tuple[str, ...]  # what its numbers are of, beside its own module: files and folders of the tree
    package: str = "benchmarks.gpu"  # where its module is


PEERS = ("benchmarks/lm_head.py", "benchmarks/peers.py", "benchmarks/advantage.py")
KERNELS = ("kernels", "csrc", "benchmarks/gpu/job.py")
STAGES = (  # 1 to 4 fit ten minutes together
    Stage("facts", 40, "facts of the machine: versions, GEMM peak, copy bandwidth", KERNELS),
    Stage("kernels", 170, "every kernel test on this chip", (*KERNELS, "tests/kernels")),
    Stage("heads", 170, "LM-head ops beside their peers, advantages beside a copy", (*KERNELS, *PEERS)),
    Stage("step", 220, "a trainer step in bfloat16: PRIME and RLOO", (*KERNELS, "prime_fast")),
    Stage("engine", 600, "the vLLM engine: agreement, memory, weight sync, recovery", (*KERNELS, "prime_fast")),
    Stage(
        "whole", 600, "whole steps beside the published dataflow and TRL", (*KERNELS, "prime_fast", "benchmarks/step")
    ),
    Stage("learn", 600, "the quickstart to its last step, SmolLM2 on GSM8K", (*KERNELS, "prime_fast", "configs")),
)


class Skipped(Exception):
    """An item that cannot run here; the text says why, and what would help."""


class Item(NamedTuple):
    name: str
    seconds: float  # what it needs on an H200: it is not started with less left
    run: Callable[[], dict[str, Any]]


@dataclass
class Job:
    path: Path
    settings: dict[str, Any]  # device, small, made_by, what the user gave, what was tried already in this call
    seconds: float = 86400.0  # for this call
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began, self.saved = time.monotonic(), 0.0
        self.record = read(self.path)
        if self.record.get("made_by") != self.settings["made_by"]:  # numbers of other code or another machine
            self.record = {"stage": self.path.stem, "made_by": self.settings["made_by"], "seconds": 0.0}
        self.record |= {"planned": [], "running": [], "tried": list(self.settings.get("tried", []))}
        self.record.setdefault("items", {})
        self.record.pop("error", None)
        self.before = self.record["seconds"]

    @property
    def device(self) -> str:
        return self.settings["device"]

    @property
    def small(self) -> bool:
        """Tiny sizes, for a rehearsal on a CPU."""
        return self.settings["small"]

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def plan(self, names: Iterable[str]) -> list[str]:
        """What this call has to do: items without a result, or with an error or a reason that may be gone by now."""
        self.record["planned"] += names
        items, tried = self.record["items"], self.record["tried"]
        return [name for name in self.record["planned"] if not has_result(items.get(name)) and name not in tried]

    def start(self, name: str) -> None:
        self.record["running"].append(name)
        self.record["tried"].append(name)
        self.save()

    def put(self, name: str, result: dict[str, Any]) -> None:
        self.record["running"] = [other for other in self.record["running"] if other != name]
        self.record["items"][name] = result
        self.save()

    def save(self) -> None:
        self.record["seconds"] = round(self.before + time.monotonic() - self.began, 1)
        write(self.path, self.record)

    def do(self, items: Iterable[Item]) -> None:
        items = list(items)
        wanted = set(self.plan(item.name for item in items))
        self.save()
        for item in items:
            if item.name not in wanted or item.seconds > self.left:
                continue
            start = time.monotonic()
            self.start(item.name)
            result = attempt(item.run)
            self.put(item.name, {"seconds": round(time.monotonic() - start, 1)} | result)
            said = result.get("error", result.get("skipped", "ok")).splitlines()
            print(f"  {item.name}: {said[-1] if said else 'error'} ({time.monotonic() - start:.0f} s)", flush=True)
            if "error" in result and self.device == "cuda" and spoiled():
                sys.exit(LOST)


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except Skipped as reason:
        return {"skipped": str(reason)}
    except Exception:  # noqa: BLE001  one item's failure must not cost the others
        return {"error": traceback.format_exc(limit=-3)[-3000:].strip()}


def spoiled() -> bool:
    """Whether this process's CUDA context is lost, as after an illegal access: nothing that follows would tell."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def has_result(result: dict | None) -> bool:
    return result is not None and "error" not in result and "skipped" not in result


def errors(record: dict) -> dict[str, str]:
    """Item -> text; the stage's own under its name."""
    found = {name: item["error"] for name, item in record.get("items", {}).items() if "error" in item}
    return ({record["stage"]: record["error"]} if "error" in record else {}) | found


def left_out(record: dict) -> list[str]:
    """Planned items that no call had the time for."""
    return [name for name in record.get("planned", []) if name not in record["items"]]


def done(record: dict, made_by: dict) -> bool:
    complete = bool(record.get("planned")) and not errors(record) and not left_out(record)
    return complete and record["made_by"] == made_by and all(map(has_result, record["items"].values()))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def write(path: Path, record: dict[str, Any]) -> None:
    """In one move: whoever is killed here leaves the file before or the file after."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(beside, path)
