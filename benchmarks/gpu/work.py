"""What the driver runs, in a process of its own: python -m benchmarks.gpu.work MODULE FOLDER SECONDS SETTINGS"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

from benchmarks.gpu.job import Job


def main(module: str, folder: str, seconds: str, settings: str) -> None:
    job = Job(Path(folder, f"{module.rpartition('.')[2]}.json"), json.loads(settings), float(seconds))
    try:
        importlib.import_module(module).run(job)
    except Exception:  # noqa: BLE001  the stage's own error, for its record
        job.record["error"] = traceback.format_exc(limit=-3)[-3000:].strip()
    job.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
