"""python -m prime_fast.config docs/settings.md"""

import argparse
from pathlib import Path

from prime_fast.config.page import page

parser = argparse.ArgumentParser(prog="prime_fast.config", description="write the page of all settings")
parser.add_argument("file", type=Path)
parser.parse_args().file.write_text(page())
