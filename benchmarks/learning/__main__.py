"""The command: see the package."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import learning
from benchmarks.learning import study as runs
from benchmarks.learning import views
from benchmarks.learning.arms import ADDITIONS, DEFAULT_ARMS, FORMS, TASKS, arm
from benchmarks.learning.study import Study
from benchmarks.learning.summary import collect
from benchmarks.machine import cpu_name
from prime_fast.config import load_config

NOT_RECORDED = {"out", "result", "config", "report", "jobs", "threads"}  # where, and what cannot change a result


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.learning", description=learning.__doc__.split("\n")[0])
    parser.add_argument("--task", choices=TASKS, default=next(iter(TASKS)))
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="gets a folder for each task")
    parser.add_argument("--config", default="configs/quickstart.yaml")
    what = f"of {', '.join(FORMS)}; FORM+ADDITION of {', '.join(ADDITIONS)} (default: {' '.join(DEFAULT_ARMS)})"
    parser.add_argument("--arms", nargs="+", help=what)
    parser.add_argument("--seeds", nargs="+", type=int, help="(default: 0 1 2)")
    parser.add_argument("--steps", type=int, help="of every arm (default: the task's)")
    parser.add_argument("--warmup", type=int, default=Study.warmup, help="steps that a warm PRM is trained for before")
    parser.add_argument("--sft-per-seed", action="store_true", help="an SFT model for each seed, not one for all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="CPU threads of each run (default: cores / jobs)")
    parser.add_argument("--report", action="store_true", help="run nothing, take what is finished")
    parser.add_argument("--result", type=Path, metavar="JSON", help="write it and its pictures there too")
    overrides = [text for text in arguments if "=" in text and not text.startswith("-")]  # they may follow --seeds 0 1
    options = parser.parse_args([text for text in arguments if text not in overrides])
    options.overrides = tuple(overrides)
    options.threads = options.threads or max(1, os.cpu_count() // options.jobs)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(sys.argv[1:] if arguments is None else list(arguments))
    try:
        study, results = work(options)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"benchmarks.learning: {error}")
    document = {
        "command": command(options, study),
        "hardware": hardware(options.jobs, options.threads),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed", "prime-fast")},
        "task": study.task,
        "settings": study.settings,
        "steps": study.steps,
        "warmup_steps": study.warmup,
        "arms": results,
    }
    for path in filter(None, (study.out / "learning.json", options.result)):
        path.write_text(json.dumps(document, indent=1) + "\n")
        views.pictures(results, path.with_suffix(".png"))
    print(views.markdown(results))


def work(options: argparse.Namespace) -> tuple[Study, dict]:
    """Run what is not finished, unless only a report is asked for; the study and its results."""
    for name in options.arms or ():
        arm(name)
    out, many, steps = options.out / options.task, options.sft_per_seed, options.steps or 0
    study = Study(out, options.config, options.overrides, steps, many, options.threads, options.task, options.warmup)
    if not steps:
        study = replace(study, steps=load_config(study.config, study.settings).steps)
    if options.report:
        found = [
            (name, seed)
            for name, seed in study.runs()
            if (not options.arms or name in options.arms) and (not options.seeds or seed in options.seeds)
        ]
    else:
        seeds = options.seeds or [0, 1, 2]
        study.out.mkdir(parents=True, exist_ok=True)
        runs.in_parallel(runs.prepare, options.jobs, [(study, seed) for seed in (seeds if many else seeds[:1])])
        found = [(name, seed) for seed in seeds for name in options.arms or DEFAULT_ARMS]
        helpers = dict.fromkeys((arm(name).helper, seed) for name, seed in found if arm(name).helper)
        for stage in (helpers, found):
            runs.in_parallel(runs.train, options.jobs, [(study, *pair) for pair in stage])
    results = collect(study, found)
    if not results:
        raise ValueError(f"{study.out} holds no finished run; leave --report away to make some")
    return study, results


def command(options: argparse.Namespace, study: Study) -> str:
    """What gives the same runs again."""
    words = []
    for key, value in vars(options).items():
        if key in NOT_RECORDED | {"overrides"} or value in (None, False):
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return shlex.join(["python", "-m", "benchmarks.learning", *words, *study.overrides])


def hardware(jobs: int, threads: int) -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "gpu": gpu, "runs_at_a_time": jobs, "threads_per_run": threads}


if __name__ == "__main__":
    main()
