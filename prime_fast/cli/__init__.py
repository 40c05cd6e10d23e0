"""prime-fast from the command line. A user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from prime_fast.cli import converting, grading, process, training, views
from prime_fast.cli.words import Command
from prime_fast.progress import lasting_output, say


def main(arguments: Sequence[str] | None = None) -> int:
    with lasting_output():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    options = parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, FileNotFoundError) as error:
        if not _is_ours(error):
            raise
        say(f"prime-fast: {error}", sys.stderr)
        return 2
    except RuntimeError as error:
        from prime_fast.engine.distributed import Stop

        if not isinstance(error, Stop):
            raise
        say(f"prime-fast: {error}", sys.stderr)
        return error.code


def _is_ours(error: Exception) -> bool:
    """Whether our own code raised it, so that its message is the sentence for the user; else the traceback matters."""
    import prime_kernels

    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    homes = [Path(__file__).parents[1], Path(prime_kernels.__file__).parent]
    return any(Path(frame.tb_frame.f_code.co_filename).is_relative_to(home) for home in homes)


class _Version(argparse.Action):
    def __call__(self, parser, *_) -> None:
        from prime_fast import __version__  # loads torch

        print(f"prime-fast {__version__}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="prime-fast", description=__doc__)
    made.add_argument("--version", action=_Version, nargs=0, dest=argparse.SUPPRESS, help="print it and exit")
    commands = made.add_subparsers(required=True, metavar="COMMAND", parser_class=Command)
    for group in (training, process, grading, views, converting):
        group.add_to(commands)
    return made
