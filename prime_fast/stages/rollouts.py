"""Labelled responses of any model: sampled with the trainer's engines, graded with its rewards.

OUT/settings.json    what was asked; a command that was killed goes on when it is given again
OUT/samples.jsonl    a line a problem, in the order in which they came: responses, token ids, outcomes
OUT/rollouts.jsonl   when all are there, in the order of the rows: each row, without labelled responses that it had,
                     with `responses`, `label` (their outcomes) and `truncated`, as `prime-fast prm` takes it

Started by torchrun, every process answers its share; OUT is on a file system that all of them see.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from prime_fast import durable
from prime_fast.data.labelled import OURS
from prime_fast.data.models import load_tokenizer
from prime_fast.data.shapes import ADDED, WHERE
from prime_fast.engine import distributed
from prime_fast.evaluation import outputs
from prime_fast.evaluation.answers import Draw, Problem
from prime_fast.evaluation.evaluate import answer, find_model, problems_of, tell_clamped
from prime_fast.evaluation.settings import Settings, check, claim, temperature

NAME = "rollouts.jsonl"
MADE = ("prompt_ids", WHERE, ADDED)


def rollouts(settings: Settings, console: Console) -> Path:
    """Draw settings.samples responses to every row, or the rest of them; returns OUT/rollouts.jsonl."""
    check(settings)
    if "RANK" in os.environ:
        distributed.initialize()
    console.quiet |= distributed.rank() > 0
    transformers_logging.disable_progress_bar()
    model = find_model(settings.model, "policy")
    tokenizer = load_tokenizer(model)
    problems = problems_of(settings, {"model": model}, tokenizer)
    if distributed.rank() == 0:
        claim(settings, {"model": model})
    tell_clamped(problems, console)
    draw = Draw("samples", settings.samples, temperature(settings))
    records = answer(settings, model, problems, [draw], tokenizer, console)[draw.name]
    path = settings.out / NAME
    if distributed.rank() == 0:
        rows = (_row(problem, record) for problem, record in zip(problems, records, strict=True))
        durable.replace(path, outputs.lines(row for row in rows if row["responses"]))
        _tell(records, path, console)
    return path


def _row(problem: Problem, record: dict) -> dict:
    """Empty responses, of which a PRM has nothing to say, are left out, and so are labelled ones that the row had."""
    added = problem.row.get(ADDED, ())
    row = {key: value for key, value in problem.row.items() if key not in (*MADE, *added, *OURS)}
    kept = [k for k, text in enumerate(record["responses"]) if text]
    columns = {"responses": "responses", "label": "outcomes", "truncated": "truncated"}
    return row | {ours: [record[theirs][k] for k in kept] for ours, theirs in columns.items()}


def _tell(records: list[dict], path: Path, console: Console) -> None:
    outcomes = [outcome for record in records for outcome in record["outcomes"]]
    empty = sum(not text for record in records for text in record["responses"])
    mixed = Counter(0 < sum(r["outcomes"]) < len(r["outcomes"]) for r in records)[True]
    left = f", {empty} empty ones left out" * (empty > 0)
    console.print(
        f"{path}: {len(outcomes)} responses to {len(records)} prompts{left}, mean outcome "
        f"{sum(outcomes) / len(outcomes):.3f}; {mixed} prompts have better and worse ones",
        soft_wrap=True,
        markup=False,
    )
