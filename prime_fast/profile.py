"""One step under torch's profiler: a trace to look at, and a table of where every percent of the step goes.

Each instant of rank 0's step belongs to one phase of the trainer's stopwatch and to one group of operators: on a GPU
that of the kernel that runs (or host, where none does), on a CPU that of the innermost known operator of the thread
that trains. So the table sums to the step, by construction.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, record_function

from prime_fast.engine import distributed
from prime_fast.metrics import Phases

THIRD = 3  # step of a run, when everything is compiled, allocated and in its caches
STEP, PHASE, BETWEEN = "prime_fast step", "phase: ", "between phases"
HOST, OTHER, COMMUNICATION, GEMM = "host", "other operators", "communication", "GEMM"
GROUPS = {  # the first that an operator's or kernel's name matches; what runs inside one of them is a part of it
    "optimizer": r"^optimizer$|Optimizer\.step|adam",
    "LM head": r"linear_(logprob|policy|prm)",
    COMMUNICATION: r"c10d|nccl|gloo|record_param_comms|all_?(reduce|gather)|reduce_scatter",
    "attention": r"attention|varlen|flash|fmha|packed_attn",
    GEMM: r"^aten::(mm|addmm|bmm|baddbmm|linear|matmul|_mm|addmv|mv)\b|gemm|cutlass|nvjet|cublas",
}
COLUMNS = (GEMM, "attention", "LM head", "optimizer", COMMUNICATION, OTHER, HOST)
HOOKS = r"^(Pre|Post)Backward"  # of DeepSpeed, in Python
TOP = 20  # operators named
WIDTH = 120
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")

Spent = dict[tuple[str, str], float]  # (phase, group) -> microseconds


class Segment(NamedTuple):
    start: float
    end: float
    phase: str
    group: str
    name: str


class Profile:
    """`with profile(step, phases):` around each step; one of them is profiled, on rank 0: step `wanted`, or where that
    is None the third that this process makes, or the last if there are fewer."""

    def __init__(self, run_dir: str, last: int, wanted: int | None = None) -> None:
        if wanted is not None and wanted > last:
            raise ValueError(f"--profile {wanted} is a step after the last one; give one up to steps={last}")
        self.directory, self.last, self.wanted = Path(run_dir) / "profile", last, wanted
        self.seen, self.made = 0, False

    def __call__(self, step: int, phases: Phases) -> AbstractContextManager:
        self.seen += 1
        now = step == self.wanted if self.wanted else self.seen == THIRD or (self.seen < THIRD and step == self.last)
        if not now or self.made:
            return nullcontext()
        self.made = True
        return self._profiled(step, phases) if distributed.rank() == 0 else nullcontext()

    @contextmanager
    def _profiled(self, step: int, phases: Phases) -> Iterator[None]:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        phases.mark = lambda name: record_function(PHASE + name)
        try:
            with torch.profiler.profile(activities=activities) as profiler, record_function(STEP):
                yield
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
        finally:
            phases.mark = nullcontext
        self.directory.mkdir(parents=True, exist_ok=True)
        trace = self.directory / f"step-{step:06d}.json.gz"
        profiler.export_chrome_trace(str(trace))
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        segments, path = timeline(events), self.directory / f"step-{step:06d}.txt"
        shares = table(by_phase_and_group(segments), step)
        with path.open("w", encoding="utf-8") as file:
            console = Console(file=file, width=WIDTH)
            console.print(shares, operators(segments, Counter(event["name"] for event in events)))
        Console(width=max(WIDTH, Console().width)).print(shares)
        print(f"profile: {path}, {trace} (chrome://tracing or ui.perfetto.dev)", flush=True)


def off(step: int, phases: Phases) -> AbstractContextManager:
    """No profile."""
    return nullcontext()


def timeline(events: Iterable[dict]) -> list[Segment]:
    """The step of a chrome trace cut into segments without gaps; microseconds."""
    events = [event for event in events if event.get("ph") == "X"]
    host = [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    root = next(event for event in host if event["name"] == STEP)
    thread = [e for e in host if e["tid"] == root["tid"] and _within(e, root)]
    owners: dict[int, str] = {}
    segments = _innermost(thread, owners)
    others: dict[int, list[dict]] = defaultdict(list)
    for event in host:
        if event["tid"] != root["tid"]:
            others[event["tid"]].append(event)
    elsewhere = [segment for part in others.values() for segment in _innermost(part, owners)]
    if kernels := [event for event in events if event.get("cat") in DEVICE]:
        return _cover([s._replace(group=HOST, name=HOST) for s in segments], _disjoint(_run(kernels, owners)))
    waiting = [s for s in elsewhere if s.group == COMMUNICATION]
    return _cover(segments, _disjoint(waiting), only=HOST)


def by_phase_and_group(segments: list[Segment]) -> Spent:
    spent: Spent = defaultdict(float)
    for segment in segments:
        spent[segment.phase, segment.group] += segment.end - segment.start
    return dict(spent)


def table(spent: Spent, step: int) -> Table:
    """Percent of the step; phases by their first moment, what lies between them last."""
    total = sum(spent.values())
    title = f"Step {step}: where its {total / 1e6:.3g} s under the profiler went, percent"
    made = Table("phase", "sum", *COLUMNS, title=title)
    phases = sorted(dict.fromkeys(phase for phase, _ in spent), key=lambda phase: phase == BETWEEN)
    for phase in phases:
        shares = [spent.get((phase, group), 0.0) / total for group in COLUMNS]
        made.add_row(phase, *(f"{100 * share:.1f}" for share in (sum(shares), *shares)))
    made.add_section()
    sums = [sum(spent.get((phase, group), 0.0) for phase in phases) / total for group in COLUMNS]
    made.add_row("step", *(f"{100 * share:.1f}" for share in (sum(sums), *sums)))
    return made


def operators(segments: list[Segment], calls: Mapping[str, int]) -> Table:
    """The operators and kernels that take most, by themselves, with how often they are in the trace."""
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for segment in segments:
        spent[segment.group, segment.name] += segment.end - segment.start
    total = sum(spent.values())
    made = Table("group", "operator", "percent", "calls", title="What takes most, by itself")
    for (group, name), time in sorted(spent.items(), key=lambda item: -item[1])[:TOP]:
        made.add_row(group, name[:70], f"{100 * time / total:.1f}", str(calls.get(name, "")))
    return made


@cache
def group_of(name: str) -> str | None:
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), None)


def _innermost(events: list[dict], owners: dict[int, str]) -> list[Segment]:
    """Nested events of one thread -> segments of the innermost; notes each operator's group under its External id."""
    segments: list[Segment] = []
    stack: list[tuple[float, str, str, str]] = []  # (end, phase, group, name)
    now = 0.0

    def until(moment: float) -> None:
        nonlocal now
        if stack and moment > now:
            segments.append(Segment(now, moment, *stack[-1][1:]))
        now = max(now, moment)

    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while stack and stack[-1][0] <= event["ts"]:
            until(stack[-1][0])
            stack.pop()
        until(event["ts"])
        now = event["ts"] if not stack else now
        frame = _frame(event, stack[-1][1:] if stack else (BETWEEN, HOST, HOST))
        owners[event.get("args", {}).get("External id", -1)] = frame[1]
        end = event["ts"] + event["dur"]
        stack.append((min(end, stack[-1][0]) if stack else end, *frame))
    while stack:
        until(stack[-1][0])
        stack.pop()
    return segments


