"""eval and score: how good a model's, or given, responses are."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

from rich.console import Console

from prime_fast.cli.words import count, samples_responses, settings_of, takes_reward
from prime_fast.data.shapes import WHERE
from prime_fast.progress import progress

SCORE_ROWS = 4096  # graded at a time


def add_to(commands: argparse._SubParsersAction) -> None:
    _add_eval(commands.add_parser("eval", help="accuracy on files of rows, with intervals; best-of-n with a PRM"))
    _add_score(commands.add_parser("score", help="outcomes of given responses, by the trainer's reward code"))


def _add_eval(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", nargs="+", required=True, metavar="ROWS", help="files of rows, one benchmark each")
    command.add_argument("--out", help="directory of the results (default: runs/eval/ and the model's name)")
    command.add_argument(
        "--against", metavar="OTHER", help="compare, paired by problem, with this model or directory of an evaluation"
    )
    command.add_argument("--samples", type=count, default=0, metavar="K", help="also draw K samples: avg@K, pass@K")
    command.add_argument("--preset", choices=["paper"], help="4096 tokens; 8192 for MATH-500, LeetCode, LiveCodeBench")
    command.add_argument(
        "--prm", help="best-of-n of the samples by this implicit PRM (a run_dir or checkpoint will do)"
    )
    command.add_argument("--reference", help="the PRM's reference model")
    samples_responses(command)
    takes_reward(command)
    command.set_defaults(run=_eval)


def _add_score(command: argparse.ArgumentParser) -> None:
    command.add_argument("rows", metavar="ROWS", help=".jsonl, .json or .parquet file of rows")
    command.add_argument("--responses", required=True, metavar="FILE", help="JSON lines in the order of the rows")
    command.add_argument("--workers", type=count, metavar="N", help="processes (default: one a core, at most 16)")
    command.add_argument("--out", metavar="FILE", help="write the outcomes as JSON lines")
    takes_reward(command)
    command.set_defaults(run=_score)


def _eval(options: argparse.Namespace) -> None:
    from prime_fast.evaluation.evaluate import default_out, evaluate

    evaluate(settings_of(options, default_out(options.model)), Console())


def _score(options: argparse.Namespace) -> None:
    from prime_fast.data.sources import read
    from prime_fast.rewards import RewardPool

    shape, rows = read(options.rows)
    pairs = _answered(rows, options.rows, options.responses)
    outcomes, start = [], time.perf_counter()
    with (
        RewardPool(options.reward, options.workers, options.timeout, options.sandbox) as pool,
        progress("scoring", unit="responses") as tick,
    ):
        while part := list(islice(pairs, SCORE_ROWS)):
            texts, owners = [text for _, texts in part for text in texts], [r for r, texts in part for _ in texts]
            outcomes += pool.score(texts, owners, tick)
        counts = ", ".join(f"{count} {name}" for name, count in pool.counts.items())
    if not outcomes:
        raise ValueError(f"{options.responses} holds no responses")
    seconds = time.perf_counter() - start
    if options.out:
        Path(options.out).write_text("".join(f"{json.dumps({'outcome': outcome})}\n" for outcome in outcomes))
    print(
        f"{len(outcomes)} responses to {options.rows} ({shape}): {sum(outcome == 1 for outcome in outcomes)} score 1, "
        f"mean outcome {sum(outcomes) / len(outcomes):.4f}, {counts}, {seconds:.1f} s"
    )


def _answered(rows: Iterator, rows_name: str, name: str) -> Iterator[tuple[dict, list[str]]]:
    """Each row with its responses: a line holds a JSON string, a list of them, or an object with `response(s)`."""
    with open(name, encoding="utf-8") as file:
        for number, pair in enumerate(zip_longest(rows, (line for line in file if line.strip())), 1):
            if None in pair:
                raise ValueError(f"{rows_name} and {name} differ in length: only one has a row {number}")
            (where, row), line = pair
            if isinstance(row, ValueError):
                raise row
            try:
                given = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{name}, line {number} is not JSON: {error}") from None
            if isinstance(given, dict):
                given = given.get("responses", given.get("response"))
            texts = given if isinstance(given, list) else [given]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(
                    f"{name}, line {number} has no response: it must be a string, a list of strings, or "
                    'an object with "response" or "responses"'
                )
            yield row | {WHERE: str(where)}, texts
