"""python -m benchmarks.measured docs/measured.md"""

import argparse
from pathlib import Path

from benchmarks.measured.page import page

parser = argparse.ArgumentParser(prog="benchmarks.measured", description="write the page of what was measured")
parser.add_argument("file", type=Path)
parser.parse_args().file.write_text(page())
