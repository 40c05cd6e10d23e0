"""Evaluation on files of rows: greedy pass@1, avg@k and pass@k of samples, best-of-n with an implicit PRM.

OUT/settings.json                what was asked; OUT holds one evaluation, and one that was killed continues
OUT/greedy.jsonl, samples.jsonl  a line a problem: responses, their token ids, outcomes
OUT/prm.jsonl, votes.jsonl       a line a problem: beta * Q of each sample, and what it votes for
OUT/summary.json, eval.png       the numbers of the printed tables, each with its interval, and the picture
OUT/against.json                 the differences from --against

Started by torchrun, every process answers its share of the problems; OUT is on a file system that all of them see.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from transformers.utils import logging as transformers_logging

from prime_fast import durable
from prime_fast.config import ModelConfig, make_config
from prime_fast.data.models import eos_ids, load_tokenizer, model_config
from prime_fast.data.rows import load_rows
from prime_fast.engine import checkpoint, distributed
from prime_fast.engine.batch import Group
from prime_fast.engine.model import training_dtype
from prime_fast.evaluation import outputs, report
from prime_fast.evaluation.answers import Draw, Problem, generate, record, score, vote, workers
from prime_fast.evaluation.settings import Settings, check, claim, is_evaluation, max_tokens, temperature
from prime_fast.evaluation.summary import Answers, compare, summarize
from prime_fast.rewards import RewardPool, row_check
from prime_fast.rollout import RolloutEngine, failures, make_engine

ROOM_STEP = 64  # tokens; where the room is short, responses of prompts of about a length still share a batch
WIDEST = 500  # columns of a printed table


def evaluate(settings: Settings, console: Console) -> dict[str, Any]:
    """Run, or continue, an evaluation; prints the tables and returns what OUT/summary.json holds."""
    check(settings)
    if settings.against and not is_evaluation(settings.against):
        load_tokenizer(find_model(settings.against, "policy"))  # a wrong name is known now, not after the first model
    if "RANK" in os.environ:
        distributed.initialize()
    console.quiet |= distributed.rank() > 0
    transformers_logging.disable_progress_bar()
    summary, problems, answers = _evaluate(settings, console)
    if settings.against:
        result = compare(problems, answers, _others(settings, console))
        if distributed.rank() == 0:
            (settings.out / "against.json").write_text(json.dumps(result, indent=1) + "\n")
        _print(console, report.comparison(result, settings.model, settings.against))
    return summary


def _evaluate(settings: Settings, console: Console) -> tuple[dict[str, Any], list[Problem], Answers]:
    models = {"model": find_model(settings.model, "policy")}
    if settings.prm:
        models |= {"prm": find_model(settings.prm, "prm"), "reference": find_model(settings.reference, "policy")}
    tokenizer = load_tokenizer(models["model"])
    vocabulary = tokenizer.get_vocab()
    for key, path in models.items():
        if load_tokenizer(path).get_vocab() != vocabulary:
            raise ValueError(f"the tokenizer of the {key} {path} differs from the model's; they must share one")
    problems = problems_of(settings, models, tokenizer)
    if distributed.rank() == 0:
        claim(settings, models)
    tell_clamped(problems, console)
    draws = [Draw("greedy", 1, 0.0)]
    if settings.samples:
        draws.append(Draw("samples", settings.samples, temperature(settings)))
    answers = answer(settings, models["model"], problems, draws, tokenizer, console)
    scores = votes = None
    if settings.prm:
        votes = vote(settings.out / "votes.jsonl", problems, answers["samples"], console)
        pair, device = (models["prm"], models["reference"]), distributed.device()
        options = {
            "beta": settings.beta,
            "device": device,
            "dtype": training_dtype(ModelConfig(policy=pair[0]), device),
        }
        scores = score(settings.out / "prm.jsonl", pair, problems, answers["samples"], console, **options)
    summary = summarize(problems, answers, scores, votes)
    if distributed.rank() == 0:
        (settings.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        report.draw(summary, models["model"]).savefig(settings.out / "eval.png", dpi=130)
    for table in report.tables(summary, models["model"]):
        _print(console, table)
    console.print(f"outputs, summary.json and eval.png: {settings.out}", soft_wrap=True, markup=False)
    return summary, problems, answers


def during_training(
    rows: Sequence[dict], groups: Sequence[Group], tokenizer: Any, path: Path | None
) -> dict[str, float]:
    """The metrics of a greedy pass over held-out rows, group i of row i: the same numbers as `evaluate` reports.

    eval_accuracy is the share of solved problems (of several data_sources the mean of their shares, each under
    eval_accuracy/NAME too); eval_low and eval_high bound its 95% interval. `path` receives a line a problem.
    """
    problems = [Problem(row["data_source"], row, 0) for row in rows]
    records = []
    for i, (problem, group) in enumerate(zip(problems, groups, strict=True)):
        texts = [tokenizer.decode(sample.tokens, skip_special_tokens=True) for sample in group.samples]
        records.append(record(i, problem, group.samples, texts, list(group.outcomes)))
    if path is not None:
        durable.replace(path, outputs.lines(records))
    summary = summarize(problems, {"greedy": records})
    *_, overall = summary.values()
    single = {f"eval_accuracy/{name}": row["greedy"].value for name, row in summary.items() if row is not overall}
    accuracy, low, high = overall["greedy"]
    metrics = {"eval_accuracy": accuracy, "eval_low": low, "eval_high": high} | single
    metrics["eval_reward_failures"] = failures.unscored(groups)
    return metrics | {f"eval_{key}": overall[key] for key in ("outcome", "response_length", "truncated")}


def default_out(model: str) -> Path:
    """runs/eval/ and the model's name."""
    parts = (part for part in Path(model).parts if part not in ("/", "..", "checkpoints", "policy"))
    return Path("runs/eval") / "-".join(parts)


