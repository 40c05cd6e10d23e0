"""prime_advantage beside the same work done otherwise: time, and on a GPU the share of the copy bandwidth.

    python -m benchmarks.advantage [--credit FORM] [--rounds N] [--note TEXT] [--out FOLDER]

On a CPU: 1024 rows of up to 3072 tokens, K = 4, 2 threads, against the vectorised torch reference and the Python
loops of benchmarks/advantage_loops.py. On a GPU: 64k to 16M tokens, against the reference in eager and compiled torch
and rl_triton's GAE (padded, no baseline, no norm) where it is installed. All in one process, in turns, after a check
of every result. Writes benchmarks/results/<device>/advantage.json, of a
credit form advantage_<form>.json, and prints a Markdown table.
"""

import argparse
import ctypes
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import prime_kernels
from benchmarks import advantage_loops
from benchmarks.machine import cpu_name, gpu_facts, results
from prime_kernels import prime_advantage, reference_credit
from prime_kernels.reference_credit import CREDITS

K = 4
BYTES = 16  # a token: two float32 log-probs in, advantage and token reward out
SIZES = [2**16, 2**18, 2**20, 2**22, 2**23, 2**24]
Timer = Callable[[Callable], float]  # seconds of a call
QUIET = 0.5  # load average above which times are not to be trusted


def batch(rows: int, longest: int, device: str, seed: int = 0, shortest: int = 1) -> list[Tensor]:
    """prm, ref, outcome, cu_seqlens, group: rows of uniform length in shortest..longest, K a group."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (rows,), generator=generator)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    prm = -torch.empty(int(cu_seqlens[-1])).exponential_(generator=generator)
    ref = prm + 0.05 * torch.randn(prm.shape, generator=generator)
    outcome = torch.randint(0, 2, (rows,), generator=generator).float()
    return [x.to(device) for x in (prm, ref, outcome, cu_seqlens, torch.arange(rows) // K)]


def check(candidates: dict[str, Callable], arguments: list[Tensor], **form) -> None:
    """ValueError unless every candidate's advantages are those of float64."""
    exact = prime_advantage(*(x.double() if x.is_floating_point() else x for x in arguments), **form).advantage
    for name, call in candidates.items():
        error = (call(*arguments).double() - exact).abs().max().item()
        if not error < 1e-3:
            raise ValueError(f"{name} is off by {error}")


def in_turns(candidates: dict[str, Callable], timed: Timer, rounds: int) -> dict[str, list[float]]:
    """Seconds of every call: one of each after the other, `rounds` times, after one that does not count."""
    seconds = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, call in candidates.items():
            spent = timed(call)
            if number:
                seconds[name].append(spent)
    return seconds


def keep_heap() -> None:
    """Let malloc keep what is freed, for every candidate: else the kernel takes back hundreds of MB after each call of
    the torch reference, and what that costs falls on whoever runs next."""
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(mmap, 32 << 20) and libc.mallopt(trim, 2**31 - 1)):
        raise RuntimeError("mallopt refused")


