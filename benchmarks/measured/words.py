"""How a section of docs/measured.md reads a result and writes a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results/cpu"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def link(name: str) -> str:
    return f"[{name}](../benchmarks/results/cpu/{name})"


def made_by(name: str) -> str:
    """Of a file that holds its whole command."""
    return f"Made by `{load(name)['command']}`: {link(name)}."


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def whole(rollouts: float | None) -> str:
    return "never" if rollouts is None else f"{rollouts:.0f}"


def reached(arm: dict, levels: Iterable[str]) -> list[str]:
    """Mean rollouts to each accuracy."""
    return [whole(arm["mean"]["rollouts_to"][level]) for level in levels]


def ratio(arm: dict, base: str, level: str, key: str = "ratio") -> str:
    """Rollouts to an accuracy over the base's, with its interval; nothing for the base itself, or where no pair of
    runs has reached it. key: ratio_with_warmup also counts those that the arm's PRM was trained on before."""
    if not arm.get(base) or arm[base]["rollouts_to"][level][key] is None:
        return ""
    middle, low, high = arm[base]["rollouts_to"][level][key]
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"
