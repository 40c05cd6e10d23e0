"""rollouts and score-steps: what a process reward model learns from, and what it then says of steps."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from prime_fast.cli.words import count, samples_responses, settings_of, takes_reward, takes_template


def add_to(commands: argparse._SubParsersAction) -> None:
    _add_rollouts(commands.add_parser("rollouts", help="labelled responses of any model, to train a PRM on"))
    _add_score_steps(
        commands.add_parser("score-steps", help="a PRM's reward of every token and step; ProcessBench's F1")
    )


def _add_rollouts(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", nargs="+", required=True, metavar="ROWS", help="files of rows")
    command.add_argument("--samples", type=count, default=8, metavar="N", help="responses to each row (default: 8)")
    command.add_argument("--out", help="directory of rollouts.jsonl (default: runs/rollouts/ and the model's name)")
    samples_responses(command)
    takes_reward(command)
    command.set_defaults(run=_rollouts)


def _add_score_steps(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a run of train or prm, a checkpoint, a PRM; or its policy")
    command.add_argument("rows", nargs="+", metavar="ROWS", help="files of rows with responses, or of ProcessBench")
    command.add_argument("--prm", help="the PRM (default: that of MODEL)")
    command.add_argument("--reference", help="the PRM's reference model (default: that of the run MODEL)")
    command.add_argument("--beta", type=float, help="of the rewards (default: that of the run MODEL, else 0.05)")
    command.add_argument("--out", metavar="FILE", help="JSON lines (default: in runs/steps/, by the name of MODEL)")
    command.add_argument("--separators", default="\\n", metavar="REGEX", help="ends a step (default: a line break)")
    command.add_argument("--number-steps", action="store_true", help="begin a row's `steps` with `Step 1: ` and so on")
    command.add_argument("--threshold", type=float, metavar="P", help="a step whose chance is below is wrong")
    command.add_argument(
        "--threshold-from", metavar="ROWS", help="take the threshold with the highest F1 there (default: on ROWS)"
    )
    command.add_argument("--limit", type=count, metavar="N", help="only the first N responses of each file")
    takes_template(command)
    command.set_defaults(run=_score_steps)


def _rollouts(options: argparse.Namespace) -> None:
    from prime_fast.evaluation.evaluate import default_out
    from prime_fast.stages.rollouts import rollouts

    rollouts(settings_of(options, Path("runs/rollouts", default_out(options.model).name)), Console())


def _score_steps(options: argparse.Namespace) -> None:
    from prime_fast.evaluation.evaluate import default_out
    from prime_fast.evaluation.step_files import Question, answer

    given = {key: value for key, value in vars(options).items() if key in Question.__dataclass_fields__}
    given["out"] = Path(options.out or f"runs/steps/{default_out(options.model).name}.jsonl")
    answer(Question(**given), Console())
