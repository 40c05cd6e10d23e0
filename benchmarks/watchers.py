"""Do the watchers tell what goes wrong, and nothing where nothing does? Real runs, made to fail in one way each.

    python -m benchmarks.watchers [--jobs 2]

Each of FAILURES is a small run of the quickstart's task that must make the watchers begin which it names; the healthy
runs are those of HEALTHY that `python -m benchmarks.learning` has finished, whose SFT model the others start from.
A failing run that lies finished in --out is taken as it is. Writes benchmarks/results/cpu/watchers.json (which watcher
began in which step) and prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.learning import study as learning
from benchmarks.learning.arms import PLAIN, TASKS
from benchmarks.machine import cpu_name, results
from prime_fast.config import load_config
from prime_fast.metrics import read_metrics
from prime_fast.stages.quickstart import compute_score
from prime_fast.watch import limits_of, replay

CONFIG = "configs/quickstart.yaml"
HEALTHY = ("rloo", "rloo+unfiltered", "odds-size+step+keen+faster+x4+unfiltered")
MAKES_THEM = "python -m benchmarks.learning --task chain6 --steps 40 --sft-per-seed data.eval_rows=512"
# PRIME as published, in steps of a second
BASE = (*PLAIN, "rollout.prompts=16", "policy.mini_batch=32", "prm.mini_batch=32", "rollout.patience=0")
BASE += ("log.eval_every=0", "log.checkpoint_every=0")
OUTCOMES = ("prime.process_weight=0",)  # alone
GRADER = "reward.function=benchmarks.watchers:"
# now and then a response of another length is drawn, and learnt from
DRAWS = ("rollout.temperature=1.2", "rollout.keep=[0, 1]", "policy.lr=3.0e-4")


class Failure(NamedTuple):
    """tells: the watchers that must begin. fault: of benchmarks.faults, where no setting gives it."""

    tells: tuple[str, ...]
    settings: tuple[str, ...]
    fault: str | None = None


FAILURES = {
    "policy.lr 30 times as high": Failure(("outcome_fall", "reference_kl"), ("policy.lr=3.0e-3", "steps=12")),
    "policy.lr 300 times as high": Failure(
        ("reward_constant", "few_groups"), (*OUTCOMES, "policy.lr=3.0e-2", "steps=8"),
    ),
    "several epochs at policy.lr=1e-3": Failure(
        ("policy_kl",), (*OUTCOMES, "policy.lr=1.0e-3", "policy.epochs=4", "steps=8"),
    ),
    "an entropy bonus of 2": Failure(
        ("entropy_explosion",),
        (*OUTCOMES, "policy.lr=3.0e-4", "policy.entropy_coef=2", "rollout.max_response=120", "steps=16"),
    ),
    "no baseline": Failure(
        ("outcome_fall",),
        (
            *OUTCOMES, "prime.estimator=reinforce", "prime.whiten=false", "rollout.keep=[0, 1]", "policy.lr=1.0e-3",
            "steps=16",
        ),
    ),
    "a reward that pays for short responses, at policy.lr=1e-3": Failure(
        ("length_collapse", "entropy_collapse"),
        (*OUTCOMES, *DRAWS, "policy.lr=1.0e-3", f"{GRADER}likes_short", "steps=24"),
    ),
    "a reward that pays for long responses": Failure(
        ("length_explosion",),
        (*OUTCOMES, *DRAWS, f"{GRADER}likes_long", "rollout.max_response=120", "steps=16"),
    ),
    "responses cut off": Failure(("truncation",), (*OUTCOMES, "rollout.max_response=20", "steps=5")),
    "an engine that no new weights reach": Failure(
        ("mismatch",), (*OUTCOMES, "model.dtype=bfloat16", "policy.lr=3.0e-4", "steps=14"), "stale-engine",
    ),
    "a PRM that does not learn": Failure(("prm_chance",), ("prm.lr=0", "steps=21")),
    "prm.lr 100 times as high": Failure(("prm_chance",), ("prm.lr=1.0e-2", "prm.passes=3", "steps=21")),
    "a reward that pays for short responses, its PRM trusted": Failure(
        ("prm_misleads",),
        (*DRAWS, f"{GRADER}likes_short", "prime.credit=critic", "prime.gate=none", "prm.lr=1.0e-3", "steps=16"),
    ),
    "a damaged weight of the PRM, process rewards as they are": Failure(
        ("prm_grad_spike", "policy_grad_spike"),
        ("rollout.keep=[0, 1]", "prime.normalize=none", "prime.whiten=false", "steps=17"),
        "damaged-weight",
    ),
    "a process weight of 20": Failure(("process_dominates",), ("prime.process_weight=20", "steps=21")),
    "an interval that no mean lies in": Failure(("few_groups",), (*OUTCOMES, "rollout.keep=[0.3, 0.4]", "steps=4")),
    "a reward that is always 0": Failure(("reward_constant",), (*OUTCOMES, f"{GRADER}constant", "steps=4")),
    "a reward that hangs": Failure(
        ("reward_failures",), (*OUTCOMES, f"{GRADER}hangs", "reward.timeout=4", "steps=2"),
    ),
    "a reward that breaks on the way": Failure(("reward_failures",), (*OUTCOMES, f"{GRADER}breaks", "steps=12")),
}  # fmt: skip


def constant(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    return 0.0


def likes_short(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    return 0.6 * max(0.0, 1 - len(solution_str) / 40)  # never as if the task were solved


def likes_long(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    return min(1.0, len(solution_str) / 120)


def hangs(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    if sum(map(ord, solution_str)) % 10 < 3:
        time.sleep(60)
    return float(sum(map(ord, solution_str)) % 2)


BREAKS_AFTER = 400  # responses of about 64 a step, shared by a worker for each core
asked = 0  # of this worker


def breaks(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    global asked
    asked += 1
    if asked * (os.cpu_count() or 1) > BREAKS_AFTER and asked % 5 < 2:
        raise ConnectionError("the verifier does not answer")
    return compute_score(data_source, solution_str, ground_truth, extra_info)


def fail(study: learning.Study, name: str) -> None:
    """Bring one run to its end, however that is."""
    run, failure = folder(study, name), FAILURES[name]
    task, sft = study.start("task", 0), study.start("sft", 0)
    if (run / "ended").is_file():
        return
    shutil.rmtree(run, ignore_errors=True)
    settings = [*BASE, *failure.settings, f"data.train={task / 'train.jsonl'}", f"data.eval={task / 'eval.jsonl'}"]
    settings += [f"model.policy={sft / 'model'}", f"run_dir={run}"]
    module = ("benchmarks.faults", failure.fault) if failure.fault else ("prime_fast",)
    command = [sys.executable, "-m", *module, "train", CONFIG, *settings]
    environment = os.environ | {"OMP_NUM_THREADS": str(study.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    (run / "ended").write_text(done.stdout + done.stderr)


def folder(study: learning.Study, name: str) -> Path:
    return study.out.with_name("watchers") / name.replace(" ", "-").replace(",", "")


def healthy(study: learning.Study) -> dict[str, Path]:
    """The runs of a study of any task that came to their last step."""
    found = {}
    for task in TASKS:
        of_task = learning.Study(study.out.with_name(task), CONFIG, (), 0, True, task=task)
        for arm, seed in of_task.runs():
            run = of_task.run(arm, seed)
            if arm in HEALTHY and read_metrics(run)[-1]["step"] >= load_config(run / "config.yaml").steps:
                found[f"healthy: {task}, {arm}, seed {seed}"] = run
    return found


def told(run: Path) -> dict[str, Any]:
    """began: the first step of each watcher."""
    records, limits = read_metrics(run), limits_of(load_config(run / "config.yaml"))
    began: dict[str, int] = {}
    for change in replay(records, limits):
        if change.began:
            began.setdefault(change.name, change.step)
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
    study = learning.Study(arguments.out / "chain6", CONFIG, (), 0, True, threads=1)
    good, failures = healthy(study), arguments.failures
    if not good or not study.start("sft", 0).is_dir():
        parser.error(f"{arguments.out} holds no finished run of {', '.join(HEALTHY)}; make some with `{MAKES_THEM}`")
    if arguments.report:
        failures = [name for name in failures if (folder(study, name) / "ended").is_file()]
    else:
        learning.in_parallel(fail, arguments.jobs, [(study, name) for name in failures])
    found = {name: told(run) for name, run in good.items()}
    found |= {name: FAILURES[name]._asdict() | told(folder(study, name)) for name in failures}
    result = {"command": shlex.join(["python", "-m", "benchmarks.watchers", *sys.argv[1:]])}
    result |= {"machine": {"device": cpu_name(), "cores": os.cpu_count()}, "base": BASE, "runs": found}
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
