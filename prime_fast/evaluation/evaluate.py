"""Evaluation on files of rows: greedy pass@1, avg@k and pass@k of samples, best-of-n with an implicit PRM.

OUT/settings.json                what was asked; OUT holds one evaluation, and one that was killed continues
OUT/greedy.jsonl, samples.jsonl  a line a problem: responses, their token ids, outcomes
OUT/prm.jsonl                    a line a problem: beta * Q of each sample
OUT/summary.json, eval.png       the numbers of the printed tables, each with its interval, and the picture
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from prime_fast.config import Config, DataConfig, ModelConfig, PrimeConfig, RewardConfig, RolloutConfig
from prime_fast.data.models import eos_ids, load_tokenizer, model_config
from prime_fast.data.rows import Rows, load_rows
from prime_fast.engine import distributed
from prime_fast.engine.batch import Group, Sample
from prime_fast.engine.checkpoint import latest
from prime_fast.engine.model import training_dtype
from prime_fast.evaluation import report
from prime_fast.evaluation.bestofn import implicit_rewards
from prime_fast.rewards import RewardPool, row_check
from prime_fast.rewards.pool import SANDBOXES
from prime_fast.rollout import Request, RolloutEngine, make_engine

ENGINES = get_args(RolloutConfig.model_fields["engine"].annotation)
MAX_RESPONSE = RolloutConfig.model_fields["max_response"].default
# --preset paper (arXiv 2502.01456): greedy, 4096 tokens, 8192 for the benchmarks named here; its avg@16 is at 0.3
PAPER_TOKENS, PAPER_LONG_TOKENS, PAPER_LONG = 4096, 8192, ("math500", "leetcode", "livecodebench")
PAPER_TEMPERATURE = 0.3
NEWS = 20  # lines of progress, about


@dataclass(frozen=True)
class Settings:
    """What to evaluate; `model`, `prm`, `reference` are a run_dir, a checkpoint, or what from_pretrained takes."""

    model: str
    data: tuple[str, ...]
    out: Path
    engine: str = "hf"
    samples: int = 0  # drawn per problem besides the greedy response
    temperature: float | None = None  # of the samples; None = 1, or the preset's
    max_response: int | None = None  # tokens; None = as in training, or the preset's
    limit: int | None = None  # the first rows of each file
    reward: str = RewardConfig().function
    timeout: float = RewardConfig().timeout
    sandbox: str = SANDBOXES[0]
    preset: str | None = None  # or "paper"
    template: str = DataConfig().template
    template_args: dict[str, Any] = field(default_factory=dict)
    prm: str | None = None
    reference: str | None = None
    beta: float = PrimeConfig().beta
    batch: int = 64  # responses generated together
    seed: int = 0


class Problem(NamedTuple):
    benchmark: str
    row: dict
    max_tokens: int


def evaluate(settings: Settings, console: Console) -> dict[str, Any]:
    """Run, or continue, an evaluation; prints the tables and returns what OUT/summary.json holds."""
    _check(settings)
    transformers_logging.disable_progress_bar()
    models = {"model": find_model(settings.model, "policy")}
    if settings.prm:
        models |= {"prm": find_model(settings.prm, "prm"), "reference": find_model(settings.reference, "policy")}
    tokenizer = load_tokenizer(models["model"])
    vocabulary = tokenizer.get_vocab()
    for key, path in models.items():
        if load_tokenizer(path).get_vocab() != vocabulary:
            raise ValueError(f"the tokenizer of the {key} {path} differs from the model's; they must share one")
    problems = _problems(settings, models["model"], tokenizer)
    _claim(settings, models)
    answers = _answer(settings, models["model"], problems, tokenizer, console)
    scores = None
    if settings.prm:
        scores = _score(settings, models, problems, answers["samples"], console)
    summary = report.summarize(problems, answers, scores)
    (settings.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for table in report.tables(summary, models["model"]):
        console.print(table)
    report.draw(summary, models["model"]).savefig(settings.out / "eval.png", dpi=130)
    console.print(f"outputs, summary.json and eval.png: {settings.out}", soft_wrap=True, markup=False)
    return summary


def during_training(rows: Rows, groups: Sequence[Group], tokenizer: Any, outputs: Path | None) -> dict[str, float]:
    """The metrics of a greedy pass over held-out rows, group i of row i: the same numbers as `evaluate` reports.

    eval_accuracy is the share of solved problems (of several data_sources the mean of their shares, each under
    eval_accuracy/NAME too); eval_low and eval_high bound its 95% interval. `outputs` receives a line a problem.
    """
    problems, records = [], []
    for i, group in enumerate(groups):
        problems.append(problem := Problem(rows[i]["data_source"], rows[i], 0))
        texts = [tokenizer.decode(sample.tokens, skip_special_tokens=True) for sample in group.samples]
        records.append(_record(i, problem, group.samples, texts, list(group.outcomes)))
    if outputs is not None:
        outputs.parent.mkdir(exist_ok=True)
        outputs.unlink(missing_ok=True)
        _append(outputs, records)
    summary = report.summarize(problems, {"greedy": records}, None)
    *_, overall = summary.values()
    single = {f"eval_accuracy/{name}": row["greedy"].value for name, row in summary.items() if row is not overall}
    accuracy, low, high = overall["greedy"]
    metrics = {"eval_accuracy": accuracy, "eval_low": low, "eval_high": high} | single
    return metrics | {f"eval_{key}": overall[key] for key in ("outcome", "response_length", "truncated")}


def find_model(path: str, role: str) -> str:
    """A model directory or hub id as it is; of a run_dir or a checkpoint, the `role` (policy or prm) in it."""
    if (newest := latest(Path(path))) is not None:
        return str(newest / role)
    return str(Path(path) / role) if (Path(path) / role).is_dir() else path


def _check(settings: Settings) -> None:
    if bool(settings.prm) != bool(settings.reference):
        raise ValueError("--prm and --reference belong together: the implicit reward is their log-ratio")
    if settings.prm and settings.samples < 2:
        raise ValueError("--prm chooses among samples; set --samples to 2 or more")
    if settings.samples and settings.temperature is not None and settings.temperature <= 0:
        raise ValueError(f"--temperature {settings.temperature}: samples need more than 0 (greedy is always measured)")


def _temperature(settings: Settings) -> float:
    return settings.temperature or (PAPER_TEMPERATURE if settings.preset else 1.0)


def _max_tokens(settings: Settings, benchmark: str) -> int:
    if settings.max_response or not settings.preset:
        return settings.max_response or MAX_RESPONSE
    plain = re.sub(r"[^a-z0-9]", "", benchmark.lower())
    return PAPER_LONG_TOKENS if any(name in plain for name in PAPER_LONG) else PAPER_TOKENS


def _problems(settings: Settings, model: str, tokenizer: Any) -> list[Problem]:
    """Of each file the rows as one benchmark, or one per data_source where a file has several."""
    room = getattr(model_config(model), "max_position_embeddings", None) or 1 << 30
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
            budget = _max_tokens(settings, f"{name} {row['data_source']}")
            if len(row["prompt_ids"]) + budget > room:
                raise ValueError(
                    f"a prompt of {path} has {len(row['prompt_ids'])} tokens, which with {budget} for the response is "
                    f"more than the {room} that {model} has room for; lower --max-response"
                )
            problems.append(Problem(benchmark, row, budget))
    return problems


def _claim(settings: Settings, models: dict[str, str]) -> None:
    """Write down what is evaluated in OUT, or make sure that it is as before. Samples and a PRM may come later."""
    asked = {
        **{key: [path, _changed(path)] for key, path in models.items()},
        "data": [[path, _changed(path)] for path in settings.data],
        "reward": [settings.reward, settings.timeout],
        **{key: getattr(settings, key) for key in ("limit", "max_response", "preset", "seed", "engine")},
        "template": [settings.template, settings.template_args],
        "samples": [settings.samples, _temperature(settings)] if settings.samples else None,
        "beta": settings.beta if settings.prm else None,
    }
    path = settings.out / "settings.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    for key, value in asked.items():
        later = key in ("samples", "prm", "reference", "beta") and None in (before.get(key), value)
        if before and before.get(key) != value and not later:
            raise ValueError(
                f"{settings.out} holds an evaluation with {key} {before.get(key)}, now it is {value}; "
                "put it back, or choose another --out"
            )
    settings.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(before | {k: v for k, v in asked.items() if v is not None}, indent=1) + "\n")


def _changed(path: str) -> float | None:
    """When a file, or anything in a directory, was last written: weights may be replaced under the same name."""
    place = Path(path)
    files = place.iterdir() if place.is_dir() else [place] if place.is_file() else []
    return max((file.stat().st_mtime for file in files), default=None)


def _answer(
    settings: Settings, model: str, problems: list[Problem], tokenizer: Any, console: Console
) -> dict[str, list[dict]]:
    """{"greedy", "samples" if asked}: the records of all problems, those missing on disk generated and graded first."""
    asked = {"greedy": (1, 0.0)} | ({"samples": (settings.samples, _temperature(settings))} if settings.samples else {})
    done = {name: {record["problem"]: record for record in _read(settings.out / f"{name}.jsonl")} for name in asked}
    if all(len(records) == len(problems) for records in done.values()):
        return {name: [done[name][i] for i in range(len(problems))] for name in asked}
    engine = _make_engine(settings, model, problems, tokenizer)
    try:
        with RewardPool(settings.reward, timeout=settings.timeout, sandbox=settings.sandbox) as pool:
            for name, (count, temperature) in asked.items():
                for i, problem in enumerate(problems):
                    if i not in done[name]:
                        seeds = [random.Random(f"{settings.seed}/{i}/{k}").getrandbits(63) for k in range(count)]
                        prompt = problem.row["prompt_ids"]
                        engine.submit(Request(i, prompt, seeds, problem.max_tokens, temperature))
                start, told = time.perf_counter(), len(done[name])
                while len(done[name]) < len(problems):
                    records = _grade(engine.step(), problems, pool, tokenizer)
                    _append(settings.out / f"{name}.jsonl", records)
                    done[name] |= {record["problem"]: record for record in records}
                    if len(done[name]) == len(problems) or len(done[name]) >= told + len(problems) / NEWS:
                        told = len(done[name])
                        _tell(console, name, done[name].values(), len(problems), time.perf_counter() - start)
            if any(pool.counts.values()):
                console.print(f"scored 0 without a verdict: {pool.counts}")
    finally:
        engine.close()
    return {name: [done[name][i] for i in range(len(problems))] for name in asked}


def _grade(
    finished: list[tuple[int, list[Sample]]], problems: list[Problem], pool: RewardPool, tokenizer
) -> list[dict]:
    texts = [[tokenizer.decode(sample.tokens, skip_special_tokens=True) for sample in group] for _, group in finished]
    rows = [problems[i].row for i, group in finished for _ in group]
    outcomes = iter(pool.score(sum(texts, []), rows))
    return [
        _record(i, problems[i], group, responses, [next(outcomes) for _ in group])
        for (i, group), responses in zip(finished, texts, strict=True)
    ]


def _record(i: int, problem: Problem, samples: Sequence[Sample], responses: list[str], outcomes: list[float]) -> dict:
    return {
        "problem": i,
        "benchmark": problem.benchmark,
        "prompt": problem.row["prompt"],
        "ground_truth": (problem.row["reward_model"] or {}).get("ground_truth"),
        "responses": responses,
        "outcomes": outcomes,
        "truncated": [sample.truncated for sample in samples],
        "tokens": [sample.tokens.tolist() for sample in samples],
    }


def _tell(console: Console, name: str, records: Collection[dict], total: int, seconds: float) -> None:
    outcomes = [outcome for record in records for outcome in record["outcomes"]]
    mean = sum(outcomes) / len(outcomes)
    console.print(f"{name:8} {len(records)}/{total}  outcome {mean:.3f}  {seconds:.0f} s")


def _make_engine(settings: Settings, model: str, problems: list[Problem], tokenizer: Any) -> RolloutEngine:
    longest = max(problem.max_tokens for problem in problems)
    prompt = max(len(problem.row["prompt_ids"]) for problem in problems)
    config = Config(
        run_dir=str(settings.out),
        model={"policy": model},
        data={"max_prompt": prompt},
        rollout={"engine": settings.engine, "batch": settings.batch, "max_response": longest},
        engine={"micro_tokens": prompt + longest},
    )
    device = distributed.device()
    return make_engine(config, model, eos_ids(model, tokenizer), training_dtype(config.model, device), device)


def _score(
    settings: Settings, models: dict[str, str], problems: list[Problem], samples: list[dict], console: Console
) -> list[list[float]]:
    """beta * Q of every sample of every problem. One model is in memory at a time."""
    path = settings.out / "prm.jsonl"
    records = _read(path)
    if len(records) < len(problems):
        start, device = time.perf_counter(), distributed.device()
        responses = [torch.tensor(tokens) for record in samples for tokens in record["tokens"]]
        scores = implicit_rewards(
            models["prm"],
            models["reference"],
            [torch.tensor(problem.row["prompt_ids"]) for problem in problems for _ in range(settings.samples)],
            responses,
            beta=settings.beta,
            dtype=training_dtype(ModelConfig(policy=models["prm"]), device),
            device=device,
        )
        records = [{"problem": i, "scores": row} for i, row in enumerate(scores.view(len(problems), -1).tolist())]
        path.unlink(missing_ok=True)
        _append(path, records)
        console.print(f"prm      {len(responses)} samples scored in {time.perf_counter() - start:.1f} s")
    return [record["scores"] for record in records]


def _read(path: Path) -> list[dict]:
    """The whole lines of a file; what a kill left half-written at its end is cut off."""
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(path, whole)
    return [json.loads(line) for line in text[:whole].splitlines()]


def _append(path: Path, records: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
