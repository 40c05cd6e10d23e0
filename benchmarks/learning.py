"""PRIME beside outcome-only RLOO and a frozen PRM on the quickstart's task, over several seeds.

    python -m benchmarks.learning --out runs/learning --arms prime rloo frozen --seeds 0 1 2

Every run is the command a user would type, in its own process, with its output in OUT/NAME.log. Calling it again skips
what is finished and resumes what was interrupted, so arms, seeds and steps can be added later. Writes OUT/learning.json
and OUT/learning.png, and prints a Markdown table. key=value arguments go to every sft and train command.
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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.machine import cpu_name
from prime_fast.config import Config, load_config
from prime_fast.metrics import read_metrics
from prime_fast.views.report import RUN_COLORS, STYLE, phase_seconds, series

ARMS = {"prime": "PRIME, online PRM", "rloo": "RLOO, outcome only", "frozen": "PRIME, frozen PRM"}
# of vLLM, asked for by name: does it cost learning that the engine works beside the trainer, or carries groups over?
ARMS |= {"vllm": "PRIME, vLLM", "ahead": "PRIME, vLLM one step ahead", "carry": "PRIME, vLLM, groups carried"}
DEFAULT_ARMS = ("prime", "rloo", "frozen")
# "offline" trains the frozen arm's PRM on rollouts of a policy that stays what SFT made it, for as many steps as the
# online PRM gets, so that the arms differ in whose rollouts a PRM learns from, not in how many
OFFLINE = ["policy.lr=0", "rollout.max_rounds=1", "log.eval_every=0", "log.checkpoint_every=0"]
OVERRIDES = {"prime": [], "rloo": ["prime.process_weight=0"], "offline": OFFLINE, "frozen": ["prime.update=none"]}
VLLM = ["rollout.engine=vllm"]
OVERRIDES |= {"vllm": VLLM, "ahead": [*VLLM, "rollout.ahead=1"], "carry": [*VLLM, "rollout.carry=true"]}
OFFLINE_SEED = 1000  # added to the seed: the frozen PRM must not have seen the very rollouts that it will score
LEVELS = (0.5, 0.7, 0.8)  # accuracies whose price in rollouts is reported
LEARNING = {"rollout", "reward", "prime", "policy", "prm"}  # what a finished run must have in common with a call


@dataclass(frozen=True)
class Study:
    """Where everything lies and the command lines that make it."""

    out: Path
    config: str
    overrides: tuple[str, ...]
    steps: int
    sft_per_seed: bool = False
    threads: int = 1

    def start(self, kind: str, seed: int) -> Path:
        """The folder of the task or the SFT run that `seed` starts from."""
        return self.out / (f"{kind}-seed{seed}" if self.sft_per_seed else kind)

    def run(self, arm: str, seed: int) -> Path:
        return self.out / f"{arm}-seed{seed}"

    def sft_overrides(self, seed: int) -> list[str]:
        task = self.start("task", seed)
        here = [f"run_dir={partial(self.start('sft', seed))}", f"seed={seed if self.sft_per_seed else 0}"]
        return [*self.overrides, *here, f"model.policy={task / 'model'}", f"sft.data={task / 'sft.jsonl'}"]

    def train_overrides(self, arm: str, seed: int) -> list[str]:
        task = self.start("task", seed)
        overrides = [*self.overrides, f"run_dir={self.run(arm, seed)}", f"steps={self.steps}"]
        overrides += [f"seed={seed + OFFLINE_SEED * (arm == 'offline')}", "rollout.patience=0"]  # all of one length
        overrides += [f"data.train={task / 'train.jsonl'}", f"data.eval={task / 'eval.jsonl'}"]
        overrides += [f"model.policy={self.start('sft', seed) / 'model'}", *OVERRIDES[arm]]
        if arm == "frozen":
            checkpoints = self.run("offline", seed) / "checkpoints"
            overrides.append(f"model.prm={checkpoints / (checkpoints / 'latest').read_text().strip() / 'prm'}")
        return overrides

    def call(self, name: str, module: str, *arguments: str) -> None:
        """Run `python -m module arguments`, with its output in OUT/name.log."""
        log = self.out / f"{name}.log"
        print(f"{name}: started, output in {log}", flush=True)
        started = time.monotonic()
        command = [sys.executable, "-m", module, *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with log.open("a") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            tail = "\n".join(log.read_text().splitlines()[-15:])
            raise RuntimeError(f"{name} ended with exit code {code}; the last lines of {log}:\n{tail}")
        print(f"{name}: done in {time.monotonic() - started:.0f} s", flush=True)


def partial(folder: Path) -> Path:
    """Where `folder` is made, before it gets its name: a folder of that name is whole."""
    return folder.with_name(f"{folder.name}.partial")


def prepare(study: Study, seed: int) -> None:
    """Make the task and the SFT model that `seed` starts from, unless they are there."""
    task, sft = study.start("task", seed), study.start("sft", seed)
    if not task.exists():
        shutil.rmtree(partial(task), ignore_errors=True)
        sft_seed = str(seed if study.sft_per_seed else 0)
        study.call(task.name, "prime_fast.stages.quickstart", str(partial(task)), "--sft-seed", sft_seed)
        partial(task).rename(task)
    if sft.exists():
        check_same(sft, load_config(study.config, study.sft_overrides(seed)), {"sft"})
    else:
        shutil.rmtree(partial(sft), ignore_errors=True)
        study.call(sft.name, "prime_fast", "sft", study.config, *study.sft_overrides(seed))
        partial(sft).rename(sft)


def train(study: Study, arm: str, seed: int) -> None:
    """Bring one arm and seed to its last step; for the frozen arm its PRM first."""
    if arm == "frozen":
        train(study, "offline", seed)
    run, overrides = study.run(arm, seed), study.train_overrides(arm, seed)
    if finished(run, load_config(study.config, overrides), checkpoint=arm == "offline"):
        print(f"{run.name}: finished before", flush=True)
    else:  # --resume starts anew where there is no checkpoint yet
        study.call(run.name, "prime_fast", "train", study.config, *overrides, "--resume")


def finished(run: Path, config: Config, checkpoint: bool = False) -> bool:
    """Whether `run` made config.steps steps (and wrote a checkpoint); ValueError if it was made with other settings."""
    if not (run / "metrics.jsonl").is_file():
        return False
    check_same(run, config, LEARNING)
    made = max((record["step"] for record in read_metrics(run)), default=0)
    return made >= config.steps and (not checkpoint or (run / "checkpoints" / "latest").is_file())


def check_same(run: Path, config: Config, sections: set[str]) -> None:
    before, now = (tree.model_dump(include=sections) for tree in (load_config(run / "config.yaml"), config))
    for name, key in [(section, key) for section in before for key in before[section]]:
        if (old := before[name][key]) != (new := now[name][key]):
            raise ValueError(f"{run} was made with {name}.{key}={old}, not {new}; choose another --out")


def in_parallel(function: Callable, jobs: int, arguments: Iterable[tuple]) -> None:
    """Call `function` on every tuple, `jobs` at a time; after a failure those that have not begun are dropped."""
    pool = ThreadPoolExecutor(jobs)
    try:
        for future in [pool.submit(function, *argument) for argument in arguments]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def summarise(records: list[dict]) -> dict:
    """The numbers of one run. mean_accuracy is the area under accuracy over rollouts, divided by the rollouts."""
    rollouts, accuracy = series(records, "eval_accuracy", "rollouts")
    seconds = phase_seconds(records) | {"whole": sum(series(records, "seconds")[1])}
    thirds = np.array_split(np.array(series(records, "prm_pair_accuracy")[1]), 3)
    return {
        "start_accuracy": accuracy[0],
        "final_accuracy": accuracy[-1],
        "mean_accuracy": float(np.trapezoid(accuracy, rollouts) / (rollouts[-1] - rollouts[0])),
        "pair_accuracy_by_thirds": [float(third.mean()) for third in thirds] if thirds[-1].size else None,
        "seconds_per_step": {phase: total / records[-1]["step"] for phase, total in seconds.items()},
        "curve": {"rollouts": rollouts, "accuracy": accuracy},
    }


def mean_curve(curves: Sequence[dict]) -> dict:
    """The mean over seeds as far as all of them have run, at every seed's evaluation points, linear in between."""
    end = min(curve["rollouts"][-1] for curve in curves)
    grid = sorted({x for curve in curves for x in curve["rollouts"] if x <= end})
    values = [np.interp(grid, curve["rollouts"], curve["accuracy"]) for curve in curves]
    return {"rollouts": grid, "accuracy": np.mean(values, 0).tolist()}


