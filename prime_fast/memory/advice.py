"""A plan against a card: does it fit, and if not, which setting mends it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from prime_fast.config import Config
from prime_fast.memory.items import GIB
from prime_fast.memory.plan import Plan

# as torch reports total_memory, which is less than what is printed on the card
CARDS = {"a100-40": 39.4, "a100-80": 79.1, "h100": 79.1, "h200": 139.7}
GRAIN = 1024  # tokens, of engine.micro_tokens

UTILIZATION = "rollout.vllm.gpu_memory_utilization"

Change = dict[str, Any]  # dotted key -> new value


def card_bytes(text: str) -> int:
    """a100-80 | a100-40 | h100 | h200, or a number of GiB. Raises ValueError for anything else."""
    gib = CARDS.get(text.lower())
    if gib is None:
        try:
            gib = float(text)
        except ValueError:
            gib = 0.0
    if not 0 < gib < float("inf"):
        raise ValueError(f"--gpu {text} is not a card known here; give one of {', '.join(CARDS)}, or a number of GiB")
    return int(gib * GIB)


def mend(plan: Plan) -> Change | None:
    """The mildest change of settings with which the run fits its card: one setting if one will do, the first of
    `_settings` that does, moved no further than needed. None if all together do not suffice."""
    settings = _settings(plan)
    for size in range(1, len(settings) + 1):
        for chosen in combinations(settings, size):
            change = {key: settings[key][-1] for key in chosen}
            if not _fits(plan, change):
                continue
            for key in chosen:  # back towards today's value, one setting after another
                change[key] = _mildest(plan, change, key, settings[key])
            return change
    return None


def apply(config: Config, change: Change) -> Config:
    tree = config.model_dump()
    for key, value in change.items():
        *parents, leaf = key.split(".")
        section = tree
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    return Config.model_validate(tree)


def row_share(config: Config) -> int:
    """Tokens of a row that one rank has to hold."""
    return -(-(config.data.max_prompt + config.rollout.max_response) // config.engine.sequence_parallel)


def _mildest(plan: Plan, change: Change, key: str, values: Sequence[Any]) -> Any:
    """The first with which it fits; with those after it it does too, and with the last it is known to."""
    return values[bisect_left(values, True, hi=len(values) - 1, key=lambda value: _fits(plan, change | {key: value}))]


def _fits(plan: Plan, change: Change) -> bool:
    return Plan(apply(plan.config, change), plan.ranks, plan.card, plan.on_gpu).fits


def _settings(plan: Plan) -> dict[str, Sequence[Any]]:
    """Values to try, nearest to today's first, by the price: a smaller cache or batch and smaller packs cost a little
    speed, recomputing up to a forward, offloading the transfer of every parameter and an optimizer step on the host."""
    config, settings = plan.config, {}
    if config.rollout.engine == "hf":
        settings["rollout.batch"] = _halves(config.rollout.batch, config.rollout.samples)
    elif not plan.rollout.apart and not plan.sizes_engine:
        settings[UTILIZATION] = _utilizations(plan)
    now, least = config.engine.micro_tokens, row_share(config)
    settings["engine.micro_tokens"] = range((now - 1) // GRAIN * GRAIN, least - 1, -GRAIN)
    if config.model.recompute not in ("auto", "all"):
        settings["model.recompute"] = ["auto"]
    if config.engine.offload == "none":
        settings["engine.offload"] = ["cpu"]
    return {key: values for key, values in settings.items() if values}


def _utilizations(plan: Plan) -> list[float]:
    """In steps of 5%: smaller ones with room for a sequence, or the next that has it where today's has not."""

    def holds(value: float) -> bool:
        return Plan(apply(plan.config, {UTILIZATION: value}), plan.ranks, plan.card).rollout.sequences >= 1

    grid = [step / 20 for step in range(2, 20)]
    if plan.rollout.sequences < 1:
        return [value for value in grid if value > plan.rollout.utilization and holds(value)][:1]
    return [value for value in reversed(grid) if value < plan.rollout.utilization and holds(value)]


def _halves(value: int, least: int) -> list[int]:
    values = []
    while value // 2 >= least:
        value //= 2
        values.append(value)
    return values
