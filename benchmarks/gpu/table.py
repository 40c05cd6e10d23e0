"""The results of all stages as one page: python -m benchmarks.gpu.table FOLDER writes FOLDER/README.md and pictures."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.job import STAGES, errors, has_result, left_out, read

PHASES = ("reference", "prm", "advantage", "old_logprobs", "policy", "sync")


def main(folder: Path) -> None:
    records = {stage.name: read(folder / f"{stage.name}.json") for stage in STAGES}
    pictures = draw(folder, records)
    (folder / "README.md").write_text(page(records, pictures))


def page(records: dict[str, dict], pictures: list[str]) -> str:
    parts = [title(records["facts"]), summary(records)]
    for stage in STAGES:
        record = records[stage.name]
        if record:
            body = SECTIONS[stage.name](results(record))
            parts += [f"## {stage.what[0].upper()}{stage.what[1:]}", *body, *troubles(record)]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    return "\n\n".join(part for part in parts if part) + "\n"


def results(record: dict) -> dict[str, Any]:
    """Of the items that have one."""
    return {name: item for name, item in record.get("items", {}).items() if has_result(item)}


def title(facts: dict) -> str:
    machine = results(facts).get("machine", {})
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items() if version)
    head = f"# {machine.get('device', 'A machine')}"
    if "capability" in machine:
        smi = machine["nvidia_smi"] or {}
        head += f"\n\nCompute capability {machine['capability']}, {machine['memory_gib']:.0f} GiB"
        head += f", driver {smi.get('driver_version', 'unknown')}, CUDA {machine['cuda']}."
    rehearsal = "\n\n**A rehearsal at tiny sizes: no number here says anything.**"
    head += rehearsal if facts.get("made_by", {}).get("small") else ""
    return head + (f"\n\nPython {machine['python']}, {versions}. {machine['build']}." if machine else "")


def summary(records: dict[str, dict]) -> str:
    rows = []
    for number, stage in enumerate(STAGES, 1):
        record = records[stage.name]
        planned, failed = record.get("planned", []), errors(record) if record else {}
        made = sum(name in results(record) for name in planned)
        state = "not run" if not record else f"{made} of {len(planned)} done"
        state += f", {len(failed)} failed" if failed else ""
        rows.append([number, stage.name, state, f"{record['seconds']:.0f} s" if record else ""])
    return grid(["", "stage", "items", "time"], rows)


def troubles(record: dict) -> list[str]:
    items = record["items"]
    lines = [f"- **failed** {name}: {text.splitlines()[-1][:300]}" for name, text in errors(record).items()]
    lines += [f"- left out: {name}: {item['skipped']}" for name, item in items.items() if "skipped" in item]
    if missing := left_out(record):
        lines.append(f"- not reached in the time given: {len(missing)}, from {missing[0]} on")
    return ["\n".join(lines)] if lines else []


# ---- a section a stage


def facts(found: dict) -> list[str]:
    parts = []
    if "gemm" in found:
        rows = [[name, f"{value:.1f}"] for name, value in found["gemm"]["tflops"].items()]
        parts.append(grid(["product", "TFLOP/s"], rows))
    if "copy" in found:
        parts.append(f"Copy of 1 GB: {found['copy']['gb_per_s']:.0f} GB/s read and written.")
    if "machine" in found:
        parts.append("\n".join(f"- without {name}: {loss}" for name, loss in found["machine"]["missing"].items()))
    return parts


def kernels(found: dict) -> list[str]:
    tests = {name: item for name, item in found.items() if "outcome" in item}
    outcomes: dict[str, list[str]] = {}
    for name, item in tests.items():
        outcomes.setdefault(name.rpartition("/")[2].partition("[")[0], []).append(item["outcome"])
    rows = [[name, seen.count("passed"), seen.count("skipped") or ""] for name, seen in outcomes.items()]
    checks = [f"- {name}: {item['summary']}" for name, item in found.items() if "summary" in item]
    passed = sum(item["outcome"] == "passed" for item in tests.values())
    return [f"{passed} cases passed.", grid(["test", "passed", "skipped"], rows), "\n".join(checks)]


def heads(found: dict) -> list[str]:
    from benchmarks import advantage, lm_head

    rows = [row for name, item in found.items() if name != "advantage" for row in item["rows"]]
    absent = {row["peer"] for row in rows if row.get("note", "").startswith("ModuleNotFoundError")}
    parts = [lm_head.table([row for row in rows if row["peer"] not in absent])] if rows else []
    parts += [f"Not installed: {', '.join(sorted(absent))}."] if absent else []
    return parts + ([advantage.table(found["advantage"]["rows"])] if "advantage" in found else [])


def step(found: dict) -> list[str]:
    names = ["case", "step s", *PHASES, "tokens/s", "MFU"]
    rows, memory = [], []
    for case in cases(found):
        phases = [f"{case['seconds'][name]:.2f}" if name in case["seconds"] else "" for name in PHASES]
        speed = [f"{case['tokens_per_second']:.0f}", f"{case['mfu']:.3f}"]
        rows.append([case["case"], f"{case['step_seconds']:.2f}", *phases, *speed])
        plan = case["planned_gib"]
        for phase, gib in case["measured_gib"].items():
            memory.append([case["case"], phase, f"{gib:.1f}", f"{plan[phase]:.1f}" if phase in plan else ""])
    note = "Rows are given, not sampled. MFU is of the GEMM peak of the same process, recomputation not credited."
    parked = {name: item["parking"] for name, item in found.items() if "parking" in item}
    states = "\n".join(f"- parking the optimizer states of {name}: {plain(item)}" for name, item in parked.items())
    memory = grid(["case", "phase", "peak GiB", "planned GiB"], memory)
    return [grid(names, rows), note, memory, states] if rows else []


def cases(found: dict) -> list[dict]:
    return [case for item in found.values() for case in item.get("cases", [])]


def listed(found: dict) -> list[str]:
    return [
        f"**{name}**\n\n" + "\n".join(f"- {key}: {plain(value)}" for key, value in item.items() if value is not None)
        for name, item in found.items()
    ]


def whole(found: dict) -> list[str]:
    return listed({name: {key: item.get(key) for key in ("step_seconds", "ratios")} for name, item in found.items()})


SECTIONS = {"facts": facts, "kernels": kernels, "heads": heads, "step": step}
SECTIONS |= {"engine": listed, "whole": whole, "learn": listed}


def plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " / ".join(map(plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def grid(head: list, rows: Iterable[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def draw(folder: Path, records: dict[str, dict]) -> list[str]:
    """What can be drawn of the results there are; nothing where matplotlib is missing, as the facts say."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    from benchmarks import lm_head

    pictures = []
    losses = [item["rows"] for name, item in results(records["heads"]).items() if name != "advantage"]
    if rows := [row for case in losses for row in case]:
        lm_head.plot(rows, folder / "heads.png", "LM-head ops")
        pictures.append("heads.png")
    if steps := cases(results(records["step"])):
        figure = Figure(figsize=(8, 0.9 + 0.45 * len(steps)), layout="constrained")
        axis = figure.subplots()
        stacked(axis, [case["case"] for case in steps], [case["seconds"] for case in steps], PHASES)
        axis.set_xlabel("seconds of a step")
        axis.legend(fontsize=7, ncols=3)
        figure.savefig(folder / "step.png", dpi=130)
        pictures.append("step.png")
    return pictures


if __name__ == "__main__":
    main(Path(sys.argv[1]))


def stacked(axis: Any, names: list[str], seconds: list[dict[str, float]], phases: Iterable[str]) -> None:
    """A bar for each name, from top to bottom, made of its seconds in each phase."""
    left = [0.0] * len(names)
    for phase in phases:
        widths = [parts.get(phase, 0.0) for parts in seconds]
        axis.barh(names, widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
