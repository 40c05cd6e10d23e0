"""One picture and one table of one or several runs, from their metrics.jsonl."""

from __future__ import annotations

import math
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from rich.table import Table

from prime_fast.metrics import read_metrics
from prime_fast.watch import WATCHERS

# Okabe-Ito for runs and Paul Tol's "muted" for phases: both stay distinct under the common colour-vision deficiencies
RUN_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
PHASE_COLORS = {
    "generate": "#332288",
    "reward": "#88CCEE",
    "reference": "#44AA99",
    "prm": "#117733",
    "advantage": "#666666",
    "old_logprobs": "#999933",
    "policy": "#DDCC77",
    "sync": "#CC6677",
    "eval": "#882255",
    "checkpoint": "#AA4499",
}
OTHER_COLOR = "#BBBBBB"
ALARM_COLOR = "#CC3311"
INK = "#444444"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}
COLUMNS = 3
SMOOTH_FROM = 20  # points; a longer curve is drawn thin, with its running mean on top
ENDS = 5  # steps averaged at either end of a noisy curve

CAPTION = f"* means of the first and last {ENDS} steps"
TIGHT = {"handlelength": 1, "handletextpad": 0.4, "columnspacing": 1, "borderaxespad": 0}
Runs = dict[str, list[dict]]  # label -> records


class Panel(NamedTuple):
    title: str
    keys: tuple[str, ...]  # the second and later ones are dashed
    percent: bool = False
    log: bool = False
    guide: tuple[float, str] | None = None  # a level worth comparing with, and its name
    from_zero: bool = True
    exact: bool = False  # every point marked, none smoothed


PANELS = [
    Panel("Held-out accuracy (greedy)", ("eval_accuracy",), percent=True, exact=True),
    Panel("SFT loss (nats per token)", ("loss", "eval_loss")),
    Panel("Training outcome, all rollouts", ("outcome",), percent=True),
    Panel("PRM pair accuracy", ("prm_pair_accuracy",), percent=True, guide=(0.5, "chance"), from_zero=False),
    Panel("PRM step AUC", ("prm_step_auc",), percent=True, guide=(0.5, "chance"), from_zero=False),
    Panel("Outcome variance explained by the PRM", ("prm_explained_75", "prm_explained_25")),
    Panel("Trust in the PRM (gate)", ("prm_gate",)),
    Panel("PRM calibration error", ("prm_calibration_error",)),
    Panel("PRM loss (nats per response)", ("prm_loss",), guide=(math.log(2), "ln 2"), from_zero=False),
    Panel("Process / outcome return (RMS)", ("process_over_outcome",)),
    Panel("Entropy (nats per token)", ("entropy",)),
    Panel("KL to the reference (nats per token)", ("reference_kl",)),
    Panel("Groups that pass the filter", ("groups_kept",), percent=True),
    Panel("Rows of an older policy", ("stale",), percent=True),
    Panel("Response length (tokens)", ("response_length",)),
    Panel("Truncated responses", ("truncated",), percent=True),
    Panel("Gradient norm", ("policy_grad_norm", "prm_grad_norm"), log=True, from_zero=False),
    Panel("Gradient norm", ("grad_norm",), log=True, from_zero=False),
    Panel("Tokens per second", ("tokens_per_second",)),
]


def report(run_dirs: list[str], out: str | None = None) -> Path:
    """Draw the curves of one or several runs into one PNG and return its path.

    out: the file to write; by default report/curves.png in the first run's directory. Panels without data are left out.
    Raises ValueError if a run has no metrics yet.
    """
    runs = _load(run_dirs)
    path = Path(out) if out else Path(run_dirs[0]) / "report" / "curves.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        _draw(runs).savefig(path, dpi=130)
    return path


