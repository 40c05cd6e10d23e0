"""What happens to the runs: a seeded list of events, each with the kind it belongs to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.chaos.victim import Plan

PHASES = (
    "generate", "reward", "reference", "prm", "advantage", "old_logprobs", "policy", "sync", "eval", "checkpoint",
)  # fmt: skip
WRITES = {  # kinds of file that a run writes
    "metrics": r"metrics\.jsonl$",
    "samples": r"samples\.jsonl$",
    "responses": r"eval/\.step-\d+\.jsonl\.new$",
    "model": r"policy/.*safetensors$|/policy/config\.json$",
    "shards": r"state/prm/rank-\d+\.safetensors$",
    "trainer": r"state/trainer\.pt$",
    "manifest": r"\.manifest\.json\.new$",
    "pointer": r"checkpoints/\.latest\.new$",
}
PARTS = (  # of a checkpoint, each damaged in every way
    "policy/model.safetensors", "policy/config.json", "policy/tokenizer.json", "prm/model.safetensors",
    "state/trainer.pt", "state/identity.json", "state/policy/rank-*.safetensors", "state/prm/rank-*.safetensors",
    "manifest.json",
)  # fmt: skip
DAMAGES = ("truncated", "flipped", "missing")


@dataclass(frozen=True)
class Event:
    kind: str
    plan: Plan | None = None  # of whose rank the process harms itself
    ranks: int = 1
    command: str = "train"
    engine: str = "hf"
    overrides: tuple[str, ...] = ()
    small_disk: bool = False
    part: str = ""  # of a checkpoint
    damage: str = ""  # to it


def events(seed: int, hang: float) -> Iterator[Event]:
    """All events of a seed. hang: the limit where a rank is stopped for good."""
    draw = random.Random(seed)

    def plan(harm: str, latest: int = 2, **when) -> Plan:
        return Plan(harm, nth=draw.randint(1, latest), seed=draw.getrandbits(32), **when)

    for phase in PHASES:
        for fraction in (0.0, draw.random()):
            yield Event("kill the trainer", plan("kill", phase=phase, fraction=fraction))
    for _ in range(6):
        yield Event("kill the trainer amid a checkpoint", plan("kill", 60, change=True))
    for name in ("metrics", "samples", "responses"):
        torn = replace(plan("tear", opens=WRITES[name]), keep_bytes=draw.randint(1, 100))
        yield Event("kill the trainer amid a line", torn)
    for phase in ("generate", "prm", "policy", "eval"):
        yield Event("ask the trainer to leave", plan("ask", phase=phase))
    for phase in ("generate", "policy"):
        yield Event("stop the trainer for a while", plan("stop", phase=phase, fraction=draw.random()))
    for harm in ("kill worker", "kill worker", "pause worker"):
        yield Event(f"{harm} of the reward", plan(harm, phase="reward", fraction=draw.random()))
    yield Event("kill SFT", plan("kill", 5, phase="train"), command="sft")
    yield Event("kill SFT amid a checkpoint", plan("kill", 60, change=True), command="sft")
    for rank, phase in enumerate(("generate", "prm", "sync", "checkpoint")):
        yield Event("kill one of two ranks", replace(plan("kill", phase=phase), rank=rank % 2), ranks=2)
    yield Event("ask one of two ranks to leave", replace(plan("ask", phase="prm"), rank=1), ranks=2)
    limit = (f"log.hang={hang:g}",)
    for rank, phase in enumerate(("policy", "generate")):
        stopped = replace(plan("stop", phase=phase), rank=1 - rank)
        yield Event("stop one of two ranks for good", stopped, ranks=2, overrides=limit)
    for name in WRITES:
        yield Event(f"a full disk, {name}", plan("fill", opens=WRITES[name]), small_disk=True)
    for part in PARTS:
        for damage in DAMAGES:
            yield Event("a damaged checkpoint", part=part, damage=damage)
    yield Event("a damaged checkpoint", part="../latest", damage="missing")
    for phase in ("generate", "sync"):
        yield Event("kill the trainer", plan("kill", phase=phase), engine="vllm")
    for harm in ("kill engine", "pause engine"):
        yield Event(harm, plan(harm, phase="generate"), engine="vllm")
    for phase in ("generate", "reward", "reference", "prm", "policy", "sync", "eval", "checkpoint"):
        yield Event("kill the trainer", plan("kill", phase=phase, fraction=draw.random()), engine="vllm")
    for phase in ("generate", "policy", "sync", "eval"):
        yield Event("kill engine", plan("kill engine", phase=phase, fraction=draw.random()), engine="vllm")
    for phase in ("policy", "sync"):
        yield Event("pause engine", plan("pause engine", phase=phase), engine="vllm")
    yield Event("ask the trainer to leave", plan("ask", phase="generate"), engine="vllm")
    yield Event("kill worker of the reward", plan("kill worker", phase="reward"), engine="vllm")
    for rank, phase in enumerate(("generate", "policy")):
        killed = replace(plan("kill", phase=phase), rank=rank)
        yield Event("kill one of two ranks", killed, ranks=2, engine="vllm")


def damage(checkpoint: Path, part: str, how: str, draw: random.Random) -> Path:
    """Do it to the file; returns it."""
    (path,) = checkpoint.glob(part) if "*" in part else [checkpoint / part]
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        place = draw.randrange(len(content) // 2, len(content))  # behind what describes the rest
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
    return path
