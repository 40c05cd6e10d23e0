"""How well scores tell good responses from bad ones: over all of them, among those to one prompt, and as a chance."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from prime_fast import prime
from prime_fast.views.report import RUN_COLORS, STYLE

BINS = 10  # of equal width, of predicted chances
GOOD = 0.5  # a label above is good


def judge(score: Tensor, label: Tensor, group: Tensor, offset: float = 0.0) -> dict[str, Any]:
    """What scores (R,), log-odds but for a constant `offset`, say of labels (R,) in [0, 1] of the responses to prompts
    `group` (R,).

    auc: the chance that a good response (label above 0.5) scores higher than a bad one, ties counting one half.
    pair_accuracy: the share of the `pairs` of responses to one prompt with different labels that the score orders like
        the label. Either is None where there is nothing to compare.
    calibration: for ten ranges of the predicted chance sigmoid(offset + score) how many responses fall into it, their
        mean chance and mean label; calibration_error: the mean |difference| of the two over responses.
    """
    score, label = score.double(), label.double()
    good = label > GOOD
    auc = prime.area_under_curve(score[good], score[~good]) if good.any() and not good.all() else None
    order = group.argsort(stable=True)
    parts = order.split(group[order].unique_consecutive(return_counts=True)[1].tolist())
    found = [prime.pair_accuracy(score[rows], label[rows], group[rows]) for rows in parts]
    correct, pairs = (sum(values) for values in zip(*found, strict=True))
    chance = (offset + score).sigmoid()
    bins = (chance * BINS).long().clamp(max=BINS - 1)
    calibration = [_bin(k, chance[bins == k], label[bins == k]) for k in range(BINS)]
    error = sum(abs(b["chance"] - b["label"]) * b["responses"] for b in calibration if b["responses"]) / len(score)
    return {
        "responses": len(score),
        "prompts": len(parts),
        "good": float(good.double().mean()),
        "auc": auc,
        "pairs": pairs,
        "pair_accuracy": correct / pairs if pairs else None,
        "calibration_error": error,
        "calibration": calibration,
    }


def _bin(k: int, chance: Tensor, label: Tensor) -> dict[str, Any]:
    known = {"chance": float(chance.mean()), "label": float(label.mean())} if len(chance) else {}
    return {"from": k / BINS, "to": (k + 1) / BINS, "responses": len(chance)} | {"chance": None, "label": None} | known


def draw(judged: dict[str, Any], title: str) -> Figure:
    """The calibration curve, with the number of responses below."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        curve, counts = figure.subplots(2, height_ratios=(4, 1), sharex=True)
        bins = [b for b in judged["calibration"] if b["responses"]]
        curve.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
        curve.plot([b["chance"] for b in bins], [b["label"] for b in bins], marker="o", color=RUN_COLORS[0])
        curve.set(title=title, ylabel="mean label", xlim=(0, 1), ylim=(0, 1))
        counts.bar(
            [(b["from"] + b["to"]) / 2 for b in judged["calibration"]],
            [b["responses"] for b in judged["calibration"]],
            width=0.9 / BINS,
            color=RUN_COLORS[0],
        )
        counts.set(xlabel="predicted chance that the response is good", ylabel="responses")
    return figure


def log_odds(share: float) -> float:
    """Of a share that is not quite 0 or 1."""
    share = min(max(share, 1e-6), 1 - 1e-6)
    return float(np.log(share / (1 - share)))


def metrics(judged: dict[str, Any]) -> dict[str, float]:
    """Its numbers, as a run logs them."""
    return {f"eval_{key}": judged[key] for key in ("auc", "pair_accuracy", "calibration_error")}
