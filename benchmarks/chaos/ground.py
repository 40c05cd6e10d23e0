"""The run that is harmed: the quickstart's task made small, how it is started, and what must not change."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from benchmarks.chaos import victim
from benchmarks.chaos.victim import Plan
from prime_fast.engine import checkpoint
from prime_fast.metrics import read_metrics
from prime_fast.stages.quickstart import make_rows, solve, write_model

CONFIG = """
run_dir: unset
steps: 3
model: {policy: HOME/model, dtype: float32}
data: {train: HOME/train.jsonl, eval: HOME/eval.jsonl, max_prompt: 8, eval_rows: 8}
rollout: {prompts: 4, samples: 4, max_response: 12, max_rounds: 4, keep: [0.05, 0.95], batch: 64}
reward: {function: "HOME/reward.py:compute_score"}
policy: {lr: 1.0e-3, mini_batch: 8}
prm: {lr: 1.0e-3, mini_batch: 8}
engine: {micro_tokens: 200}
log: {eval_every: 2, checkpoint_every: 1, grace: 120}
sft: {data: HOME/sft.jsonl, eval: HOME/eval.jsonl, mini_batch: 8, steps: 5}
"""
# Right now and then, though the model has learnt nothing
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info):
    return float(sum(map(ord, solution_str)) % 3 == 0)
"""
CHAIN, SIZES = 2, (64, 16, 64)  # steps of a problem; rows to train on, held out, demonstrated
NUMBERS = ("outcome", "policy_loss", "prm_loss", "entropy", "mismatch_kl")
VOLATILE = ("seconds", "tokens_per_second", "peak_memory_gib", "memory")  # of a record
PRELOADED = ["prime_fast.cli", "prime_fast.trainer", "prime_fast.stages.sft", "transformers.models.qwen2"]


@dataclass
class Process:
    """One rank."""

    process: multiprocessing.Process
    log: Path

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()


@dataclass
class Ground:
    """home: where all of it lies. seconds: that a run may take."""

    home: Path
    seconds: float
    started: int = field(default=0, init=False)

    @cached_property
    def context(self):
        """Processes that are forked from one that has imported everything, and has no thread yet."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        return context

    def prepare(self) -> None:
        """Rows, a model and a reward."""
        (self.home / "config.yaml").write_text(CONFIG.replace("HOME", str(self.home)))
        (self.home / "reward.py").write_text(REWARD)
        write_model(self.home / "model", 0)
        for name, rows in make_rows(CHAIN, 0, 0, SIZES).items():
            for row in rows:
                row["extra_info"].setdefault("solution", solve(row["prompt"][0]["content"]))
            (self.home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def words(self, command: str, run_dir: Path, *more: str) -> list[str]:
        """The one command line of a run, to begin and to go on with."""
        return [command, str(self.home / "config.yaml"), f"run_dir={run_dir}", *more, "--resume"]

    def start(self, words: list[str], ranks: int = 1, plan: Plan | None = None) -> list[Process]:
        self.started += 1
        world = {"OMP_NUM_THREADS": "1"}
        if ranks > 1:
            world |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        begun = []
        for rank in range(ranks):
            log = self.home / f"log-{self.started}-{rank}.txt"
            here = world | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            arguments = (words, str(log), here, victim.as_dict(plan))
            begun.append(Process(self.context.Process(target=victim.run, args=arguments), log))
            begun[-1].process.start()
        return begun

    def wait(self, processes: list[Process], goes_on: bool = False) -> list[int | None]:
        """The exit codes of all ranks, None of one that had to be ended: when the others are gone, as a launcher does,
        or because time is up. goes_on: a stopped process is let go on after a while."""
        deadline = time.monotonic() + self.seconds
        while any(process.code is None for process in processes) and time.monotonic() < deadline:
            if goes_on and any(victim.is_stopped(process.process.pid) for process in processes):
                time.sleep(victim.PAUSE_SECONDS)
                for process in processes:
                    os.kill(process.process.pid, signal.SIGCONT)
            if any(process.code for process in processes):
                time.sleep(1.0)  # for the others to notice by themselves
                break
            time.sleep(0.02)
        codes = [process.code for process in processes]
        for process in processes:
            process.end()
        return codes

    def finish(self, command: str, run_dir: Path, *more: str, ranks: int = 1) -> None:
        """An undisturbed run."""
        processes = self.start(self.words(command, run_dir, *more), ranks)
        codes = self.wait(processes)
        if any(code != 0 for code in codes):
            raise RuntimeError(f"exit codes {codes}: {said(processes[0])[-2000:]}")


def said(process: Process) -> str:
    return process.log.read_text(errors="replace") if process.log.is_file() else ""


def sentence(text: str) -> str | None:
    """What prime-fast told of why it ended, if that is one line and no traceback."""
    told = [line for line in text.splitlines() if line.startswith("prime-fast: ")]
    return told[-1] if told and "Traceback" not in text else None


def leftovers(run_dir: Path, before: Path) -> dict:
    """In what a run differs from the undisturbed one: metrics, samples, tokens, held-out responses, weights."""
    different = {
        "metrics": _stable(run_dir) != _stable(before),
        "eval": _contents(run_dir / "eval") != _contents(before / "eval"),
    }
    for name in ("samples", "tokens"):
        ours, theirs = (run / f"{name}.jsonl" for run in (run_dir, before))
        different[name] = theirs.exists() and ours.read_bytes() != theirs.read_bytes()
    for name in ("policy", "prm"):
        ours, theirs = (checkpoint.latest(run) / name / "model.safetensors" for run in (run_dir, before))
        if theirs.exists():
            different[name] = not ours.exists() or ours.read_bytes() != theirs.read_bytes()
    return {name: True for name, is_other in different.items() if is_other}


def copy(run: Path, to: Path) -> Path:
    return shutil.copytree(run, to)


def phases(run: Path) -> dict[str, float]:
    """Mean seconds of each phase in a step."""
    records = [record for record in read_metrics(run) if record["step"]]
    names = sorted({key for record in records for key in record if key.startswith("seconds/")})
    return {
        name.removeprefix("seconds/"): sum(record.get(name, 0.0) for record in records) / len(records) for name in names
    }


def sane(run: Path, steps: int) -> bool:
    """All steps are there, none was skipped, and each has its numbers: what is not finite is written as null."""
    records = [record for record in read_metrics(run) if record["step"]]
    made = [record["step"] for record in records] == list(range(1, steps + 1)) and records[-1]["skipped"] == 0
    return made and all(isinstance(record.get(key), float) for record in records for key in NUMBERS)


def _stable(run: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if not k.startswith(VOLATILE)} for record in read_metrics(run)]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
