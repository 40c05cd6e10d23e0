"""What finished runs say: numbers of a run, means of an arm, and arms against RLOO in pairs of one seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from math import lgamma, log, pi

import numpy as np

from benchmarks.learning.arms import BASE, arm
from benchmarks.learning.study import Study, finished
from prime_fast.config import load_config
from prime_fast.metrics import read_metrics
from prime_fast.views.report import phase_seconds, series

LEVELS = (0.5, 0.8, 0.9, 0.95)  # accuracies whose price in rollouts is reported
UNFILTERED = f"{BASE}+unfiltered"
THIRDS = {"pair_accuracy_by_thirds": "prm_pair_accuracy", "step_auc_by_thirds": "prm_step_auc"}  # means, of a run
Runs = dict[str, dict]  # seed -> summary


def summarise(records: list[dict], helper: Sequence[dict] = ()) -> dict:
    """The numbers of one run. mean_accuracy is the area under accuracy over rollouts, divided by the rollouts.

    helper: the records of the run that its PRM comes from.
    """
    rollouts, accuracy = series(records, "eval_accuracy", "rollouts")
    curve = {"rollouts": rollouts, "accuracy": accuracy}
    seconds = phase_seconds(records) | {"whole": sum(series(records, "seconds")[1])}
    thirds = {key: np.array_split(np.array(series(records, key)[1]), 3) for key in THIRDS.values()}
    return {
        "start_accuracy": accuracy[0],
        "final_accuracy": accuracy[-1],
        "mean_accuracy": float(np.trapezoid(accuracy, rollouts) / (rollouts[-1] - rollouts[0])),
        "rollouts_to": {str(level): rollouts_to(curve, level) for level in LEVELS},
        "seconds": seconds["whole"],
        "seconds_per_step": {phase: total / records[-1]["step"] for phase, total in seconds.items()},
        "warmup_rollouts": helper[-1]["rollouts"] if helper else 0,
        "warmup_seconds": sum(series(list(helper), "seconds")[1]),
        "curve": curve,
        "step_auc": between(series(records, "prm_step_auc", "rollouts"), rollouts),
    } | {
        name: [float(third.mean()) for third in thirds[key]] if thirds[key][-1].size else None
        for name, key in THIRDS.items()
    }


def between(points: tuple[Sequence[float], Sequence[float]], ends: Sequence[float]) -> dict | None:
    """The mean of the points up to each of `ends`, from the one before on; None if there is no point at all."""
    x, y = map(np.asarray, points)
    found = {end: y[(x > start) & (x <= end)] for start, end in pairwise(ends)}
    means = {end: float(values.mean()) for end, values in found.items() if len(values)}
    return {"rollouts": list(means), "auc": list(means.values())} if means else None


def mean_curve(curves: Sequence[dict], key: str = "accuracy") -> dict:
    """The mean over seeds and its 95% band, where all of them have run, at every seed's points."""
    start, end = max(curve["rollouts"][0] for curve in curves), min(curve["rollouts"][-1] for curve in curves)
    grid = sorted({x for curve in curves for x in curve["rollouts"] if start <= x <= end})
    values = [np.interp(grid, curve["rollouts"], curve[key]) for curve in curves]
    middle, low, high = np.transpose([interval(column) for column in np.transpose(values)]).tolist()
    return {"rollouts": grid, key: middle} | ({"low": low, "high": high} if len(curves) > 1 else {})