def summary_table(run_dirs: list[str]) -> Table:
    """A rich table, one column a run: accuracy before and after, outcome, rollouts, tokens/s, memory, phases."""
    runs = _load(run_dirs)
    table = Table(title="Run summary", title_justify="left", caption=CAPTION, caption_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    _add_rows(table, [_results(records) for records in runs.values()])
    table.add_section()
    table.add_row("[bold]seconds a step (run)")
    _add_rows(table, [_times(records) for records in runs.values()])
    return table


def series(records: list[dict], key: str, x: str = "step") -> tuple[list[float], list[float]]:
    """The x and y values of the records that hold both; nulls are left out. At step 0 nothing was rolled out yet."""
    points = [(r.get(x, None if r["step"] else 0), r[key]) for r in records if r.get(key) is not None]
    points = [point for point in points if point[0] is not None]
    return [point[0] for point in points], [point[1] for point in points]


def phase_seconds(records: list[dict]) -> dict[str, float]:
    """{phase: total seconds}, in the order of a step."""
    keys = dict.fromkeys(key for record in records for key in record if key.startswith("seconds/"))
    names = dict.fromkeys([*PHASE_COLORS, *(key.removeprefix("seconds/") for key in keys)])
    totals = {name: sum(series(records, f"seconds/{name}")[1]) for name in names}
    return {name: total for name, total in totals.items() if total > 0}


def _add_rows(table: Table, columns: list[dict[str, str]]) -> None:
    for label in dict.fromkeys(label for column in columns for label in column):
        if any(column.get(label) for column in columns):
            table.add_row(label, *(column.get(label) or "-" for column in columns))


def _load(run_dirs: list[str]) -> Runs:
    parts = [Path(run_dir).resolve().parts for run_dir in run_dirs]
    if len(set(parts)) < len(parts):
        raise ValueError(f"a run_dir is given twice: {' '.join(map(str, run_dirs))}; name each once")
    depth = 1  # as many parent directories as it takes to tell the runs apart
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    runs = {"/".join(part[-depth:]): read_metrics(run_dir) for part, run_dir in zip(parts, run_dirs, strict=True)}
    for name, records in runs.items():
        if not records:
            raise ValueError(f"{name} has no metrics yet; wait for its first step")
    return runs


def _draw(runs: Runs) -> Figure:
    first, *others = [p for p in PANELS if _has_data(runs, p)] or [PANELS[0]]
    phases = any(phase_seconds(records) for records in runs.values())
    cells: list = [(row, COLUMNS - 1) for row in range(2)]  # beside the first panel, which is large
    below = max(0, len(others) - len(cells))
    cells += [(2 + i // COLUMNS, i % COLUMNS) for i in range(below)]
    phase_row, phase_column = 2 + below // COLUMNS, below % COLUMNS
    if phase_column == COLUMNS - 1:  # too narrow for the phases: the last panel takes the rest of its row
        cells[-1] = (phase_row, slice(phase_column - 1, None))
        phase_row, phase_column = phase_row + 1, 0
    rows = phase_row + 1 if phases else 2 + math.ceil(below / COLUMNS)
    figure = Figure(figsize=(4.1 * COLUMNS, 2.35 * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.09)
    grid = figure.add_gridspec(rows, COLUMNS)
    large = figure.add_subplot(grid[:2, : COLUMNS - 1] if others else grid[:2, :])
    _draw_panel(large, runs, first, x="rollouts" if first.exact else "step")
    for panel, cell in zip(others, cells, strict=False):
        _draw_panel(figure.add_subplot(grid[cell]), runs, panel)
    if phases:
        _draw_phases(figure.add_subplot(grid[phase_row, phase_column:]), runs)
    _headline(figure, large, runs, "SFT loss *" if first.keys[0] == "loss" else "held-out accuracy")
    return figure


def _draw_panel(axes: Axes, runs: Runs, panel: Panel, x: str = "step") -> None:
    for color, (name, records) in zip(cycle(RUN_COLORS), runs.items(), strict=False):
        for key, style in zip(panel.keys, ("-", "--"), strict=False):
            xs, ys = series(records, key, x)
            window = 1 if panel.exact else 1 + 2 * (len(ys) // SMOOTH_FROM)
            if window > 1:
                axes.plot(xs, ys, color=color, alpha=0.3, linewidth=0.8)
            marker = "o" if panel.exact or len(xs) == 1 else None
            label = name if style == "-" else None
            axes.plot(xs, _running_mean(ys, window), style, color=color, marker=marker, markersize=4, label=label)
        for step in _alarms(records, panel.keys) if x == "step" else ():
            axes.axvspan(step - 0.5, step + 0.5, color=ALARM_COLOR, alpha=0.15, linewidth=0)
    axes.set_title(panel.title)
    axes.set_xlabel(x)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if panel.guide:
        level, text = panel.guide
        axes.axhline(level, color="#999999", linewidth=1, linestyle=":")
        axes.annotate(text, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.from_zero:
        axes.set_ylim(0, 1.08 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1)
    axes.yaxis.set_major_formatter((lambda y, _: f"{100 * y:g}%") if panel.percent else "{x:,g}")
    if len(panel.keys) > 1 and any(series(records, panel.keys[1])[0] for records in runs.values()):
        for style, key in zip(("-", "--"), panel.keys, strict=True):
            axes.plot([], [], style, color="#777777", label=key.split("_")[0])
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[-2:], labels[-2:], ncols=2, loc="upper right", **TIGHT | {"handlelength": 2})
        axes.set_ylim(top=2 * axes.get_ylim()[1])


def _alarms(records: list[dict], keys: tuple[str, ...]) -> list[int]:
    """The steps in which a watcher of one of these metrics was on."""
    names = [f"watch/{name}" for name, watcher in WATCHERS.items() if watcher.metric in keys]
    return [record["step"] for record in records if any(record.get(name) for name in names)]


def _draw_phases(axes: Axes, runs: Runs) -> None:
    """One run: seconds over its steps. Several: one bar a run of the mean seconds per step."""
    totals = {name: phase_seconds(records) for name, records in runs.items()}
    phases = [phase for phase in PHASE_COLORS if any(phase in total for total in totals.values())]
    phases += sorted({phase for total in totals.values() for phase in total} - set(phases))
    if len(runs) == 1:
        (records,) = runs.values()
        steps = [r for r in records if r["step"] > 0] or records
        bottom = [0.0] * len(steps)
        for phase in phases:
            seconds = [r.get(f"seconds/{phase}") or 0.0 for r in steps]
            color = PHASE_COLORS.get(phase, OTHER_COLOR)
            axes.bar([r["step"] for r in steps], seconds, 1.0, bottom, color=color, label=phase)
            bottom = [low + more for low, more in zip(bottom, seconds, strict=True)]
        axes.set_title("Seconds by phase, over steps")
        axes.margins(x=0)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.grid(axis="x", visible=False)
    else:
        left = [0.0] * len(runs)
        for phase in phases:
            widths = [totals[name].get(phase, 0.0) / _steps(records) for name, records in runs.items()]
            axes.barh(list(runs), widths, 0.6, left, color=PHASE_COLORS.get(phase, OTHER_COLOR), label=phase)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_title("Seconds a step by phase, means")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    axes.legend(ncols=len(phases), loc="upper left", bbox_to_anchor=(0, -0.15), **TIGHT)


def _headline(figure: Figure, large: Axes, runs: Runs, key: str) -> None:
    texts = {name: _results(records).get(key, "") for name, records in runs.items()}
    if len(runs) > 1:
        handles, names = large.get_legend_handles_labels()
        large.legend(handles, [f"{name}   {texts[name]}" for name in names], loc="best", fontsize=10)
        title = f"Comparison of {len(runs)} runs"
    else:
        ((name, text),) = texts.items()
        title = f"{name}   {key.removesuffix(' *')} {text}" if text else name
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, weight="bold")
    alarm = any(key.startswith("watch/") for records in runs.values() for record in records for key in record)
    legend = "thin: every step    thick: running mean" + "    shaded: a watcher's alarm" * alarm
    figure.supxlabel(legend, x=0.99, ha="right", fontsize=8)


def _results(records: list[dict]) -> dict[str, str]:
    """{label: text}; empty where the run did not measure it."""
    trained = [r for r in records if r["step"] > 0]
    steps, accuracy = series(records, "eval_accuracy")
    best = max(range(len(accuracy)), key=accuracy.__getitem__, default=0)
    rollouts = series(records, "rollouts")[1]
    speed, packing = (series(trained, key)[1] for key in ("tokens_per_second", "packing_efficiency"))
    memory, skipped = (series(records, key)[1] for key in ("peak_memory_gib", "skipped"))
    return {
        "held-out accuracy": _first_to_last(accuracy, 1),
        "gain": f"{100 * (accuracy[-1] - accuracy[0]):+.1f} points" if len(accuracy) > 1 else "",
        "best": f"{accuracy[best]:.1%} at step {steps[best]}" if accuracy else "",
        "training outcome *": _first_to_last(series(trained, "outcome")[1], ENDS),
        "PRM pair accuracy *": _first_to_last(series(trained, "prm_pair_accuracy")[1], ENDS),
        "SFT loss *": _first_to_last(series(trained, "loss")[1], ENDS, ".3f"),
        "validation loss": _first_to_last(series(records, "eval_loss")[1], 1, ".3f"),
        "steps": str(records[-1]["step"]),
        "rollouts": f"{rollouts[-1]:,}" if rollouts else "",
        "tokens per second": f"{_mean(speed):,.0f}" if speed else "",
        "packing efficiency": f"{_mean(packing):.1%}" if packing else "",
        "peak memory": f"{max(memory):.1f} GiB" if memory else "",
        "skipped steps": str(skipped[-1]) if skipped else "",
        "policy updates lost": _lost(records, "policy"),
        "PRM updates lost": _lost(records, "prm"),
    }


def _lost(records: list[dict], name: str) -> str:
    made, applied = (sum(series(records, f"{name}_{key}")[1]) for key in ("updates", "applied"))
    return f"{made - applied} of {made}" if made else ""


def _times(records: list[dict]) -> dict[str, str]:
    totals = phase_seconds(records) | {"whole step": sum(series(records, "seconds")[1])}
    return {name: f"{total / _steps(records):.2f} ({total:,.0f})" for name, total in totals.items() if total}


def _steps(records: list[dict]) -> int:
    return max(1, sum(r["step"] > 0 for r in records))


def _first_to_last(values: list[float], count: int, form: str = ".1%") -> str:
    ends = [values[:count], values[-count:]] if len(values) > count else [values] if values else []
    return " → ".join(f"{_mean(end):{form}}" for end in ends)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _running_mean(values: list[float], window: int) -> list[float]:
    """Centred; the window shrinks towards the ends, so that a trend is hardly bent there."""
    half = window // 2
    reach = [max(min(half, i, len(values) - 1 - i), half // 3) for i in range(len(values))]
    return [_mean(values[max(0, i - r) : i + r + 1]) for i, r in enumerate(reach)]


def _has_data(runs: Runs, panel: Panel) -> bool:
    values = [value for records in runs.values() for key in panel.keys for value in series(records, key)[1]]
    return any(values) if panel.title == "Truncated responses" else bool(values)
