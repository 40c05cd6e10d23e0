"""What the outcomes of an evaluation say: estimates with 95% intervals, tables and a picture.

A problem is solved by an outcome of 1. Intervals are over problems: Wilson's for greedy pass@1, else the bootstrap's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
from rich import box
from rich.markup import escape
from rich.table import Table

from prime_fast.evaluation.bestofn import answer_of, best_of, majority, pass_at
from prime_fast.rewards.functions import ability_of
from prime_fast.views.report import RUN_COLORS, STYLE

Z95 = 1.959964
RESAMPLES, BLOCK = 2000, 100
AVERAGE = "average"
METHODS = {
    "random": "random",
    "majority": "majority vote",
    "prm": "PRM",
    "prm_mean": "PRM per token",
    "oracle": "oracle",
}


LABEL = 24  # characters of a benchmark's name in the picture
STYLES = {"random": "--", "oracle": "--", "PRM per token": ":"}


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


def wilson(solved: int, total: int) -> Estimate:
    """Share of solved problems with Wilson's score interval."""
    share, spread = solved / total, Z95**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap(benchmarks: Sequence[np.ndarray]) -> Estimate:
    """The mean over benchmarks of the mean over problems, problems drawn again within each benchmark."""
    rng = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for values in benchmarks:
        equal = np.full(len(values), 1 / len(values))
        for start in range(0, RESAMPLES, BLOCK):
            means[start : start + BLOCK] += rng.multinomial(len(values), equal, size=BLOCK) @ values / len(values)
    means /= len(benchmarks)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(np.mean([values.mean() for values in benchmarks])), float(low), float(high))


def summarize(problems: Sequence, answers: dict[str, list[dict]], scores: list[list[float]] | None) -> dict[str, Any]:
    """{benchmark or "average" (of several): {"problems", "greedy", "response_length", "truncated" [, "avg", "pass",
    "best_of"]}}; pass and best_of are by n."""
    names = list(dict.fromkeys(problem.benchmark for problem in problems))
    where = {name: [i for i, problem in enumerate(problems) if problem.benchmark == name] for name in names}
    solved = {
        kind: np.array([[outcome >= 1 for outcome in record["outcomes"]] for record in records])
        for kind, records in answers.items()
    }
    curves = _curves(problems, answers, solved, scores)
    summary = {}
    for name in [*names, AVERAGE] if len(names) > 1 else names:
        groups = [where[name]] if name in where else list(where.values())
        some = [answers["greedy"][i] for group in groups for i in group]
        greedy = [solved["greedy"][group, 0].astype(float) for group in groups]
        summary[name] = {
            "problems": len(some),
            "greedy": wilson(int(greedy[0].sum()), len(greedy[0])) if name in where else bootstrap(greedy),
            "outcome": float(np.mean([np.mean([answers["greedy"][i]["outcomes"] for i in group]) for group in groups])),
            "response_length": sum(len(tokens) for record in some for tokens in record["tokens"]) / len(some),
            "truncated": sum(sum(record["truncated"]) for record in some) / len(some),
            **_each(curves, lambda values, groups=groups: bootstrap([values[group] for group in groups])),
        }
    return summary


def _curves(problems, answers, solved, scores) -> dict[str, Any]:
    """Values per problem (P,): {"avg", "pass": {n}, "best_of": {method: {n}}}."""
    if "samples" not in solved:
        return {}
    right = solved["samples"]
    total = right.shape[1]
    sizes = [2**i for i in range(total.bit_length()) if 2**i < total] + [total]
    curves = {"avg": right.mean(1), "pass": {n: pass_at(right, n) for n in sizes}}
    if scores is not None:
        votes = [
            [answer_of(response, ability_of(problem.row)) for response in record["responses"]]
            for problem, record in zip(problems, answers["samples"], strict=True)
        ]
        score = np.array(scores)
        length = np.array([[len(tokens) for tokens in record["tokens"]] for record in answers["samples"]])
        curves["best_of"] = {
            "random": {n: right.mean(1) for n in sizes},
            "majority": {n: majority(votes, right, n) for n in sizes},
            "prm": {n: best_of(score, right, n) for n in sizes},
            "prm_mean": {n: best_of(score / length, right, n) for n in sizes},
            "oracle": curves["pass"],
        }
        last = {method: curve[total] for method, curve in curves["best_of"].items()}
        curves["prm_minus"] = {other: last["prm"] - last[other] for other in ("random", "majority")}
    return curves


