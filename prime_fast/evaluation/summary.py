"""What the outcomes of an evaluation say: estimates with 95% intervals, of one model or of two on the same problems.

A problem is solved by an outcome of 1. Intervals: `intervals`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from prime_fast.evaluation import intervals
from prime_fast.evaluation.answers import Problem
from prime_fast.evaluation.bestofn import best_of, majority, pass_at

AVERAGE = "average"
METHODS = {
    "random": "random",
    "majority": "majority vote",
    "prm": "PRM",
    "prm_mean": "PRM per token",
    "oracle": "oracle",
}
Answers = dict[str, list[dict]]  # "greedy" and, if drawn, "samples": a record a problem


def summarize(
    problems: Sequence[Problem],
    answers: Answers,
    scores: list[list[float]] | None = None,
    votes: list[list[str | None]] | None = None,
) -> dict[str, Any]:
    """{benchmark or "average" (of several): {"problems", "clamped", "greedy", "outcome", "response_length", "truncated"
    [, "avg", "pass", "best_of", "prm_minus"]}}; pass and best_of are by n; the last two where a PRM gave `scores`."""
    greedy, curves = _greedy(answers), _curves(answers)
    gains = {}
    if scores is not None:
        curves["best_of"] = _best_of(answers["samples"], curves["pass"], np.array(scores), votes)
        last = {method: list(curve.values())[-1] for method, curve in curves["best_of"].items()}
        gains["prm_minus"] = {other: last["prm"] - last[other] for other in ("random", "majority")}
    summary = {}
    for name, parts in _benchmarks(problems).items():
        some = [i for part in parts for i in part]
        records = [answers["greedy"][i] for i in some]
        outcomes = [np.mean([answers["greedy"][i]["outcomes"] for i in part]) for part in parts]
        summary[name] = {
            "problems": len(some),
            "clamped": sum(problems[i].clamped for i in some),
            "outcome": float(np.mean(outcomes)),
            "response_length": sum(len(tokens) for record in records for tokens in record["tokens"]) / len(some),
            "truncated": sum(sum(record["truncated"]) for record in records) / len(some),
            **_estimates({"greedy": greedy, **curves}, parts, intervals.mean),
            **_estimates(gains, parts, intervals.difference),
        }
    return summary


def compare(problems: Sequence[Problem], answers: Answers, others: Answers) -> dict[str, Any]:
    """{benchmark or "average": {"problems", "accuracy", "against", "only_ours", "only_theirs", "greedy" [, "avg",
    "pass"]}}: both greedy accuracies, how many problems only one solves, and the differences answers - others.

    Raises ValueError if the two were not asked the same problems.
    """
    for kind in answers.keys() & others.keys():
        asked = [[(r["benchmark"], r["prompt"], r["ground_truth"]) for r in side[kind]] for side in (answers, others)]
        if asked[0] != asked[1]:
            raise ValueError(
                f"the two evaluations are of {len(asked[0])} and {len(asked[1])} problems that are not the same; "
                "evaluate both with the same --data and --limit"
            )
    ours, theirs = _greedy(answers), _greedy(others)
    differences = _minus({"greedy": ours, **_curves(answers)}, {"greedy": theirs, **_curves(others)})
    result = {}
    for name, parts in _benchmarks(problems).items():
        some = [i for part in parts for i in part]
        result[name] = {
            "problems": len(some),
            "accuracy": float(np.mean([ours[part].mean() for part in parts])),
            "against": float(np.mean([theirs[part].mean() for part in parts])),
            "only_ours": int((ours > theirs)[some].sum()),
            "only_theirs": int((ours < theirs)[some].sum()),
            **_estimates(differences, parts, intervals.difference),
        }
    return result


def _benchmarks(problems: Sequence[Problem]) -> dict[str, list[list[int]]]:
    """The indices of each benchmark's problems, and of all benchmarks apart for the average."""
    where: dict[str, list[int]] = {}
    for i, problem in enumerate(problems):
        where.setdefault(problem.benchmark, []).append(i)
    average = {AVERAGE: list(where.values())} if len(where) > 1 else {}
    return {name: [part] for name, part in where.items()} | average


def _solved(records: list[dict]) -> np.ndarray:
    """(P, N) bool."""
    return np.array([[outcome >= 1 for outcome in record["outcomes"]] for record in records])


def _greedy(answers: Answers) -> np.ndarray:
    return _solved(answers["greedy"])[:, 0].astype(float)


def _curves(answers: Answers) -> dict[str, Any]:
    """Values per problem (P,): {"avg", "pass": {n}}; nothing without samples."""
    if "samples" not in answers:
        return {}
    right = _solved(answers["samples"])
    return {"avg": right.mean(1), "pass": {n: pass_at(right, n) for n in _sizes(right.shape[1])}}


def _best_of(samples: list[dict], oracle: dict[int, np.ndarray], score: np.ndarray, votes) -> dict[str, Any]:
    """Values per problem (P,): {method: {n}}."""
    right = _solved(samples)
    length = np.array([[max(1, len(tokens)) for tokens in record["tokens"]] for record in samples])
    return {
        "random": {n: right.mean(1) for n in oracle},
        "majority": {n: majority(votes, right, n) for n in oracle},
        "prm": {n: best_of(score, right, n) for n in oracle},
        "prm_mean": {n: best_of(score / length, right, n) for n in oracle},
        "oracle": oracle,
    }


def _sizes(total: int) -> list[int]:
    return [2**i for i in range(total.bit_length()) if 2**i < total] + [total]


def _minus(one: Any, other: Any) -> Any:
    """The differences of what both trees have."""
    if isinstance(one, dict):
        return {key: _minus(value, other[key]) for key, value in one.items() if key in other}
    return one - other


def _estimates(tree: Any, parts: list[list[int]], interval: Callable[[list[np.ndarray]], intervals.Estimate]) -> Any:
    if isinstance(tree, dict):
        return {key: _estimates(value, parts, interval) for key, value in tree.items()}
    return intervals.Estimate(*map(float, interval([tree[part] for part in parts])))
