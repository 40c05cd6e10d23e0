"""Do the watchers tell what goes wrong, and nothing where nothing does? Real runs of the quickstart, made to fail.

    python -m benchmarks.watchers [--jobs 2]

Each of FAILURES is the quickstart's run with settings that break it in one way; HEALTHY are arms of
`python -m benchmarks.learning`, as they are. A run that lies finished in --out is taken as it is. Writes
benchmarks/results/cpu/watchers.json (which watcher began in which step) and prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.learning import study as learning
from benchmarks.machine import cpu_name, results
from prime_fast.config import load_config
from prime_fast.metrics import read_metrics
from prime_fast.watch import limits_of, replay

CONFIG = "configs/quickstart.yaml"
HEALTHY = (("rloo", 0), ("rloo", 1), ("published", 0), ("odds-size+step+keen+x4", 0), ("odds-size+step+keen+x4", 1))
SMALL = ("steps=25", "rollout.prompts=16", "policy.mini_batch=32", "prm.mini_batch=32", "rollout.patience=0")
SMALL += ("log.eval_every=0", "log.checkpoint_every=0")
FAILURES: dict[str, tuple[str, ...]] = {
    "policy.lr 30 times as high": ("policy.lr=3.0e-3",),
    "policy.lr 300 times as high": ("policy.lr=3.0e-2",),
    "several epochs at policy.lr=1e-3": ("policy.lr=1.0e-3", "policy.epochs=4", "steps=8"),
    "an entropy bonus of 2": ("policy.lr=3.0e-4", "policy.entropy_coef=2", "rollout.max_response=120"),
    "no baseline": (
        "prime.process_weight=0", "prime.estimator=reinforce", "prime.whiten=false", "rollout.keep=[0, 1]",
        "policy.lr=1.0e-3",
    ),
    "responses cut off": ("rollout.max_response=20",),
    "a PRM that does not learn": ("prm.lr=0",),
    "an untrained PRM, trusted": (
        "prime.credit=critic", "prime.gate=none", "prime.update=none", "model.prm={task}/model",
    ),
    "a process weight of 20": ("prime.process_weight=20", "steps=22"),
    "an interval that no mean lies in": ("rollout.keep=[0.3, 0.4]", "steps=8"),
    "a reward that is always 0": ("reward.function=benchmarks.watchers:constant", "steps=5"),
    "a reward that hangs": ("reward.function=benchmarks.watchers:hangs", "reward.timeout=2", "steps=3"),
    "prm.lr 100 times as high": ("prm.lr=1.0e-2",),
}  # fmt: skip


def constant(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    return 0.0


def hangs(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    if sum(map(ord, solution_str)) % 5 < 2:
        time.sleep(60)
    return float(sum(map(ord, solution_str)) % 2)


def fail(study: learning.Study, name: str) -> None:
    """Bring one run to its end, however that is."""
    run, start = folder(study, name), study.start("task", 0)
    if (run / "ended").is_file():
        return
    shutil.rmtree(run, ignore_errors=True)
    settings = [f"data.train={start / 'train.jsonl'}", f"data.eval={start / 'eval.jsonl'}", *SMALL, *FAILURES[name]]
    settings += [f"model.policy={study.start('sft', 0) / 'model'}", f"run_dir={run}"]
    command = [sys.executable, "-m", "prime_fast", "train", CONFIG, *(text.format(task=start) for text in settings)]
    environment = os.environ | {"OMP_NUM_THREADS": str(study.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    (run / "ended").write_text(done.stdout + done.stderr)


def folder(study: learning.Study, name: str) -> Path:
    return study.out.with_name("watchers") / name.replace(" ", "-").replace(",", "")


def told(run: Path) -> dict[str, Any]:
    records, limits = read_metrics(run), limits_of(load_config(run / "config.yaml"))
    began = {change.name: change.step for change in replay(records, limits) if change.began}
    return {"steps": records[-1]["step"], "began": began}


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| run | steps | watchers that began, in step |", "| --- | --- | --- |"]
    for name, run in found.items():
        began = ", ".join(f"{watcher} {step}" for watcher, step in run["began"].items())
        lines.append(f"| {name} | {run['steps']} | {began or '-'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watchers", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="as of benchmarks.learning")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--failures", nargs="+", choices=FAILURES, default=list(FAILURES))
    parser.add_argument("--report", action="store_true", help="run nothing, take what is finished")
    parser.add_argument("--result", type=Path, default=results("cpu") / "watchers.json")
    arguments = parser.parse_args()
    study = learning.Study(arguments.out / "chain6", CONFIG, (), load_config(CONFIG).steps, True, threads=1)
    study.out.mkdir(parents=True, exist_ok=True)
    failures = arguments.failures
    if arguments.report:
        failures = [name for name in failures if (folder(study, name) / "ended").is_file()]
    else:
        learning.in_parallel(learning.prepare, arguments.jobs, [(study, seed) for seed in {s for _, s in HEALTHY}])
        learning.in_parallel(learning.train, arguments.jobs, [(study, *healthy) for healthy in HEALTHY])
        learning.in_parallel(fail, arguments.jobs, [(study, name) for name in failures])
    found = {f"healthy: {name}, seed {seed}": told(study.run(name, seed)) for name, seed in HEALTHY}
    found |= {name: {"settings": FAILURES[name]} | told(folder(study, name)) for name in failures}
    machine = {"device": cpu_name(), "cores": os.cpu_count()}
    arguments.result.write_text(json.dumps({"machine": machine, "base": SMALL, "runs": found}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