def _frame(event: dict, parent: tuple[str, str, str]) -> tuple[str, str, str]:
    """(phase, group, name) of an event inside `parent`; what no group knows is an operator if torch says so."""
    phase, group, _ = parent
    name = event["name"]
    if name.startswith(PHASE):
        return name.removeprefix(PHASE), HOST, HOST
    if group in GROUPS:
        return phase, group, name
    if found := group_of(name):
        return phase, found, name
    if re.search(HOOKS, name):
        return phase, HOST, name
    if event["cat"] == "cpu_op":
        return phase, OTHER, name
    return phase, group, name if group != HOST else HOST


def _run(kernels: list[dict], owners: dict[int, str]) -> list[Segment]:
    """What the device did: of the group of the operator that launched it, else by its own name."""
    found = []
    for event in kernels:
        owner = owners.get(event.get("args", {}).get("External id"))
        group = owner if owner in GROUPS else group_of(event["name"]) or OTHER
        found.append(Segment(event["ts"], event["ts"] + event["dur"], "", group, event["name"]))
    return found


def _disjoint(segments: list[Segment]) -> list[Segment]:
    """Without overlap: what computes hides what communicates, and what began first the rest."""
    kept: list[Segment] = []
    for waits in (False, True):
        part: list[Segment] = []
        for segment in sorted(s for s in segments if (s.group == COMMUNICATION) == waits):
            start = max(segment.start, part[-1].end) if part else segment.start
            if start < segment.end:
                part.append(segment._replace(start=start))
        kept = sorted([*kept, *_outside(part, kept)])
    return kept


def _outside(segments: list[Segment], taken: list[Segment]) -> list[Segment]:
    """The parts of disjoint segments that no other covers."""
    left, index = [], 0
    for segment in segments:
        start = segment.start
        while index < len(taken) and taken[index].end <= start:
            index += 1
        at = index
        while at < len(taken) and taken[at].start < segment.end:
            if taken[at].start > start:
                left.append(segment._replace(start=start, end=taken[at].start))
            start = max(start, taken[at].end)
            at += 1
        if start < segment.end:
            left.append(segment._replace(start=start))
    return left


def _cover(segments: list[Segment], over: list[Segment], only: str | None = None) -> list[Segment]:
    """The segments, with group and name of the disjoint `over` where these lie (over segments of group `only`)."""
    covered, index = [], 0
    for segment in segments:
        if only is not None and segment.group != only:
            covered.append(segment)
            continue
        now = segment.start
        while index < len(over) and over[index].end <= now:
            index += 1
        at = index
        while at < len(over) and over[at].start < segment.end:
            start, end = max(now, over[at].start), min(segment.end, over[at].end)
            if start > now:
                covered.append(segment._replace(start=now, end=start))
            covered.append(segment._replace(start=start, end=end, group=over[at].group, name=over[at].name))
            now, at = end, at + 1
        if now < segment.end:
            covered.append(segment._replace(start=now))
    return covered


def _within(event: dict, root: dict) -> bool:
    return root["ts"] <= event["ts"] and event["ts"] + event["dur"] <= root["ts"] + root["dur"]
