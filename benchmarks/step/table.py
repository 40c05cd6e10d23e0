"""What the measured rounds come to: a row an arm, the comparisons that were asked for, tables and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.table import grid, stacked
from benchmarks.lm_head import summary
from prime_fast.engine.batch import Batch, Group

TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}  # of losses, gradient norms and mean log-probs, absolute or relative
SAME = {  # arms that compute the same
    "published PRIME, after": "ours PRIME",
    "published PRIME, before": "ours PRIME",
    "published RLOO": "ours RLOO",
}
PHASES = ("reference", "prm", "advantage", "old_logprobs", "policy", "rollouts")
RATIOS = [  # slower arm, faster arm, at least this many times, by case
    *((slow, fast, {"long-tailed": 2.5, "uniform": 2.5}) for slow, fast in SAME.items()),
    *(
        (f"TRL {name}", "ours RLOO", {"long-tailed": 2.0, "uniform": 1.3})
        for name in ("RLOO", "RLOO, Liger", "GRPO", "GRPO, Liger")
    ),
]
PRICE = 1.35  # of process rewards: PRIME over RLOO, both with rollouts before


def summarised(rows: Iterable[dict[str, Any]], groups: list[Group], device: str) -> Iterator[dict[str, Any]]:
    """Medians over the rounds, and a note where an arm does not compute what another one does."""
    batch, rows = Batch.of(groups), list(rows)
    tokens = sum(batch.lengths)
    by_arm = {row["arm"]: row for row in rows}
    for row in rows:
        rounds = row["rounds"]
        if not rounds:
            yield row
            continue
        seconds, spread = summary([r["seconds"] for r in rounds])
        row |= {"seconds": seconds, "spread_seconds": spread, "tokens": tokens, "tokens_per_second": tokens / seconds}
        row["cpu_seconds"] = statistics.median(r["cpu_seconds"] for r in rounds)
        row["longest_row"], row["mean_row"] = max(batch.lengths), tokens / len(batch.lengths)
        row["phases"] = {name: statistics.median(r["phases"][name] for r in rounds) for name in rounds[0]["phases"]}
        row["peak_gib"] = max(r["peak_gib"] for r in rounds)
        if row["arm"] == "rollouts":  # sampled in another process
            row["cpu_seconds"] = row["peak_gib"] = None
        row["values"] = rounds[-1]["values"]
        twin = by_arm.get(SAME.get(row["arm"]), {"rounds": []})["rounds"]
        expected = dict(twin[0]["values"]) if twin else {}
        expected["mean_logprob"] = float(batch.engine_logprob.mean())
        if note := disagreement(rounds, expected, TOLERANCE[device]):
            row["note"] = note
        yield row


def disagreement(rounds: list[dict], expected: dict[str, float], tolerance: float) -> str | None:
    for values in (r["values"] for r in rounds):
        for key in values.keys() & expected.keys():
            if not math.isclose(values[key], expected[key], rel_tol=tolerance, abs_tol=tolerance):
                return f"disagrees: {key} is {values[key]:.6g}, should be {expected[key]:.6g}"
    return None


def comparisons(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        seconds = {row["arm"]: row["seconds"] for row in rows if row["case"] == case and "seconds" in row}
        for slow, fast, least in RATIOS:
            if slow in seconds and fast in seconds:
                ratio = seconds[slow] / seconds[fast]
                what = f"{slow} / {fast}"
                found.append({"case": case, "what": what, "ratio": ratio, "at_least": least[case]})
        if {"ours PRIME", "ours RLOO"} <= seconds.keys():
            prime, rloo, sampled = seconds["ours PRIME"], seconds["ours RLOO"], seconds.get("rollouts")
            found.append({"case": case, "what": "ours PRIME / ours RLOO, after the rollouts", "ratio": prime / rloo})
            if sampled:
                ratio = (prime + sampled) / (rloo + sampled)
                what = "ours PRIME / ours RLOO, rollouts included"
                found.append({"case": case, "what": what, "ratio": ratio, "at_most": PRICE})
    return found


def met(comparison: dict[str, Any]) -> bool | None:
    if "at_least" in comparison:
        return comparison["ratio"] >= comparison["at_least"]
    return comparison["ratio"] <= comparison["at_most"] if "at_most" in comparison else None


def rows(found: list[dict[str, Any]]) -> str:
    lines = []
    for row in found:
        phases = [f"{row['phases'][name]:.2f}" if name in row.get("phases", {}) else "" for name in PHASES]
        numbers = [""] * 4
        if "seconds" in row:
            peak = f"{row['peak_gib']:.2f}" if row["peak_gib"] else ""
            numbers = [f"{row['seconds']:.2f}", f"{row['spread_seconds']:.2f}", f"{row['tokens_per_second']:.0f}", peak]
        lines.append([row["case"], row["arm"], *numbers, *phases, row.get("note", "")])
    return grid(["lengths", "arm", "step s", "±", "tokens/s", "peak GiB", *PHASES, "note"], lines)


def compared(found: list[dict[str, Any]]) -> str:
    lines = []
    for item in found:
        target = (
            f">= {item['at_least']}" if "at_least" in item else f"<= {item['at_most']}" if "at_most" in item else ""
        )
        verdict = {True: "met", False: "missed", None: ""}[met(item)]
        lines.append([item["case"], item["what"], f"{item['ratio']:.2f}", target, verdict])
    return grid(["lengths", "seconds", "ratio", "target", ""], lines)


def plot(found: list[dict[str, Any]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure  # a machine that only measures may lack it

    cases = list(dict.fromkeys(row["case"] for row in found))
    figure = Figure(figsize=(8, 0.8 + 3 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), squeeze=False)[:, 0]
    for axis, case in zip(axes, cases, strict=True):
        ran = [row for row in found if row["case"] == case and "seconds" in row]
        stacked(axis, [row["arm"] for row in ran], [row["phases"] for row in ran], PHASES)
        axis.set_title(f"{case} rows", fontsize=9)
        axis.tick_params(labelsize=7)
    axes[0].legend(fontsize=7, ncols=2)
    axes[-1].set_xlabel("seconds", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
