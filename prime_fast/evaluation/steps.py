"""What an implicit PRM says of every token and step of given responses, and whether it finds the first wrong step.

A record of the result, one a response:

    prompt, response   texts; outcome: its label, if it has one; score: beta * Q, the sum of all rewards
    pieces, reward     of each token its text and beta * (log PRM - log reference); special tokens have a piece too
    steps, step_reward of each step [first token, the one behind its last], and the sum of its rewards
    first_error        the first wrong step from 0, or -1, where the steps are labelled; predicted: the same by the PRM

The chance of a step is sigmoid of the rewards up to its end, as in the evaluation of EurusPRM (ImplicitPRM c0441755,
eval/processbench.py): a response's first wrong step is the first one whose chance is below a threshold. ProcessBench
(arXiv 2412.06559) measures which share of the responses with a wrong step gets exactly that one, and which share of
those without gets none, and their harmonic mean, F1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prime_fast.data.labelled import Labelled
from prime_fast.engine import distributed
from prime_fast.evaluation.bestofn import response_logprobs
from prime_fast.views.show.record import pieces

WRONG = 0.5  # the label of a wrong step is below


def score_steps(
    files: Sequence[Labelled],
    models: tuple[str, str],
    tokenizer: Any,
    *,
    beta: float,
    dtype: torch.dtype,
    device: torch.device,
) -> list[list[dict[str, Any]]]:
    """The records of each file's rows, by (PRM, reference), on every rank; each scores its share."""
    every = [(number, i) for number, file in enumerate(files) for i in range(len(file))]
    share = every[distributed.rank() :: distributed.world_size()]
    found = [files[number].rows[i] for number, i in share]
    prompts = [torch.tensor(row["prompt_ids"]) for row in found]
    responses = [torch.tensor(row["response_ids"]) for row in found]
    records = []
    if found:
        prm, reference = (response_logprobs(m, prompts, responses, dtype=dtype, device=device) for m in models)
        rewards = (beta * (prm - reference).double()).split([len(response) for response in responses])
        records = [_record(row, reward, tokenizer) for row, reward in zip(found, rewards, strict=True)]
    known = dict(distributed.gather_lists(list(zip(share, records, strict=True))))
    return [[known[number, i] for i in range(len(file))] for number, file in enumerate(files)]


def _record(row: dict, reward: Tensor, tokenizer: Any) -> dict[str, Any]:
    texts = pieces(row["response_ids"], tokenizer)
    ends = _token_ends(row["response"], row["step_ends"], texts, tokenizer)
    steps = list(zip([0, *ends], ends, strict=False))
    record = {
        "prompt": tokenizer.decode(row["prompt_ids"]),
        "response": row["response"],
        "pieces": texts,
        "reward": reward.tolist(),
        "steps": [list(step) for step in steps],
        "step_reward": [float(reward[start:end].sum()) for start, end in steps],
        "score": float(reward.sum()),
    }
    if row["label"] is not None:
        record["outcome"] = row["label"]
    if (wrong := first_error(row)) is not None:
        record["first_error"] = wrong
    return record


def first_error(row: dict) -> int | None:
    """The first step that is labelled wrong, or -1; None where no step is labelled."""
    labels = row.get("step_labels")
    return next((k for k, label in enumerate(labels) if label < WRONG), -1) if labels else None


def _token_ends(response: str, step_ends: Sequence[int], texts: Sequence[str], tokenizer: Any) -> list[int]:
    """Behind the token that holds each step's last character; behind the response's last token for the last step."""
    if not "".join(texts).startswith(response):  # the tokenizer normalises texts, so that they have other lengths
        step_ends = [_normalised_length(response[:end], tokenizer) for end in step_ends]
    upto = list(accumulate(map(len, texts)))
    ends = np.minimum(np.searchsorted(upto, step_ends) + 1, len(texts)).tolist()
    return [*ends[:-1], len(texts)]


def _normalised_length(text: str, tokenizer: Any) -> int:
    return len(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))


# ---- the first wrong step


def log_odds(record: dict[str, Any]) -> np.ndarray:
    """Of each step's chance."""
    return np.cumsum(record["step_reward"])


def predict(record: dict[str, Any], threshold: float) -> int:
    """The first step whose log-odds are below the threshold, or -1."""
    below = np.flatnonzero(log_odds(record) < threshold)
    return int(below[0]) if len(below) else -1


def check_both_kinds(first_errors: set[int]) -> None:
    """Raises ValueError where no threshold is better than another."""
    if len({wrong < 0 for wrong in first_errors}) < 2:
        raise ValueError(
            "a threshold needs responses with a wrong step and responses without, and these are all of one kind; give "
            "--threshold, or --threshold-from with rows of both"
        )


def best_threshold(records: Sequence[dict[str, Any]]) -> float:
    """Log-odds with the highest F1 on these records; the lowest of those that are as good.

    A response is judged right by the thresholds t of one interval: t <= its lowest step where none is wrong, else
    the wrong step < t <= the lowest before it. Only the upper ends of intervals can be best.
    """
    check_both_kinds({record["first_error"] for record in records})
    clean = [log_odds(record).min() for record in records if record["first_error"] < 0]
    wrong = [(log_odds(record), record["first_error"]) for record in records if record["first_error"] >= 0]
    at = np.array([odds[k] for odds, k in wrong])
    before = np.array([odds[:k].min(initial=math.inf) for odds, k in wrong])
    at, before = at[at < before], before[at < before]
    top = max([*clean, *(odds.max() for odds, _ in wrong)])
    candidates = np.unique([*clean, *np.minimum(before, np.nextafter(top, math.inf))])
    hits = np.searchsorted(np.sort(at), candidates) - np.searchsorted(np.sort(before), candidates)
    kept = len(clean) - np.searchsorted(np.sort(clean), candidates)
    scores = [_harmonic(hit / len(wrong), keep / len(clean)) for hit, keep in zip(hits, kept, strict=True)]
    return float(candidates[int(np.argmax(scores))])


def process_bench(records: Sequence[dict[str, Any]], threshold: float) -> dict[str, Any]:
    """threshold: log-odds. The accuracies are None where there is no such response; F1 then too."""
    right = {True: [], False: []}  # whether there is a wrong step -> whether it was told right
    for record in records:
        right[record["first_error"] >= 0].append(predict(record, threshold) == record["first_error"])
    error, correct = (float(np.mean(right[kind])) if right[kind] else None for kind in (True, False))
    f1 = None if error is None or correct is None else _harmonic(error, correct)
    return {"responses": len(records), "error_accuracy": error, "correct_accuracy": correct, "f1": f1}


def _harmonic(one: float, other: float) -> float:
    return 2 * one * other / (one + other) if one + other else 0.0