def rollouts_to(curve: dict, level: float) -> float | None:
    """Rollouts at which the curve, linear between its points, first reaches `level`; None if it never does."""
    x, y = curve["rollouts"], curve["accuracy"]
    i = next((i for i, value in enumerate(y) if value >= level), None)
    if not i:
        return x[0] if i == 0 else None
    return x[i - 1] + (x[i] - x[i - 1]) * (level - y[i - 1]) / (y[i] - y[i - 1])


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% interval of the mean (Student's t); the interval of one value is NaN."""
    values, count = np.asarray(values, float), len(values)
    if count < 2:
        return float(values.mean()), float("nan"), float("nan")
    half = t_quantile(count - 1) * values.std(ddof=1) / np.sqrt(count)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


@cache
def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t, to 5 digits."""
    t = np.linspace(0, 13, 130_001)
    scale = lgamma((freedom + 1) / 2) - lgamma(freedom / 2) - log(freedom * pi) / 2
    density = np.exp(scale - (freedom + 1) / 2 * np.log1p(t**2 / freedom))
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2) * t[1]])
    return float(np.interp(0.475, area, t))


def average(runs: Runs) -> dict:
    """Means over an arm's seeds; rollouts to a level over those that reached it, beside how many did."""
    values = list(runs.values())
    step_auc = _present(run["step_auc"] for run in values)
    thirds = {name: _present(run[name] for run in values) for name in THIRDS}
    phases = dict.fromkeys(phase for run in values for phase in run["seconds_per_step"])
    means = ("start_accuracy", "final_accuracy", "mean_accuracy", "seconds", "warmup_rollouts", "warmup_seconds")
    reached = {level: _present(run["rollouts_to"][level] for run in values) for level in map(str, LEVELS)}
    return {key: float(np.mean([run[key] for run in values])) for key in means} | {
        "rollouts_to": {level: float(np.mean(x)) if x else None for level, x in reached.items()},
        "reached": {level: len(x) for level, x in reached.items()},
        **{name: np.mean(found, 0).tolist() if found else None for name, found in thirds.items()},
        "seconds_per_step": {p: float(np.mean([run["seconds_per_step"].get(p, 0) for run in values])) for p in phases},
        "curve": mean_curve([run["curve"] for run in values]),
        "step_auc": mean_curve(step_auc, "auc") if step_auc else None,
    }


def paired(runs: Runs, base: Runs) -> dict | None:
    """An arm against `base` in pairs of one seed; None without a pair.

    The ratio of rollouts to a level is exp of the mean over pairs of log(arm / base), of the pairs whose runs both
    reached it: `pairs` of `seeds`. Where the arm reached it more seldom than the base, the ratio flatters the arm.
    The other ratio counts the rollouts of its PRM's warm start as the arm's. error_ratio: of the mean error rates at
    the end.
    """
    seeds = [seed for seed in runs if seed in base]
    if not seeds:
        return None
    levels = {}
    for level in map(str, LEVELS):
        cost = {seed: (runs[seed]["rollouts_to"][level], base[seed]["rollouts_to"][level]) for seed in seeds}
        both = [seed for seed, pair in cost.items() if all(pair)]
        levels[level] = {"reached": len(_present(a for a, _ in cost.values()))}
        levels[level] |= {"base_reached": len(_present(b for _, b in cost.values())), "pairs": len(both)}
        for key, counted in (("ratio", 0), ("ratio_with_warmup", 1)):
            logs = [log((cost[s][0] + counted * runs[s]["warmup_rollouts"]) / cost[s][1]) for s in both]
            levels[level][key] = [_finite(float(np.exp(x))) for x in interval(logs)] if both else None
    errors = [1 - np.mean([of[seed]["final_accuracy"] for seed in seeds]) for of in (runs, base)]
    result = {"seeds": len(seeds), "rollouts_to": levels}
    for key in ("final", "mean"):
        differences = [runs[seed][f"{key}_accuracy"] - base[seed][f"{key}_accuracy"] for seed in seeds]
        result[f"{key}_difference"] = [_finite(x) for x in interval(differences)]
    return result | {"error_ratio": float(errors[0] / errors[1]) if errors[1] else None}


def collect(study: Study, pairs: Sequence[tuple[str, int]]) -> dict:
    """{arm: {"label", "seeds": {seed: summary}, "mean": averages, "against_rloo", ...}} of those (arm, seed) that are
    finished; floats rounded to 4 digits. RLOO first."""
    arms: dict[str, Runs] = {}
    for name, seed in sorted(pairs, key=lambda pair: pair[0] != BASE):
        helper = arm(name).helper
        if helper and not (study.run(helper, seed) / "checkpoints" / "latest").is_file():
            continue
        if finished(study.run(name, seed), load_config(study.config, study.train_overrides(name, seed))):
            records = [r for r in read_metrics(study.run(name, seed)) if r["step"] <= study.steps]
            before = read_metrics(study.run(helper, seed)) if helper else ()
            arms.setdefault(name, {})[str(seed)] = summarise(records, before)
    result = {}
    for name, runs in arms.items():
        result[name] = {"label": arm(name).label, "seeds": runs, "mean": average(runs)}
        if name != BASE:
            result[name]["against_rloo"] = paired(runs, arms.get(BASE, {}))
        if "unfiltered" in name.split("+") and name != UNFILTERED:  # it has made more updates than RLOO
            result[name]["against_rloo_unfiltered"] = paired(runs, arms.get(UNFILTERED, {}))
    return json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 4))


def _present(values) -> list:
    return [value for value in values if value is not None]


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
