"""The runs of a study: where each lies, its command line, what of it is finished."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.learning.arms import HELPERS, PLAIN, TASKS, Task, arm
from prime_fast.config import Config, load_config
from prime_fast.metrics import read_metrics

HELPER_SEED = 1000  # added to the seed: a PRM must not have seen the very rollouts that it will score
LEARNING = {"rollout", "reward", "prime", "policy", "prm"}  # what a finished run must have in common with a call
RUN = re.compile(r"(.+)-seed(\d+)")


@dataclass(frozen=True)
class Study:
    """Where everything lies and the command lines that make it. out: the task's folder."""

    out: Path
    config: str
    overrides: tuple[str, ...]  # the user's
    steps: int
    sft_per_seed: bool = False
    threads: int = 1
    task: str = "chain6"
    warmup: int = 40  # steps of the run that a warm PRM comes from

    @property
    def made(self) -> Task:
        return TASKS[self.task]

    @property
    def settings(self) -> tuple[str, ...]:
        """Of every run of the task."""
        return (*PLAIN, *self.made.overrides, *self.overrides)

    def start(self, kind: str, seed: int) -> Path:
        """The folder of the task or the SFT run that `seed` starts from."""
        home = self.out.with_name(self.made.start) if self.made.start else self.out
        return home / (f"{kind}-seed{seed}" if self.sft_per_seed else kind)

    def run(self, name: str, seed: int) -> Path:
        return self.out / f"{name}-seed{seed}"

    def runs(self) -> list[tuple[str, int]]:
        """(arm, seed) of the runs that have been begun, helpers apart."""
        found = [(RUN.fullmatch(folder.name), folder) for folder in sorted(self.out.glob("*-seed*"))]
        runs = [(match[1], int(match[2])) for match, folder in found if match and (folder / "metrics.jsonl").is_file()]
        return [(name, seed) for name, seed in runs if name.split("+")[0] not in {"sft", "task", *HELPERS}]

    def sft_overrides(self, seed: int) -> list[str]:
        task = self.start("task", seed)
        here = [f"run_dir={partial(self.start('sft', seed))}", f"seed={seed if self.sft_per_seed else 0}"]
        return [*self.settings, *here, f"model.policy={task / 'model'}", f"sft.data={task / 'sft.jsonl'}"]

    def train_overrides(self, name: str, seed: int) -> list[str]:
        task, sft, what, helps = self.start("task", seed), self.start("sft", seed), arm(name), is_helper(name)
        steps = self.warmup if name.startswith("warmup") else self.steps
        overrides = [*self.settings, f"run_dir={self.run(name, seed)}", f"steps={steps}"]
        overrides += [f"seed={seed + HELPER_SEED * helps}", "rollout.patience=0"]  # all of one length
        overrides += [f"data.train={task / 'train.jsonl'}", f"data.eval={task / 'eval.jsonl'}"]
        overrides += [f"model.policy={sft / 'model'}", f"prime.step_labels={self.made.module}:step_labels"]
        overrides += what.overrides
        if what.helper:
            checkpoints = self.run(what.helper, seed) / "checkpoints"
            overrides.append(f"model.prm={checkpoints / (checkpoints / 'latest').read_text().strip() / 'prm'}")
        elif what.oracle:
            overrides.append(f"model.prm={sft / 'model'}")  # not looked at
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


def is_helper(name: str) -> bool:
    return name.split("+")[0] in HELPERS


def partial(folder: Path) -> Path:
    """Where `folder` is made, before it gets its name: a folder of that name is whole."""
    return folder.with_name(f"{folder.name}.partial")


def prepare(study: Study, seed: int) -> None:
    """Make the task and the SFT model that `seed` starts from, unless they are there."""
    task, sft = study.start("task", seed), study.start("sft", seed)
    if not task.exists():
        shutil.rmtree(partial(task), ignore_errors=True)
        sft_seed = str(seed if study.sft_per_seed else 0)
        study.call(task.name, study.made.module, str(partial(task)), "--sft-seed", sft_seed, *study.made.arguments)
        partial(task).rename(task)
    if sft.exists():
        check_same(sft, load_config(study.config, study.sft_overrides(seed)), {"sft"})
    else:
        shutil.rmtree(partial(sft), ignore_errors=True)
        study.call(sft.name, "prime_fast", "sft", study.config, *study.sft_overrides(seed))
        partial(sft).rename(sft)


def train(study: Study, name: str, seed: int) -> None:
    """Bring one arm and seed to its last step; the helper that it starts with is finished."""
    what = arm(name)
    run, overrides = study.run(name, seed), study.train_overrides(name, seed)
    if finished(run, load_config(study.config, overrides), checkpoint=is_helper(name)):
        print(f"{run.name}: finished before", flush=True)
        return
    oracle = ("benchmarks.learning.oracle", study.made.module) if what.oracle else ("prime_fast",)
    # --resume starts anew where there is no checkpoint yet
    study.call(run.name, *oracle, "train", study.config, *overrides, "--resume")


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
