"""The LM-head ops beside their peers: time, share of the GEMMs' speed, memory, error.

    python -m benchmarks.lm_head [--device cpu] [--heads 7B SmolLM2] [--tokens 8192 32768] [--ops policy prm logprob]

All peers of a case run in one process, in turns. Speeds are credited with the GEMMs the op needs (one for log-probs,
three for a loss) whatever a peer makes of it, and the share is of the bare GEMMs of the same run; on a CPU, of their
processor time, because other jobs of the machine stretch the rest. Memory is what a step holds above its inputs,
gradients included. Writes benchmarks/results/<device>/lm_head.json and .png and prints a
Markdown table. A peer that is not installed is a row that says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import prime_kernels
from benchmarks import peers
from benchmarks.machine import cpu_name, gpu_facts, installed, results
from benchmarks.peers import HEADS

PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "verl", "trl", "quack-kernels")
CHECKED_ROWS = 64  # log-probs compared with float64


def flops(op: str, size: int, vocabulary: int, tokens: int) -> float:
    return 2.0 * tokens * size * vocabulary * (1 if op == "logprob" else 3)


def summary(seconds: list[float]) -> tuple[float, float]:
    """Median, and half the distance between the first and third quartiles."""
    if len(seconds) == 1:
        return seconds[0], 0.0
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return median, (third - first) / 2


def with_shares(rows: list[dict]) -> list[dict]:
    """Adds the share of the bare GEMMs' speed of the same case, where both ran; by processor time on a CPU."""

    def time_of(row: dict) -> float | None:
        return row.get("cpu_ms") or row.get("ms")

    peak = {key(row): time_of(row) for row in rows if row["peer"] == "bare GEMMs" and time_of(row)}
    shares = [peak[key(row)] / time_of(row) if time_of(row) and key(row) in peak else None for row in rows]
    return [row | {"share": share} for row, share in zip(rows, shares, strict=True)]


def key(row: dict) -> tuple:
    return row["op"], row["head"], row["tokens"]


COLUMNS = {  # heading: (field, format)
    "op": ("op", ""),
    "head": ("head", ""),
    "tokens": ("tokens", ""),
    "peer": ("peer", ""),
    "ms": ("ms", ".1f"),
    "±": ("spread_ms", ".1f"),
    "processor ms": ("cpu_ms", ".1f"),
    "TFLOP/s": ("tflops", ".2f"),
    "share of GEMMs": ("share", ".2f"),
    "extra MB": ("extra_mb", ".0f"),
    "log-prob error": ("error", ".1e"),
    "note": ("note", ""),
}


