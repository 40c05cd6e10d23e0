"""convert: another trainer's run as our configuration."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_to(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser("convert", help="a verl or PRIME launch script as our configuration")
    convert.add_argument("file", metavar="FILE", help="launch script, overrides or Hydra YAML; - for stdin")
    convert.add_argument("--out", metavar="CONFIG", help="write it there and print what was not carried alone")
    convert.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    from prime_fast import durable
    from prime_fast.integrations.verl import convert

    try:
        text = sys.stdin.read() if options.file == "-" else Path(options.file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{options.file} cannot be read ({error}); give a launch script or YAML in UTF-8") from error
    try:
        made = convert(text)
    except ValueError as error:
        raise ValueError(f"{options.file}: {error}") from error
    if options.out is None:
        print(made.yaml(), end="")
        return
    durable.replace(Path(options.out), made.yaml())
    print("\n".join([*made.notes(), f"wrote {options.out}"]))