def rollouts_to(curve: dict, level: float) -> float | None:
    """Rollouts at which the curve, linear between its points, first reaches `level`; None if it never does."""
    x, y = curve["rollouts"], curve["accuracy"]
    i = next((i for i, value in enumerate(y) if value >= level), None)
    if not i:
        return x[0] if i == 0 else None
    return x[i - 1] + (x[i] - x[i - 1]) * (level - y[i - 1]) / (y[i] - y[i - 1])


def average(runs: list[dict]) -> dict:
    """Means over an arm's seeds, and the rollouts to each level on their mean curve."""
    curve = mean_curve([run["curve"] for run in runs])
    thirds = [run["pair_accuracy_by_thirds"] for run in runs if run["pair_accuracy_by_thirds"]]
    phases = dict.fromkeys(phase for run in runs for phase in run["seconds_per_step"])
    accuracies = ("start_accuracy", "final_accuracy", "mean_accuracy")
    return {key: float(np.mean([run[key] for run in runs])) for key in accuracies} | {
        "rollouts_to": {str(level): rollouts_to(curve, level) for level in LEVELS},
        "pair_accuracy_by_thirds": np.mean(thirds, 0).tolist() if thirds else None,
        "seconds_per_step": {p: float(np.mean([run["seconds_per_step"].get(p, 0) for run in runs])) for p in phases},
        "curve": curve,
    }


