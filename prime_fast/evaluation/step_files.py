"""`prime-fast score-steps`: the models, the files, and where the records and the summary go."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from prime_fast import durable
from prime_fast.config import ModelConfig, PrimeConfig, load_config
from prime_fast.data.labelled import Labelled, Reading, load_labelled
from prime_fast.data.models import load_tokenizer, model_config
from prime_fast.engine import distributed
from prime_fast.engine.model import training_dtype
from prime_fast.evaluation import outputs, steps
from prime_fast.evaluation.discrimination import log_odds
from prime_fast.evaluation.evaluate import find_model


@dataclass(frozen=True)
class Question:
    """The options of the command, by their names."""

    model: str
    rows: list[str]
    out: Path
    prm: str | None = None
    reference: str | None = None
    beta: float | None = None
    separators: str = "\n"
    number_steps: bool = False
    threshold: float | None = None  # a chance
    threshold_from: str | None = None
    limit: int | None = None
    template: str = "auto"
    template_args: dict[str, Any] = field(default_factory=dict)


def answer(question: Question, console: Console) -> dict[str, Any]:
    """Score the files; writes the records, and returns the summary of those whose steps are labelled."""
    if question.threshold is not None and question.threshold_from:
        raise ValueError("--threshold and --threshold-from both say where a step begins to be wrong; leave one out")
    if question.threshold is not None and not 0 < question.threshold < 1:
        raise ValueError(f"--threshold {question.threshold:g} is no chance between 0 and 1")
    if question.beta is not None and not 0 < question.beta < math.inf:
        raise ValueError(f"--beta {question.beta:g} must be a number above 0")
    try:
        re.compile(question.separators)
    except re.error as error:
        raise ValueError(f"--separators {question.separators!r} is no regular expression: {error}") from None
    if "RANK" in os.environ:
        distributed.initialize()
    console.quiet |= distributed.rank() > 0
    transformers_logging.disable_progress_bar()
    prm, reference, beta = _models(question)
    tokenizer = load_tokenizer(prm)
    for path in (reference, *([find_model(question.model, "policy")] if question.prm else [])):
        if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"the tokenizer of {path} differs from that of the PRM {prm}; they must share one")
    names = list(dict.fromkeys([*question.rows, *([question.threshold_from] if question.threshold_from else [])]))
    device = distributed.device()
    dtype = training_dtype(ModelConfig(policy=prm), device)
    options = {
        "max_tokens": getattr(model_config(prm), "max_position_embeddings", None) or 1 << 30,
        "reading": Reading(False, question.separators, unlabelled=True, numbered=question.number_steps),
        "limit": question.limit,
        "template": question.template,
        "template_args": question.template_args,
    }
    files = [load_labelled(name, tokenizer, **options) for name in names]
    for file in files:
        console.print(str(file.rows), soft_wrap=True, markup=False)
    if question.threshold is None:
        _check_labels(question, dict(zip(names, files, strict=True)))
    records = steps.score_steps(files, (prm, reference), tokenizer, beta=beta, dtype=dtype, device=device)
    found = dict(zip(names, records, strict=True))
    summary = _summarise(question, found)
    if distributed.rank() == 0:
        _write(question, found, summary, console)
    return summary


def _check_labels(question: Question, files: dict[str, Labelled]) -> None:
    """That a threshold can be had from them is told before they are all scored."""

    def wrong(names: list[str]) -> set[int]:
        found = {steps.first_error(files[name].rows[i]) for name in names for i in range(len(files[name]))}
        return found - {None}

    if asked := wrong(question.rows):
        steps.check_both_kinds(wrong([question.threshold_from]) if question.threshold_from else asked)


def _models(question: Question) -> tuple[str, str, float]:
    """PRM, reference and beta; those that are not given are the run's."""
    config = Path(question.model, "config.yaml")
    run = load_config(config) if config.is_file() else None
    prm = find_model(question.prm or question.model, "prm")
    reference = question.reference
    if reference is None and run is not None:
        if run.prime.reference == "policy" and not run.offline.data:
            raise ValueError(
                f"the reference of {question.model} was the policy of each step; give --reference, which may be "
                f"{question.model} for its newest one"
            )
        reference = run.model.reference or run.model.policy
    if reference is None:
        raise ValueError(f"{question.model} is no run that names a reference; give --reference, the PRM's")
    beta = question.beta or (run.prime.beta if run else PrimeConfig().beta)
    return prm, find_model(reference, "policy"), beta


def _summarise(question: Question, found: dict[str, list[dict]]) -> dict[str, Any]:
    """{"threshold" (a chance), "threshold_from", "files": {name: numbers}, "f1": their mean}; {} without step labels.
    The records get what is predicted."""
    labelled = {name: [r for r in records if "first_error" in r] for name, records in found.items()}
    asked = {name: records for name, records in labelled.items() if name in question.rows and records}
    if not asked:
        return {}
    if question.threshold is not None:
        threshold, told = log_odds(question.threshold), "given"
    else:
        told = question.threshold_from or "these rows"
        known = labelled[told] if question.threshold_from else sum(asked.values(), [])
        threshold = steps.best_threshold(known)
    for records in asked.values():
        for record in records:
            record["predicted"] = steps.predict(record, threshold)
    files = {name: steps.process_bench(records, threshold) for name, records in asked.items()}
    scores = [numbers["f1"] for numbers in files.values() if numbers["f1"] is not None]
    mean = sum(scores) / len(scores) if scores else None
    chance = float(np.exp(-np.logaddexp(0, -threshold)))
    return {"threshold": chance, "threshold_from": told, "files": files, "f1": mean}


def _write(question: Question, found: dict[str, list[dict]], summary: dict[str, Any], console: Console) -> None:
    records = [record for name in dict.fromkeys(question.rows) for record in found[name]]
    question.out.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(question.out, outputs.lines(records))
    told = f"{question.out}: {len(records)} responses"
    if summary:
        beside = question.out.with_suffix(".summary.json")
        durable.replace(beside, json.dumps(summary, indent=1) + "\n")
        table = Table("file", "responses", "wrong step found", "right ones let pass", "F1")
        for name, row in summary["files"].items():
            numbers = [row["error_accuracy"], row["correct_accuracy"], row["f1"]]
            table.add_row(Path(name).name, str(row["responses"]), *("-" if x is None else f"{x:.1%}" for x in numbers))
        table.caption = f"a step is wrong below a chance of {summary['threshold']:.4g} ({summary['threshold_from']})"
        console.print(table)
        told += f"; {beside}"
    console.print(told, soft_wrap=True, markup=False)