def find_model(path: str, role: str) -> str:
    """A model directory or hub id as it is; of a run_dir, a checkpoint or checkpoints/best, its policy or prm."""
    if (found := checkpoint.find(Path(path), role)) is not None:
        return str(found)
    return str(Path(path) / role) if (Path(path) / role).is_dir() else path


def tell_clamped(problems: list[Problem], console: Console) -> None:
    for name, count in Counter(problem.benchmark for problem in problems if problem.clamped).items():
        console.print(f"{name}: {count} problems leave less room than asked for; responses are as long as it allows")


def problems_of(settings: Settings, models: dict[str, str], tokenizer: Any) -> list[Problem]:
    """Of each file the rows as one benchmark, or one per data_source where a file has several."""
    room = min(getattr(model_config(path), "max_position_embeddings", None) or 1 << 30 for path in models.values())
    stems = [Path(path).stem for path in settings.data]
    problems = []
    for path, name in zip(settings.data, stems if len(set(stems)) == len(stems) else settings.data, strict=True):
        rows = load_rows(
            path,
            tokenizer,
            max_prompt_tokens=1 << 30,
            limit=settings.limit,
            template=settings.template,
            template_args=settings.template_args,
            check=row_check(settings.reward),
        )
        rows = [rows[i] for i in range(len(rows))]
        mixed = len({row["data_source"] for row in rows}) > 1
        for row in rows:
            benchmark = f"{name}/{row['data_source']}" if mixed else name
            asked = max_tokens(settings, f"{name} {row['data_source']}")
            left = max(0, room - len(row["prompt_ids"]))
            budget = asked if asked <= left else left // ROOM_STEP * ROOM_STEP or left
            problems.append(Problem(benchmark, row, budget, clamped=budget < asked))
    return problems


def answer(
    settings: Settings, model: str, problems: list[Problem], draws: list[Draw], tokenizer: Any, console: Console
) -> Answers:
    """The records of all problems by the names of the draws, those missing on disk generated and graded first."""
    paths = {draw.name: settings.out / f"{draw.name}.jsonl" for draw in draws}
    done = {name: outputs.read(path) for name, path in paths.items()}
    if any(len(records) < len(problems) for records in done.values()):
        engine = _make_engine(settings, model, problems, tokenizer)
        try:
            with RewardPool(settings.reward, workers(), settings.timeout, settings.sandbox) as pool:
                for draw in draws:
                    missing = [i for i in range(len(problems)) if i not in done[draw.name]]
                    path, seed = paths[draw.name], settings.seed
                    done[draw.name] = generate(path, draw, seed, problems, missing, engine, pool, tokenizer, console)
                counts = Counter()
                for part in distributed.gather_lists([pool.counts]):
                    counts.update(part)
                if counts.total():
                    console.print(f"scored 0 without a verdict: {dict(counts)}")
        finally:
            if engine is not None:
                engine.close()
    return {name: [records[i] for i in range(len(problems))] for name, records in done.items()}


def _make_engine(settings: Settings, model: str, problems: list[Problem], tokenizer: Any) -> RolloutEngine | None:
    """This rank's engine; None where another rank's spans its GPU too (tensor parallel)."""
    rows = [(len(problem.row["prompt_ids"]), problem.max_tokens) for problem in problems if problem.max_tokens]
    response = max((budget for _, budget in rows), default=1)
    both = max((prompt + budget for prompt, budget in rows), default=2)
    rollout = {"engine": settings.engine, "vllm": settings.vllm, "batch": settings.batch, "max_response": response}
    config = make_config(
        {
            "run_dir": str(settings.out),
            "model": {"policy": model},
            "data": {"max_prompt": both - response},
            "rollout": rollout,
            "engine": {"micro_tokens": both},
        }
    )
    device = distributed.device()
    ends, dtype = eos_ids(model, tokenizer), training_dtype(config.model, device)
    return make_engine(config, model, ends, dtype, device, trains=False)


def _others(settings: Settings, console: Console) -> Answers:
    """What to compare with: an evaluation on disk, or that of another model, evaluated now in the same way."""
    if is_evaluation(settings.against):
        paths = [Path(settings.against) / f"{name}.jsonl" for name in ("greedy", "samples")]
        records = {path.stem: outputs.read(path) for path in paths if path.is_file()}
        return {name: [found[i] for i in sorted(found)] for name, found in records.items()}
    own = settings.out == default_out(settings.model)
    out = default_out(settings.against) if own else settings.out / "against" / default_out(settings.against).name
    other = replace(settings, model=settings.against, out=out, against=None, prm=None, reference=None)
    return _evaluate(other, console)[2]


def _print(console: Console, table: Table) -> None:
    """As wide as it is: a log file passes for 80 columns, which would cut numbers off."""
    table.width = Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
    console.print(table, crop=False)
