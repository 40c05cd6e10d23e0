"""AUC, pair accuracy and calibration against their definitions, in plain float64 loops."""

import math
import random

import pytest
import torch

from prime_fast.evaluation.discrimination import draw, judge


def test_against_the_definitions():
    rng = random.Random(0)
    rows = [
        (rng.choice([-2.0, -0.5, 0.3, 0.3, 1.7]), rng.choice([0.0, 0.25, 1.0]), rng.randrange(9)) for _ in range(80)
    ]
    score, label, group = (torch.tensor(column) for column in zip(*rows, strict=True))
    judged = judge(score, label, group, offset=0.4)

    def above(one, other):
        return 1.0 if one > other else 0.5 if one == other else 0.0

    good = [s for s, y, _ in rows if y > 0.5]
    bad = [s for s, y, _ in rows if y <= 0.5]
    assert judged["auc"] == pytest.approx(sum(above(g, b) for g in good for b in bad) / len(good) / len(bad), abs=1e-12)
    pairs = [above(s, t) for s, y, g in rows for t, z, h in rows if g == h and y > z]
    assert (judged["pairs"], judged["prompts"]) == (len(pairs), len({g for *_, g in rows}))
    assert judged["pair_accuracy"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    bins = {}
    for s, y, _ in rows:
        chance = 1 / (1 + math.exp(-(s + 0.4)))
        bins.setdefault(int(10 * chance), []).append((chance, y))
    error = sum(abs(sum(c for c, _ in b) - sum(y for _, y in b)) for b in bins.values()) / len(rows)
    assert judged["calibration_error"] == pytest.approx(error, abs=1e-6)
    assert {k: b["responses"] for k, b in enumerate(judged["calibration"]) if b["responses"]} == {
        k: len(b) for k, b in bins.items()
    }
    assert draw(judged, "title").axes[0].lines[1].get_xdata().tolist() == pytest.approx(
        [sum(c for c, _ in bins[k]) / len(bins[k]) for k in sorted(bins)], abs=1e-6
    )


def test_nothing_to_compare_is_none():
    judged = judge(torch.zeros(3), torch.ones(3), torch.arange(3))
    assert (judged["auc"], judged["pair_accuracy"], judged["pairs"]) == (None, None, 0)
    assert judged["calibration_error"] == pytest.approx(0.5)
