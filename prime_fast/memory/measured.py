"""The plan beside what was measured, so that it can be wrong only once."""

from __future__ import annotations

import torch

from prime_fast.config import Config
from prime_fast.engine import distributed
from prime_fast.memory.items import GIB
from prime_fast.memory.plan import Plan
from prime_fast.metrics import resident

MEASURED, PLANNED = "memory/", "memory_plan/"
# a peak beyond the plan is worth a sentence from this share of it on, and this many GiB: on a CPU, libraries and the C
# allocator take 0.2 to 0.4 GiB by the way
SHARE, LEAST = 0.1, 0.5


def plan(config: Config, device: torch.device) -> Plan:
    """For this machine, the same on every rank: of the smallest card among them."""
    on_gpu = device.type == "cuda"
    cards = distributed.gather_lists([torch.cuda.mem_get_info(device)[1]] if on_gpu else [])
    return Plan(config, distributed.world_size(), min(cards, default=None), on_gpu)


def planned(plan: Plan) -> dict[str, float]:
    """{"memory_plan/<phase>": GiB} of the trainer itself; on a CPU with what its process holds now."""
    start = 0 if plan.on_gpu else resident()
    return {PLANNED + phase: (start + peak) / GIB for phase, peak in plan.trainer_peaks().items()}


def beside(measured: dict[str, float], plan: dict[str, float]) -> dict[str, float]:
    """The phases that ran, as measured (the most of any rank; every rank calls) and as planned."""
    ranks = distributed.gather_lists([measured])
    peaks = {name: max(rank.get(name, 0.0) for rank in ranks) for name in measured}
    return peaks | {name: gib for name, gib in plan.items() if name.replace(PLANNED, MEASURED) in peaks}


def beyond(record: dict[str, float]) -> list[str]:
    """A sentence for every phase of the record that took notably more than planned."""
    sentences = []
    for name, plan in record.items():
        phase = name.removeprefix(PLANNED)
        peak = record.get(MEASURED + phase, 0.0)
        if phase != name and peak > plan + max(SHARE * plan, LEAST):
            sentences.append(
                f"memory: {phase} took {peak:.1f} GiB at its peak, {peak / plan - 1:.0%} more than the {plan:.1f} GiB "
                "that were planned; leave that much more room, and please report it"
            )
    return sentences
