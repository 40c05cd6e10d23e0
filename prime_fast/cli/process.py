"""rollouts and score-steps: what a process reward model learns from, and what it then says of steps."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from prime_fast.cli.words import count, samples_responses, settings_of, takes_reward


def add_to(commands: argparse._SubParsersAction) -> None:
    _add_rollouts(commands.add_parser("rollouts", help="labelled responses of any model, to train a PRM on"))


def _add_rollouts(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="run_dir, RUN_DIR/checkpoints/best, model directory or hub id")
    command.add_argument("--data", nargs="+", required=True, metavar="ROWS", help="files of rows")
    command.add_argument("--samples", type=count, default=8, metavar="N", help="responses to each row (default: 8)")
    command.add_argument("--out", help="directory of rollouts.jsonl (default: runs/rollouts/ and the model's name)")
    samples_responses(command)
    takes_reward(command)
    command.set_defaults(run=_rollouts)


def _rollouts(options: argparse.Namespace) -> None:
    from prime_fast.evaluation.evaluate import default_out
    from prime_fast.stages.rollouts import rollouts

    rollouts(settings_of(options, Path("runs/rollouts", default_out(options.model).name)), Console())
