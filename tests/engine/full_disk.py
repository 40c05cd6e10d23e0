"""Run by test_full_disk.py in namespaces of its own: what is left when a small disk fills up, in each phase.

usage: full_disk.py FOLDER CONFIG
"""

import errno
import json
import os
import sys
from pathlib import Path

from prime_fast import durable
from prime_fast.cli import main
from prime_fast.engine import checkpoint, manifest
from prime_fast.lock import LOCK
from prime_fast.metrics import read_metrics, write_samples


def fill(path: Path, leave: int) -> None:
    """Leave so many bytes."""
    free = os.statvfs(path.parent)
    with open(path, "wb") as file:
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.name != LOCK]


def check(folder: Path, config: str) -> None:
    run_dir, filler = folder / "run", folder / "filler"
    words = ["sft", config, f"run_dir={run_dir}", "log.checkpoint_every=1", "log.keep=9"]
    assert main([*words, "sft.steps=1"]) == 0
    size = sum(path.stat().st_size for path in (run_dir / "checkpoints").rglob("*") if path.is_file())

    fill(filler, size + size // 2)  # room for one checkpoint, not for a second
    print("1", file=sys.stderr)
    assert main([*words, "sft.steps=4", "--resume"]) == 1
    print("2", file=sys.stderr)
    whole = checkpoint.listed(run_dir / "checkpoints")
    assert [path.name for path in whole] == ["step-000001", "step-000002"] and not hidden(run_dir)
    assert checkpoint.latest(run_dir) == whole[1] and not any(map(manifest.problem, whole))

    fill(folder / "more", 0)
    before = {path: path.read_bytes() for path in run_dir.glob("*") if path.is_file()}
    print("3", file=sys.stderr)
    assert main([*words, "sft.steps=4", "--resume"]) == 1
    print("4", file=sys.stderr)
    assert {path: path.read_bytes() for path in run_dir.glob("*") if path.is_file()} == before and not hidden(run_dir)
    for attempt in (
        lambda: write_samples(run_dir, [{"step": 1, "text": "x" * (1 << 16)}]),
        lambda: durable.replace(run_dir / "eval/step-000001.jsonl", "x" * (1 << 16)),
    ):
        try:
            attempt()
        except OSError as error:
            assert error.errno == errno.ENOSPC and str(run_dir) in error.filename, error
        else:
            raise AssertionError("the disk is not full")
    assert not (run_dir / "samples.jsonl").stat().st_size and not list((run_dir / "eval").iterdir())

    filler.unlink()
    (folder / "more").unlink()
    assert main([*words, "sft.steps=4", "--resume"]) == 0
    assert [record["step"] for record in read_metrics(run_dir)] == [1, 2, 3, 4]
    assert all(json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())


if __name__ == "__main__":
    check(Path(sys.argv[1]), sys.argv[2])
