"""Rewards that pay for the answer alone, watchers, killed runs, intervals; and what was not measured."""

from __future__ import annotations

from benchmarks.measured.words import link, load, table
from benchmarks.soak import GROWTH, SPAN
from prime_fast.watch import WATCHERS


def rewards() -> str:
    """Rewards."""
    result, hack = load("rewards.json"), load("hack.json")
    math, code = result["math"], result["code"]
    names = {"math500": "MATH-500", "aime24": "AIME"}
    own = {"GSM8K": [0, 0]} | {name: [0, 0] for name in names.values()}
    other = [0, 0]
    for file, found in math["solutions"].items():
        for place, key in enumerate(("score_1", "rows")):
            own[names.get(file, "GSM8K")][place] += found["own_truth"][key]
        other[0] += found["another_truth"]["score_0"]
        other[1] += found["another_truth"]["rows"]
    command = (
        "python -m benchmarks.rewards --math data/gsm8k_train.jsonl data/gsm8k_test.jsonl data/math500.jsonl "
        "data/aime24.jsonl --code data/leetcode.jsonl"
    )
    scored = ", ".join(f"{right} of {rows} {name} rows" for name, (right, rows) in own.items())
    paid = len(hack["math"]["found"]) + len(hack["code"]["found"])
    return f"""
Worked solutions score `1` against their own ground truth in {scored}, and `0` against the next row's in {other[0]} of
{other[1]} (the other rows have the same answer as the next). {math["samples"]} math responses take
{math["seconds"]:.1f} s (on cores shared with much else), {code["samples"]} programs, right, wrong and endless,
{code["seconds"]:.0f} s ({code["ratio"]}x a process per sample); {result["machine"]["workers"]} workers. Made by
`{command}`:
{link("rewards.json")}.

Of {hack["math"]["attempts"]:,} seeded attempts to be paid without the answer, on
{hack["math"]["scored"] // hack["math"]["attempts"]} rows each, and of {hack["code"]["attempts"]} programs without the
work, {paid or "none"} was. Made by `python -m benchmarks.hack`: {link("hack.json")}."""


def watchers() -> str:
    """Watchers."""
    result = load("watchers.json")
    runs = result["runs"]
    failing = {name: run for name, run in runs.items() if "tells" in run}
    healthy = {name.removeprefix("healthy: "): run for name, run in runs.items() if name not in failing}
    right = [run for run in failing.values() if set(run["tells"]) <= set(run["began"])]
    shown = {watcher for run in right for watcher in run["tells"]}
    steps = [run["steps"] for run in healthy.values()]
    false = [
        f"`{watcher}` in step {step} of {name}"
        for name, run in healthy.items()
        for watcher, step in run["began"].items()
    ]
    rows = [
        [name, ", ".join(f"`{watcher}` {step}" for watcher, step in run["began"].items())]
        for name, run in failing.items()
    ]
    return f"""
In {len(right)} of {len(failing)} small runs of the quickstart's task that were made to go wrong, the watchers begin
that should; {len(shown)} of the {len(WATCHERS)} are among them. In {len(healthy)} healthy runs of {min(steps)} to
{max(steps)} steps, of every task, {len(false) or "none"} begins{": " * bool(false)}{", ".join(false)}. Made by
`{result["command"]}`: {link("watchers.json")}.

{table(("made to go wrong", "begins, in step"), rows)}"""


def chaos() -> str:
    """Chaos."""
    runs = load("chaos.json")["done"]
    embedded = [run for run in runs if run["engine"] == "hf"]
    vllm = [run for run in runs if run["engine"] == "vllm"]
    return f"""
{len(runs)} seeded events hit small runs: SIGKILL of the trainer in every phase, amid checkpoints and lines of files, of
one of two ranks, of reward workers and of vLLM; SIGTERM, SIGSTOP, a full disk at each kind of write, every file of a
checkpoint truncated, flipped or missing. Then the same command line is given again.
{sum(run["same_bits"] is True for run in embedded)} of {len(embedded)} with the embedded engine end in the bits of the
undisturbed run, {sum(run["fine"] for run in vllm)} of {len(vllm)} with vLLM in whole and finite metrics. Made by
`python -m benchmarks.chaos`: {link("chaos.json")}."""


def soak() -> str:
    """Soak."""
    runs, rows = load("soak.json")["runs"], []
    for engine, run in runs.items():
        for name, trend in run["trends"].items():
            mean, growth = f"{trend['mean']:.4g}", f"{trend['growth']:+.2%} (to {trend['growth_high']:+.2%})"
            rows.append([engine, name, mean, growth, "yes" if trend["flat"] else "no"])
    steps = {run["steps"] for run in runs.values()}
    head = ("engine", "of the run", "mean (MiB, s)", f"growth in {SPAN:,} steps (upper end)", "flat")
    return f"""
{", ".join(f"{count:,}" for count in steps)} tiny steps of the real trainer with each engine, with programs in the
sandbox, rewards that hang, evaluations and checkpoints, beside other programs on the same cores; the slope after a
warm-up, by Theil and Sen, with its interval. Flat: the interval reaches down to zero, or its upper end is below
{GROWTH:.0%} of the mean. Made by `python -m benchmarks.soak`: {link("soak.json")}.

{table(head, rows)}"""


def intervals() -> str:
    """Intervals."""
    result = load("intervals.json")
    kinds = result["coverage"].values()
    usual = [kind["with_5_events"] for kind in kinds]
    band = "within_93_to_97"
    _, low, _, high = band.split("_")
    inside = sum(kind[band] * kind["cases"] for kind in usual) / sum(kind["cases"] for kind in usual)
    return f"""
How often the intervals of an evaluation enclose the truth, by enumeration and simulation of
{sum(kind["cases"] for kind in kinds)} cases: never less than {min(kind["lowest"] for kind in kinds):.1%}; where five
solved and five unsolved problems are to be expected, in {low}% to {high}% of the draws in {inside:.0%} of the cases.
Made by `python -m benchmarks.intervals`: {link("intervals.json")}."""


def gpu() -> str:
    """GPU."""
    return """
No number is given here, because none was measured yet. `make gpu` gets them on any NVIDIA machine with torch 2.11 or
newer, without a network, into `benchmarks/results/<gpu>`: facts of the machine, every kernel test on the chip, LM-head
and advantage kernels against their peers, a bfloat16 trainer step at 0.5B and 1.5B, vLLM's life cycle, whole steps
beside the published dataflow, the quickstart. It works in stages with time limits, leaves a JSON after each, and goes
on where it was cut off (`make gpu GPU_ARGS="--stages 1-4"`). Until then `python -m prime_kernels.compile_check` runs
the host code of every op for every dtype, head size and option on sm_80 and sm_90 and compiles what it would launch,
with registers, spills and shared memory held against the chip; the kernels run in Triton's interpreter and a CPU
emulation of the CUDA launch and are compared with float64 there."""