def table(rows: list[dict]) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for row in rows:
        lines.append(["" if row.get(field) is None else format(row[field], form) for field, form in COLUMNS.values()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Clock:
    """Seconds of a call, and on a CPU the processor time of all threads, which other jobs hardly stretch."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def __call__(self, step: peers.Step) -> tuple[float, float]:
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3, 0.0
        wall, busy = time.perf_counter(), time.process_time()
        step()
        return time.perf_counter() - wall, time.process_time() - busy


def measure(
    op: str, head: str, tokens: int, device: str, rounds: int, names: list[str], *, shapes=None, seconds=float("inf")
) -> list[dict]:
    """A row a peer. Rounds end early once they have taken `seconds`. shapes: (H, V) by name, HEADS unless given."""
    size, vocabulary = (shapes or HEADS)[head]
    p = peers.problem(size, vocabulary, tokens, device, torch.bfloat16 if device == "cuda" else torch.float32)
    exact = float64_logprob(p)
    clock, steps, rows = Clock(device), {}, []
    for name in names:
        row = {"op": op, "head": head, "tokens": tokens, "peer": name}
        rows.append(row)
        try:
            step = peers.PEERS[name][1](op, p)
            if device == "cuda":
                row["extra_mb"] = cuda_memory(p, step)
            logprob = step()
            row["error"] = None if logprob is None else (logprob[:CHECKED_ROWS].double() - exact).abs().max().item()
            steps[name] = step
        except Exception as error:  # noqa: BLE001  whatever stops a peer is its row
            row["note"] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        clear(p)
    times, began = {name: [] for name in steps}, time.perf_counter()
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(clock(step))
            clear(p)
        if time.perf_counter() - began > seconds:
            break
    for row in rows:
        if row["peer"] in times:
            wall, busy = zip(*times[row["peer"]], strict=True)
            seconds, spread = summary(list(wall))
            row |= {
                "ms": 1e3 * seconds,
                "spread_ms": 1e3 * spread,
                "tflops": flops(op, size, vocabulary, tokens) / seconds / 1e12,
            }
            if device == "cpu":
                row |= {"cpu_ms": 1e3 * summary(list(busy))[0]}
                if shapes is None:  # the process that measures it knows HEADS alone
                    row["extra_mb"] = cpu_memory(op, head, tokens, row["peer"])
    return with_shares(rows)


def clear(p: peers.Problem) -> None:
    p.hidden.grad = p.weight.grad = None


def float64_logprob(p: peers.Problem) -> torch.Tensor:
    hidden, targets = p.hidden[:CHECKED_ROWS].detach(), p.targets[:CHECKED_ROWS]
    logits = torch.cat([hidden.double() @ part.double().T for part in p.weight.detach().split(2**14)], 1)
    return torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)


def cuda_memory(p: peers.Problem, step: peers.Step) -> float:
    """Peak above the inputs of the second call, in MB."""
    step()
    clear(p)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def cpu_memory(op: str, head: str, tokens: int, name: str) -> float:
    """The same by the process's resident set, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.lm_head", "--resident", op, head, str(tokens), name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def resident(op: str, head: str, tokens: str, name: str) -> float:
    """Peak resident MB of a step above what it found. A small problem first loads what a library loads once."""
    build = peers.PEERS[name][1]
    build(op, peers.problem(32, 128, 2048, "cpu", torch.float32))()
    p = peers.problem(*HEADS[head], int(tokens), "cpu", torch.float32)
    step = build(op, p)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory_status("VmRSS")
    step()
    return (memory_status("VmHWM") - before) / 1e3


def memory_status(field: str) -> int:
    """Kilobytes."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def machine(device: str) -> dict:
    facts = {"python": platform.python_version(), "packages": {name: installed(name) for name in PACKAGES}}
    if device == "cuda":
        facts |= gpu_facts()
    else:
        facts |= {"device": cpu_name(), "threads": torch.get_num_threads()}
        facts |= {"load_average": os.getloadavg(), "cores": os.cpu_count()}
    return facts | {"backends": prime_kernels.backends()["linear_policy_loss"]}


def plot(rows: list[dict], path: Path, title: str) -> None:
    """One panel a case: the share of the bare GEMMs' speed of every peer that ran."""
    from matplotlib.figure import Figure  # a machine that only measures may lack it

    cases = list(dict.fromkeys(map(key, rows)))
    figure = Figure(figsize=(7, 0.6 + 2.6 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), squeeze=False)[:, 0]
    for axis, case in zip(axes, cases, strict=True):
        ran = [row for row in rows if key(row) == case and row.get("share") and row["peer"] != "bare GEMMs"]
        ran.sort(key=lambda row: row["share"])
        colors = ["#c44e52" if row["peer"].startswith("prime_kernels") else "#8c8c8c" for row in ran]
        axis.barh([row["peer"] for row in ran], [row["share"] for row in ran], color=colors)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title("{}, {} head, {} tokens".format(*case), fontsize=9)
        axis.tick_params(labelsize=7)
    axes[-1].set_xlabel("speed as a share of the bare GEMMs'", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lm_head", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", nargs="+", choices=HEADS)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--ops", nargs="+", choices=peers.ANY)
    parser.add_argument("--peers", nargs="+", choices=peers.PEERS, default=list(peers.PEERS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--note", default="", help="kept with the results")
    parser.add_argument("--out", type=Path, help="folder, by default benchmarks/results/<device>")
    parser.add_argument("--resident", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if not cuda:
        torch.set_num_threads(arguments.threads)
    if arguments.resident:
        print(resident(*arguments.resident))
        return
    heads = arguments.heads or (list(HEADS) if cuda else ["SmolLM2"])
    rows, facts = [], machine(arguments.device)
    for head in heads:
        for tokens in arguments.tokens or ([8192, 16384, 32768] if cuda else [4096]):
            for op in arguments.ops or (peers.ANY if cuda else ["policy"]):
                fit = [n for n in arguments.peers if op in peers.PEERS[n][0] and (cuda or n not in peers.GPU_ONLY)]
                found = measure(op, head, tokens, arguments.device, arguments.rounds or (20 if cuda else 5), fit)
                print(table(found), flush=True)
                rows += found
    out = arguments.out or results(arguments.device)
    out.mkdir(parents=True, exist_ok=True)
    record = {"command": " ".join(sys.argv[1:]), "note": arguments.note, "machine": facts, "rows": rows}
    (out / "lm_head.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, out / "lm_head.png", f"LM-head ops on {facts['device']}")


if __name__ == "__main__":
    main()
