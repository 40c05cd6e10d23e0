"""One arm in a process of its own: a JSON line on stdout for each line of stdin, `warm` or `step`."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.step import workload

ARMS = (
    "ours PRIME",
    "ours RLOO",
    "published PRIME, after",
    "published PRIME, before",
    "published RLOO",
    "TRL RLOO",
    "TRL RLOO, Liger",
    "TRL GRPO",
    "TRL GRPO, Liger",
    "rollouts",
)


def build(name: str, settings: dict[str, Any]) -> Any:
    """The arm: `step(groups) -> (Phases, what it computed)`, and `close()`."""
    whose, _, rest = name.partition(" ")
    if whose == "ours":
        from benchmarks.step.ours import Ours

        return Ours(settings, rest)
    if whose == "rollouts":
        from benchmarks.step.ours import Rollouts

        return Rollouts(settings)
    if whose == "published":
        from benchmarks.step.published import Published

        return Published(settings, rest)
    from benchmarks.step.trl_arm import Library

    return Library(settings, *rest.split(", "))


def measured(arm: Any, groups: list) -> dict[str, Any]:
    busy, began = processor_seconds(), time.perf_counter()
    phases, values = arm.step(groups)
    took = {"seconds": time.perf_counter() - began, "cpu_seconds": processor_seconds() - busy}
    memory = {name.removeprefix("memory/"): gib for name, gib in phases.memory().items()}
    seconds = {name.removeprefix("seconds/"): value for name, value in phases.seconds().items()}
    return took | {"phases": seconds, "memory_gib": memory, "peak_gib": max(memory.values()), "values": values}


def processor_seconds() -> float:
    """Of all threads of this process, which other jobs of the machine hardly stretch."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(name: str, settings: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")  # libraries may print on stdout
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    def attempt(work: Callable[[], dict[str, Any]]) -> None:
        try:
            say(work())
        except Exception as error:  # noqa: BLE001  whatever stops an arm is its row
            say({"note": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
            raise

    if settings["device"] == "cpu":
        torch.set_num_threads(settings["threads"])
    groups, arm = workload.load(settings), None

    def start() -> dict[str, Any]:
        nonlocal arm
        began = time.perf_counter()
        arm = build(name, settings)
        return {"start_seconds": time.perf_counter() - began}

    attempt(start)
    rows = {"warm": workload.shortened(groups), "step": groups}
    for line in sys.stdin:
        attempt(lambda: measured(arm, rows[line.strip()]))  # noqa: B023  called at once
    arm.close()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
