"""Stage 6: whole steps beside the published dataflow, and TRL where it is installed: `python -m benchmarks.step`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import step
from benchmarks.gpu.job import ROOT, Item, Job

SHAPES = {"0.5B": 200, "1.5B": 300}  # seconds
TINY = ["--quick", "--cases", "uniform", "--arms", "ours RLOO", "published RLOO"]


def run(job: Job) -> None:
    if absent := step.missing():
        job.do([Item("whole", 0, partial(step.refuse, absent))])
    elif job.small:
        job.do([Item("tiny", 0, partial(measure, job, TINY))])
    else:
        job.do([Item(shape, seconds, partial(measure, job, ["--shape", shape])) for shape, seconds in SHAPES.items()])


def measure(job: Job, arguments: list[str]) -> dict[str, Any]:
    """What the benchmark writes; its exit code is 1 where arms disagree that should compute the same."""
    with tempfile.TemporaryDirectory(prefix="prime-fast-whole-") as folder:
        command = [sys.executable, "-m", "benchmarks.step", "--device", job.device, "--out", folder, *arguments]
        command += ["--rounds", "2", "--minutes", str(job.left / 120)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, job.left))
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
        (written,) = Path(folder).glob("step*.json")
        found = json.loads(written.read_text())
    seconds = {f"{row['case']}: {row['arm']}": row["seconds"] for row in found["rows"] if "seconds" in row}
    ratios = {f"{item['case']}: {item['what']}": item["ratio"] for item in found["comparisons"]}
    return {"step_seconds": seconds, "ratios": ratios, "settings": found["settings"], "rows": found["rows"]}
