"""report and doctor: what a person looks at."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console


def add_to(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser("report", help="draw the curves of one or several runs and print their table")
    report.add_argument("runs", nargs="+", metavar="RUN_DIR")
    report.words = "runs"
    report.add_argument("--out", help="path of the picture (default: report/curves.png in the first run)")
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", help="what this machine has and lacks; tries to escape from the sandbox")
    doctor.add_argument("--quick", action="store_true", help="without the attempts to escape")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    doctor.add_argument("--run-dir", default="runs", metavar="DIR", help="whose disk is looked at (default: runs)")
    doctor.set_defaults(run=_doctor)


def _report(options: argparse.Namespace) -> None:
    print_report(options.runs, options.out)


def print_report(runs: Sequence[str], out: str | None = None) -> None:
    from prime_fast.views.report import report, summary_table

    picture = report(runs, out)
    Console().print(summary_table(runs))
    print(f"curves: {picture}")


def _doctor(options: argparse.Namespace) -> int:
    from prime_fast.views import doctor

    return doctor.main(options.run_dir, options.quick, options.json)