def _each(tree: Any, function: Callable[[np.ndarray], Estimate]) -> Any:
    return {key: _each(value, function) for key, value in tree.items()} if isinstance(tree, dict) else function(tree)


def tables(summary: dict[str, Any], title: str) -> list[Table]:
    first = next(iter(summary.values()))
    total = max(first["pass"]) if "pass" in first else None
    sampled = [f"avg@{total}", f"pass@{total}"] if total else []
    table = _table(escape(title), ("", "problems", "greedy pass@1", *sampled, "tokens", "truncated"))
    table.caption = "95% intervals over problems; ± is half of one"
    for name, row in summary.items():
        if name == AVERAGE:
            table.add_section()
        samples = [_short(row["avg"]), _short(row["pass"][total])] if total else []
        length, truncated = f"{row['response_length']:.0f}", f"{row['truncated']:.1%}"
        table.add_row(escape(name), str(row["problems"]), _cell(row["greedy"]), *samples, length, truncated)
    return [table] + ([_best_of_table(summary)] if "best_of" in first else [])


def _best_of_table(summary: dict[str, Any]) -> Table:
    table = _table("Best of n samples", ("", "n", *METHODS.values()))
    for name, row in summary.items():
        table.add_section()
        for n in row["best_of"]["prm"]:
            table.add_row(escape(name), str(n), *(_short(row["best_of"][method][n]) for method in METHODS))
    gains = ", ".join(f"{_points(gain)} to {METHODS[other]}" for other, gain in row["prm_minus"].items())
    table.caption = f"{escape(name)}, n = {n}: PRM {gains}"
    return table


def _table(title: str, headers: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    return table


def _cell(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def _short(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} ±{50 * (estimate.high - estimate.low):.1f}"


def _points(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def draw(summary: dict[str, Any], title: str) -> Figure:
    """Accuracy per benchmark and, where there are samples, pass@k and best-of-n (of the average if there is one)."""
    whole = summary.get(AVERAGE) or next(iter(summary.values()))
    panels = [_draw_accuracy] + [_draw_curves] * ("pass" in whole)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(panels), 3.2 + 0.2 * len(summary)), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel(axes, summary, whole)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    return figure


def _draw_accuracy(axes: Axes, summary: dict[str, Any], whole: dict[str, Any]) -> None:
    keys = {"greedy": "greedy"} | ({"avg": f"mean of {max(whole['pass'])} samples"} if "avg" in whole else {})
    for i, (key, label) in enumerate(keys.items()):
        points = [row[key] for row in summary.values()]
        places = np.arange(len(points)) + 0.24 * (i - (len(keys) - 1) / 2)
        errors = [[point.value - point.low for point in points], [point.high - point.value for point in points]]
        values = [point.value for point in points]
        axes.errorbar(values, places, xerr=errors, fmt="o", color=RUN_COLORS[i], capsize=2, label=label)
        for value, place in zip(values, places, strict=True):
            axes.annotate(
                f"{100 * value:.1f}", (value, place), (0, 5), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_yticks(range(len(summary)), [name if len(name) <= LABEL else f"…{name[-LABEL:]}" for name in summary])
    axes.set_ylim(len(summary) - 0.5, -0.6 - 0.1 * len(summary))  # downwards, with room for the legend
    highest = max(row[key].high for row in summary.values() for key in keys)
    axes.set_xlim(-0.02, min(1.05, 1.2 * highest + 0.02))
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.set_title("Accuracy, 95% intervals")
    if len(keys) > 1:
        axes.legend(loc="upper right", ncols=2)


def _draw_curves(axes: Axes, summary: dict[str, Any], whole: dict[str, Any]) -> None:
    curves = {METHODS[method]: curve for method, curve in whole.get("best_of", {}).items()} or {"pass@n": whole["pass"]}
    for color, (label, curve) in zip(RUN_COLORS, curves.items(), strict=False):
        sizes = list(curve)
        style = STYLES.get(label, "-")
        values = [point.value for point in curve.values()]
        axes.plot(sizes, values, style, color=color, marker="o", markersize=3.5, label=label)
        low, high = ([getattr(point, end) for point in curve.values()] for end in ("low", "high"))
        axes.fill_between(sizes, low, high, color=color, alpha=0.1, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.set_xlabel("n, samples to choose from")
    axes.set_title(("Best of n" if len(curves) > 1 else "pass@n") + (", average" if AVERAGE in summary else ""))
    axes.legend(loc="best")
