"""The tables and the picture of an evaluation's summary."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
from rich import box
from rich.markup import escape
from rich.table import Table

from prime_fast.evaluation.intervals import Estimate
from prime_fast.evaluation.summary import AVERAGE, METHODS
from prime_fast.views.report import RUN_COLORS, STYLE

LABEL = 24  # characters of a benchmark's name in the picture
STYLES = {"random": "--", "oracle": "--", "PRM per token": ":"}


def tables(summary: dict[str, Any], title: str) -> list[Table]:
    first = next(iter(summary.values()))
    total = max(first["pass"]) if "pass" in first else None
    sampled = [f"avg@{total}", f"pass@{total}"] if total else []
    table = _table(escape(title), ("", "problems", "greedy pass@1", *sampled, "tokens", "truncated"))
    table.caption = "95% intervals over problems"
    for name, row in summary.items():
        if name == AVERAGE:
            table.add_section()
        samples = [_cell(row["avg"]), _cell(row["pass"][total])] if total else []
        length, truncated = f"{row['response_length']:.0f}", f"{row['truncated']:.1%}"
        table.add_row(escape(name), str(row["problems"]), _cell(row["greedy"]), *samples, length, truncated)
    return [table] + ([_best_of_table(summary)] if "best_of" in first else [])


def _best_of_table(summary: dict[str, Any]) -> Table:
    table = _table("Best of n samples", ("", "n", *METHODS.values()))
    for name, row in summary.items():
        table.add_section()
        for n in row["best_of"]["prm"]:
            table.add_row(escape(name), str(n), *(_cell(row["best_of"][method][n]) for method in METHODS))
    gains = ", ".join(f"{_points(gain)} to {METHODS[other]}" for other, gain in row["prm_minus"].items())
    table.caption = f"{escape(name)}, n = {n}: PRM {gains}"
    return table


def comparison(result: dict[str, Any], model: str, against: str) -> Table:
    """Of what `summary.compare` returns."""
    first = next(iter(result.values()))
    most = max(first["pass"]) if first.get("pass") else None
    sampled = ["avg@k", f"pass@{most}"] if most else []
    headers = ("", "problems", "greedy", "against", "difference", "only this", "only that", *sampled)
    table = _table(f"{escape(model)} against {escape(against)}", headers)
    table.caption = "differences with 95% intervals, paired by problem"
    for name, row in result.items():
        if name == AVERAGE:
            table.add_section()
        samples = [_points(row["avg"]), _points(row["pass"][most])] if most else []
        shares = [f"{100 * row[key]:.1f}" for key in ("accuracy", "against")]
        only = [str(row[key]) for key in ("only_ours", "only_theirs")]
        table.add_row(escape(name), str(row["problems"]), *shares, _points(row["greedy"]), *only, *samples)
    return table


def _table(title: str, headers: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    return table


def _cell(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


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