def collect(study: Study, arms: Sequence[str], seeds: Sequence[int]) -> dict:
    """{arm: {"seeds": {seed: summary}, "mean": averages}} of finished runs, floats rounded to 4 digits."""
    result = {}
    for arm in arms:
        logs = {str(seed): read_metrics(study.run(arm, seed)) for seed in seeds}
        runs = {seed: summarise([r for r in log if r["step"] <= study.steps]) for seed, log in logs.items()}
        result[arm] = {"seeds": runs, "mean": average(list(runs.values()))}
    return json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 4))


def hardware(jobs: int, threads: int) -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "gpu": gpu, "runs_at_a_time": jobs, "threads_per_run": threads}


def plot(results: dict, path: Path) -> None:
    """Accuracy over rollouts: a thick mean per arm and a thin line per seed."""
    with matplotlib.rc_context(STYLE):
        axes = Figure(figsize=(8, 5), layout="constrained").add_subplot()
        for arm, result in results.items():
            color, mean = RUN_COLORS[list(ARMS).index(arm)], result["mean"]
            for run in result["seeds"].values():
                axes.plot(run["curve"]["rollouts"], run["curve"]["accuracy"], color=color, alpha=0.35, linewidth=0.9)
            label = f"{ARMS[arm]}   {mean['start_accuracy']:.1%} → {mean['final_accuracy']:.1%}"
            axes.plot(mean["curve"]["rollouts"], mean["curve"]["accuracy"], color=color, linewidth=2.6, label=label)
        seeds = max(len(arm["seeds"]) for arm in results.values())
        axes.set_title(f"Held-out greedy accuracy: thick the mean, thin each of {seeds} seeds")
        axes.set_xlabel("rollouts")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g}%")
        axes.set_ylim(0, 1)
        axes.legend(loc="lower right", fontsize=10)
        axes.figure.savefig(path, dpi=150)


def markdown(results: dict) -> str:
    """One row an arm."""
    head = [
        "arm",
        "start",
        "final per seed",
        "final",
        "mean over the run",
        f"rollouts to {' / '.join(map(str, LEVELS))}",
    ]
    head += ["pair accuracy by thirds", "s/step: generate, PRM, reference, policy, all"]
    rows = [head, ["---"] * len(head)]
    for arm, result in results.items():
        mean = result["mean"]
        seconds = [mean["seconds_per_step"].get(p, 0) for p in ("generate", "prm", "reference", "policy", "whole")]
        row = [ARMS[arm], f"{mean['start_accuracy']:.3f}"]
        row += [", ".join(f"{run['final_accuracy']:.3f}" for run in result["seeds"].values())]
        row += [f"{mean['final_accuracy']:.3f}", f"{mean['mean_accuracy']:.3f}"]
        row += [" / ".join("never" if x is None else f"{x:.0f}" for x in mean["rollouts_to"].values())]
        row += [" / ".join(f"{x:.2f}" for x in mean["pair_accuracy_by_thirds"] or []) or "-"]
        rows.append([*row, ", ".join(f"{x:.2f}" for x in seconds)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser("python -m benchmarks.learning", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=DEFAULT_ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of every arm (default: the config's)")
    parser.add_argument("--sft-per-seed", action="store_true", help="an SFT model for each seed, not one for all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="CPU threads of each run (default: cores / jobs)")
    overrides = [text for text in arguments if "=" in text and not text.startswith("-")]  # they may follow --seeds 0 1
    options = parser.parse_args([text for text in arguments if text not in overrides])
    threads = options.threads or max(1, os.cpu_count() // options.jobs)
    try:
        steps = options.steps or load_config(options.config, overrides).steps
        study = Study(options.out, options.config, tuple(overrides), steps, options.sft_per_seed, threads)
        study.out.mkdir(parents=True, exist_ok=True)
        starts = options.seeds if options.sft_per_seed else options.seeds[:1]
        in_parallel(prepare, options.jobs, [(study, seed) for seed in starts])
        in_parallel(train, options.jobs, [(study, arm, seed) for seed in options.seeds for arm in options.arms])
    except (ValueError, RuntimeError) as error:
        sys.exit(f"benchmarks.learning: {error}")
    results = collect(study, options.arms, options.seeds)
    document = {
        "command": f"python -m benchmarks.learning {shlex.join(arguments)}",
        "hardware": hardware(options.jobs, threads),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed", "prime-fast")},
        "steps": steps,
        "arms": results,
    }
    (study.out / "learning.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(results, study.out / "learning.png")
    print(markdown(results))


if __name__ == "__main__":
    main()
