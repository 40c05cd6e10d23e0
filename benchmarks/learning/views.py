"""The study's pictures and tables."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from textwrap import fill

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.learning.arms import BASE
from benchmarks.learning.summary import LEVELS, THIRDS
from prime_fast.views.report import RUN_COLORS, STYLE

LINES = 6  # of one picture
LEGEND_COLUMNS = 52


def pictures(results: dict, path: Path) -> list[Path]:
    """PATH.png, and PATH-2.png, ... where there are more arms than a picture holds; RLOO is in each."""
    others = [name for name in results if name != BASE]
    base = [name for name in results if name == BASE]
    size = LINES - len(base)
    parts = [others[i : i + size] for i in range(0, len(others), size)] or [[]]
    paths = [path.with_name(f"{path.stem}-{i + 1}.png" if i else f"{path.stem}.png") for i in range(len(parts))]
    for target, part in zip(paths, parts, strict=True):
        plot({name: results[name] for name in [*base, *part]}, target)
    return paths


def plot(results: dict, path: Path) -> None:
    """Accuracy over rollouts: the mean of each arm, and the band that holds it with 95%. Below it, where it was
    measured, how well the PRM tells right from wrong steps."""
    has_auc = any(result["mean"].get("step_auc") for result in results.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 7.5 if has_auc else 5), layout="constrained")
        ratios = (2, 1) if has_auc else (1,)
        axes, *below = figure.subplots(len(ratios), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        for color, result in zip(RUN_COLORS, results.values(), strict=False):
            mean = result["mean"]
            ends = f"{mean['start_accuracy']:.1%} → {mean['final_accuracy']:.1%}"
            label = fill(f"{result['label']}: {ends}, {len(result['seeds'])} seeds", LEGEND_COLUMNS)
            _curve(axes, mean["curve"], "accuracy", color, label)
            if mean.get("step_auc"):
                _curve(*below, mean["step_auc"], "auc", color, None)
        axes.set_title("Held-out greedy accuracy: means over seeds, and their 95% intervals")
        axes.set_ylim(0, 1)
        axes.legend(loc="lower right", fontsize=9)
        for lower in below:
            lower.set_title("PRM: does a right step's log-ratio exceed a wrong one's? (AUC)")
            lower.set_ylim(0.4, 1)
        figure.axes[-1].set_xlabel("rollouts")
        figure.axes[-1].xaxis.set_major_formatter("{x:,.0f}")
        for each in figure.axes:
            each.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g}%")
        figure.savefig(path, dpi=150)


def _curve(axes: Axes, curve: dict, key: str, color: str, label: str | None) -> None:
    if "low" in curve:
        axes.fill_between(curve["rollouts"], curve["low"], curve["high"], color=color, alpha=0.15, linewidth=0)
    axes.plot(curve["rollouts"], curve[key], color=color, linewidth=2.2, label=label)


def markdown(results: dict) -> str:
    """One row an arm, and one row an arm against RLOO."""
    return "\n\n".join(table for table in (arm_table(results), pair_table(results)) if table)


def arm_table(results: dict) -> str:
    levels = " / ".join(map(str, LEVELS))
    rows = [["arm", "seeds", "start", "final per seed", "final", "mean over the run", f"rollouts to {levels}"]]
    rows[0] += ["warm-up rollouts", "PRM pair accuracy by thirds", "step AUC by thirds"]
    rows[0] += ["s/step: generate, PRM, reference, policy, all"]
    for result in results.values():
        mean, runs = result["mean"], result["seeds"]
        seconds = [mean["seconds_per_step"].get(p, 0) for p in ("generate", "prm", "reference", "policy", "whole")]
        row = [result["label"], f"{len(runs)}", f"{mean['start_accuracy']:.3f}"]
        row += [", ".join(f"{run['final_accuracy']:.3f}" for run in runs.values())]
        row += [f"{mean['final_accuracy']:.3f}", f"{mean['mean_accuracy']:.3f}"]
        row += [" / ".join(_cost(x, mean["reached"][level], len(runs)) for level, x in mean["rollouts_to"].items())]
        row += [f"{mean['warmup_rollouts']:.0f}"]
        row += [" / ".join(f"{x:.2f}" for x in mean[name] or []) or "-" for name in THIRDS]
        rows.append([*row, ", ".join(f"{x:.2f}" for x in seconds)])
    return _table(rows)


def pair_table(results: dict) -> str:
    """Empty where RLOO has no seed in common with an arm."""
    rows = [["arm", "against", "pairs", *(f"rollouts to {level}, ratio" for level in LEVELS)]]
    rows[0] += ["to 0.9, warm-up counted", "final accuracy", "mean over the run", "errors at the end, ratio"]
    bases = {"against_rloo": "RLOO", "against_rloo_unfiltered": "RLOO, no group dropped"}
    for result, key in product(results.values(), bases):
        if not (against := result.get(key)):
            continue
        seeds, levels = against["seeds"], against["rollouts_to"]
        row = [result["label"], bases[key], f"{seeds}"]
        row += [_ratio(levels[str(level)], "ratio", seeds) for level in LEVELS]
        row += [_ratio(levels["0.9"], "ratio_with_warmup", seeds)]
        row += [_range(against[f"{key}_difference"], "+.3f") for key in ("final", "mean")]
        rows.append([*row, "-" if against["error_ratio"] is None else f"{against['error_ratio']:.2f}"])
    return _table(rows) if len(rows) > 1 else ""


def _table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def _cost(value: float | None, reached: int, seeds: int) -> str:
    if value is None:
        return "never"
    return f"{value:.0f}" + (f" ({reached} of {seeds})" if reached < seeds else "")


def _ratio(level: dict, key: str, seeds: int) -> str:
    """`*`: fewer of the arm's runs reached the level than of RLOO's, so that the ratio flatters it."""
    if level[key] is None:
        return f"- (reached by {level['reached']} and {level['base_reached']})"
    missing = f" ({level['pairs']} of {seeds} pairs)" if level["pairs"] < seeds else ""
    return _range(level[key], ".2f") + missing + (" *" if level["reached"] < level["base_reached"] else "")


def _range(values: list[float | None], form: str) -> str:
    middle, low, high = values
    return f"{middle:{form}}" + ("" if low is None else f" [{low:{form}}, {high:{form}}]")