def wall(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ours(backend: str | None, **form) -> Callable[..., Tensor]:
    return lambda *arguments: prime_advantage(*arguments, backend=backend, **form).advantage


def loops(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda prm, ref, outcome, cu_seqlens, group: function(prm, ref, outcome, cu_seqlens, K)


def cpu(rounds: int, **form) -> list[dict]:
    """One row a candidate; `times_cpu` is how many times the C++ back-end's time it takes. The loops are of the
    published form."""
    keep_heap()
    small, arguments = batch(64, 200, "cpu"), batch(1024, 2740, "cpu")
    fast = {"cpu": ours("cpu", **form), "torch": ours("torch", **form)}
    slow = {
        "python loops, padded": loops(advantage_loops.padded),
        "python loops, tokens": loops(advantage_loops.tokens),
    }
    if form:
        slow = {}
    check(fast | slow, small, **form)
    seconds = in_turns({name: functools.partial(call, *arguments) for name, call in fast.items()}, wall, rounds)
    seconds |= {name: [wall(functools.partial(call, *arguments))] for name, call in slow.items()}
    best = statistics.median(seconds["cpu"])
    rows = []
    for name, s in seconds.items():
        row = {"candidate": name, "tokens": len(arguments[0]), "rows": len(arguments[2]), "runs": len(s)}
        median = statistics.median(s)
        rows.append(row | {"ms": 1e3 * median, "min_ms": 1e3 * min(s), "times_cpu": median / best})
    return rows


# ---- as a share of the copy bandwidth


def timer(device: str) -> Timer:
    """Seconds of a call; on a GPU device seconds, from a cold L2 cache."""
    if device == "cpu":
        return wall
    scratch = torch.empty(2**26, device=device)

    def timed(call: Callable) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scratch.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return timed


def captured(call: Callable) -> Callable:
    """The call as a graph: its device time alone, without Python or the read of the status word."""
    call()  # compiles, allocates
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def launches(call: Callable) -> int:
    """Kernels of a call."""
    call()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def gae(arguments: list[Tensor]) -> Callable | None:
    """rl_triton's GAE over the same number of tokens, in rows of 2048."""
    try:
        from rl_triton import compute_gae
    except ImportError:
        return None
    shape = (len(arguments[0]) // 2048, 2048)
    rewards, values, ends = (x[: shape[0] * 2048].view(shape) for x in (*arguments[:2], torch.zeros_like(arguments[0])))
    return lambda: compute_gae(rewards, values, ends, gamma=1.0, lambda_=1.0)


def copy_bandwidth(device: str, rounds: int, numbers: int = 2**28) -> float:
    """Bytes a second, read and written, of a copy of float32 numbers, 1 GB unless said otherwise."""
    source, target = torch.empty(2, numbers, device=device)
    seconds = in_turns({"copy": lambda: target.copy_(source)}, timer(device), rounds)["copy"]
    return 2 * source.numel() * 4 / statistics.median(seconds)


def compare(rounds: int, device: str, sizes: list[int], **form) -> list[dict]:
    """One row a candidate and size, in rows of 2048 tokens; `share` of the copy bandwidth of the same run, at 16 bytes
    a token. On a GPU the kernels are replayed as graphs."""
    cuda, timed = device == "cuda", timer(device)
    bandwidth = copy_bandwidth(device, rounds, 2**28 if cuda else 2**20)
    states = prime_kernels.backends()["prime_advantage"]
    usable = [name for name in (("cuda", "triton") if cuda else ("cpu",)) if states[name] == "ok"]
    check({name: ours(name, **form) for name in (*usable, "torch")}, batch(64, 4000 if cuda else 100, device), **form)
    options = {"beta": 0.05, "gamma": 1.0, "outcome_gamma": 1.0, "process_weight": 1.0, "outcome_weight": 1.0}
    options |= {"estimator": "rloo", "form": "run", "normalize": "batch", "whiten": True, "process_group": None}
    meaning = prime_kernels.reference.advantage
    if form:
        meaning, options = reference_credit.advantage, options | {"step": None, "shrink": 0.0, "prior": 0.5} | form
        options = {name: value for name, value in options.items() if name not in ("estimator", "form", "normalize")}
    rivals = {"torch eager": meaning}
    rivals |= {"torch.compile": torch.compile(meaning)} if cuda and not form else {}
    rows = []
    for size in sizes:
        arguments = batch(size // 2048, 2048, device, shortest=2048)
        plain = {name: functools.partial(ours(name, **form), *arguments) for name in usable}
        plain |= {name: functools.partial(call, *arguments, **options) for name, call in rivals.items()}
        plain |= {"rl_triton GAE": padded} if not form and (padded := gae(arguments)) else {}
        calls = {name: captured(call) if cuda and name in usable else call for name, call in plain.items()}
        for name, s in in_turns(calls, timed, rounds).items():
            median = statistics.median(s)
            row = {"candidate": name, "tokens": size, "rows": size // 2048, "us": 1e6 * median, "min_us": 1e6 * min(s)}
            row |= {"share": share(size, median, bandwidth)}
            rows.append(row | {"launches": launches(plain[name])} if cuda else row)
    return [{"candidate": "copy", "gb_per_s": bandwidth / 1e9}, *rows]


def share(tokens: int, seconds: float, bandwidth: float) -> float:
    return BYTES * tokens / seconds / bandwidth


def machine(device: str) -> dict:
    facts = {"torch": torch.__version__, "python": platform.python_version(), "load_average": os.getloadavg()[0]}
    if device == "cuda":
        return facts | gpu_facts()
    return facts | {"device": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[f"{row[n]:.4g}" if isinstance(row.get(n), float) else str(row.get(n, "")) for n in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *cells])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.advantage", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--credit", choices=CREDITS, help="a credit form in the place of the published one")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--note", default="", help="kept with the results")
    parser.add_argument("--out", type=Path, help="folder, by default benchmarks/results/<device>")
    arguments = parser.parse_args()
    torch.set_num_threads(2 if arguments.device == "cpu" else torch.get_num_threads())
    facts = machine(arguments.device)
    form = {"credit": arguments.credit, "slope": 0.3, "drift": 0.1} if arguments.credit else {}
    on_cpu = arguments.device == "cpu"
    rows = cpu(arguments.rounds, **form) if on_cpu else compare(arguments.rounds, "cuda", SIZES, **form)
    note = arguments.note
    if facts["load_average"] > QUIET:
        note = f"{note} load average {facts['load_average']:.1f} at the start: other jobs shared the machine".strip()
    out = arguments.out or results(arguments.device)
    out.mkdir(parents=True, exist_ok=True)
    record = {"command": " ".join(sys.argv[1:]), "note": note, "machine": facts, "rows": rows}
    name = f"advantage_{arguments.credit}.json" if form else "advantage.json"
    (out / name).write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows), note, sep="\n")


if __name__ == "__main__":
    main()
