"""report, show and doctor: what a person looks at."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from prime_fast.cli.words import count


def add_to(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser("report", help="draw the curves of one or several runs and print their table")
    report.add_argument("runs", nargs="+", metavar="RUN_DIR")
    report.words = "runs"
    report.add_argument("--out", help="path of the picture (default: report/curves.png in the first run)")
    report.set_defaults(run=_report)

    show = commands.add_parser("show", help="responses coloured by token reward: an HTML page, or one of them as a PNG")
    show.add_argument("source", metavar="RUN|FILE", help="run_dir, or JSON lines of responses with a number a token")
    show.add_argument("--step", type=int, metavar="N", help="of the training, this one alone")
    show.add_argument("--row", type=int, metavar="I", help="of the data, the responses to this one alone")
    show.add_argument("--out", metavar="FILE", help="the page (default: report/show.html in the run, or beside FILE)")
    show.add_argument("--png", metavar="FILE", help="draw one response into this picture instead, as for a paper")
    show.add_argument("--response", type=count, metavar="K", help="of the newest group, for --png (default: 1)")
    show.set_defaults(run=_show)

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


def _show(options: argparse.Namespace) -> None:
    if options.png:
        from prime_fast.views.show.picture import draw

        if options.out:
            raise ValueError("--png draws a picture and --out names a page; give one of the two")
        print(f"picture: {draw(options.source, options.png, options.step, options.row, options.response or 1)}")
        return
    from prime_fast.views.show.page import show

    if options.response:
        raise ValueError("--response chooses what --png draws; add --png FILE, or leave it away")
    path, note = show(options.source, options.out, options.step, options.row)
    print(f"{note}: {path}")


def _doctor(options: argparse.Namespace) -> int:
    from prime_fast.views import doctor

    return doctor.main(options.run_dir, options.quick, options.json)
