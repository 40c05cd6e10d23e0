"""Responses to the problems of an evaluation, graded, voted and scored; every rank answers its share."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from prime_fast.engine import distributed
from prime_fast.engine.batch import Sample
from prime_fast.evaluation import outputs
from prime_fast.evaluation.bestofn import implicit_rewards
from prime_fast.evaluation.votes import SECONDS, answer_of, unite
from prime_fast.progress import progress
from prime_fast.rewards import RewardPool
from prime_fast.rewards.functions import ability_of
from prime_fast.rewards.pool import MAX_DEFAULT_WORKERS
from prime_fast.rollout import Request, RolloutEngine


class Problem(NamedTuple):
    benchmark: str
    row: dict
    max_tokens: int  # of its response; 0 where the model has no room for any, which counts as wrong
    clamped: bool = False  # whether the model has less room than was asked for


class Draw(NamedTuple):
    """Responses to draw per problem, kept in OUT/name.jsonl."""

    name: str
    count: int
    temperature: float


def workers() -> int:
    """Reward processes of this rank."""
    return min(max(1, (os.cpu_count() or 1) // distributed.local_world_size()), MAX_DEFAULT_WORKERS)


def generate(
    path: Path,
    draw: Draw,
    seed: int,
    problems: Sequence[Problem],
    missing: Sequence[int],
    engine: RolloutEngine | None,
    pool: RewardPool,
    tokenizer: Any,
    console: Console,
) -> dict[int, dict]:
    """Draws and grades the missing problems; the records of all. Ranks without an engine wait for those with one."""
    leaders = distributed.gather_lists([] if engine is None else [distributed.rank()])
    share = [] if engine is None else missing[leaders.index(distributed.rank()) :: len(leaders)]

    def batches() -> Iterator[list[dict]]:
        todo = len(share)
        for i in share:
            problem = problems[i]
            seeds = [random.Random(f"{seed}/{i}/{k}").getrandbits(63) for k in range(draw.count)]
            if problem.max_tokens:
                engine.submit(Request(i, problem.row["prompt_ids"], seeds, problem.max_tokens, draw.temperature))
            else:
                todo -= 1
                nothing = Sample(torch.zeros(0, dtype=torch.int64), torch.zeros(0), True)
                yield [record(i, problem, [nothing] * draw.count, [""] * draw.count, [0.0] * draw.count)]
        start, outcomes, mean = time.perf_counter(), [], ""
        unit = "problems" + (f" of {len(leaders)} engines' first" if len(leaders) > 1 else "")
        with progress(draw.name, todo, unit) as tick:
            while tick.done < todo:
                finished = engine.step()
                records = _grade(finished, problems, pool, tokenizer)
                yield records
                outcomes += [outcome for record in records for outcome in record["outcomes"]]
                mean = f"outcome {sum(outcomes) / len(outcomes):.3f}" if outcomes else ""
                tick(len(records), tokens=sum(len(s.tokens) for _, group in finished for s in group), note=mean)
        if todo:
            console.print(f"{draw.name:8} {todo}/{todo} {unit}  {mean}  {time.perf_counter() - start:.0f} s")

    return outputs.write(path, batches())


def record(i: int, problem: Problem, samples: Sequence[Sample], responses: list[str], outcomes: list[float]) -> dict:
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


def vote(path: Path, problems: Sequence[Problem], samples: Sequence[dict], console: Console) -> list[list[str | None]]:
    """What each sample of every problem votes for."""
    done = outputs.read(path)
    if len(done) < len(problems):
        share = [i for i in range(len(problems)) if i not in done][distributed.rank() :: distributed.world_size()]
        abilities = [ability_of(problems[i].row) for i in share]
        answers = [
            [answer_of(text, ability) for text in samples[i]["responses"]]
            for i, ability in zip(share, abilities, strict=True)
        ]
        with RewardPool("math", workers(), SECONDS) as pool, progress("votes", unit="comparisons") as tick:
            united = unite(answers, [ability != "code" for ability in abilities], pool, tick)
            late = sum(distributed.gather_lists([pool.counts["timeouts"]]))
        done = outputs.write(path, [[{"problem": i, "votes": row} for i, row in zip(share, united, strict=True)]])
        if late:
            console.print(f"votes    {late} comparisons of answers took over {SECONDS:g} s and count as different")
    return [done[i]["votes"] for i in range(len(problems))]


def score(
    path: Path,
    models: tuple[str, str],
    problems: Sequence[Problem],
    samples: Sequence[dict],
    console: Console,
    **options: Any,
) -> list[list[float]]:
    """beta * Q of every sample of every problem by (PRM, reference), one model in memory at a time; 0 if empty."""
    done = outputs.read(path)
    if len(done) < len(problems):
        start = time.perf_counter()
        share = [i for i in range(len(problems)) if i not in done][distributed.rank() :: distributed.world_size()]
        rows = [(i, k) for i in share for k, tokens in enumerate(samples[i]["tokens"]) if tokens]
        prompts = [torch.tensor(problems[i].row["prompt_ids"]) for i, _ in rows]
        responses = [torch.tensor(samples[i]["tokens"][k]) for i, k in rows]
        scores = {i: [0.0] * len(samples[i]["tokens"]) for i in share}
        if rows:
            for (i, k), value in zip(rows, implicit_rewards(*models, prompts, responses, **options), strict=True):
                scores[i][k] = float(value)
        done = outputs.write(path, [[{"problem": i, "scores": row} for i, row in scores.items()]])
        console.print(f"prm      {len(problems)} problems' samples scored in {time.perf_counter() - start:.1f} s")
    return [done[i]["scores"] for i in range(len(problems))]


def _grade(
    finished: list[tuple[int, list[Sample]]], problems: Sequence[Problem], pool: RewardPool, tokenizer: Any
) -> list[dict]:
    texts = [[tokenizer.decode(sample.tokens, skip_special_tokens=True) for sample in group] for _, group in finished]
    rows = [problems[i].row for i, group in finished for _ in group]
    outcomes = iter(pool.score(sum(texts, []), rows))
    return [
        record(i, problems[i], group, responses, [next(outcomes) for _ in group])
        for (i, group), responses in zip(finished, texts, strict=True)
    ]
