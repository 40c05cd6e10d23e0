"""How stale are the rows of a step, what is generated for nothing, do engines idle? The real Collector on virtual time.

    python -m benchmarks.collection [--steps 40] [--out benchmarks/results/cpu/collection.json]

An engine decodes a bounded number of sequences at once, of long-tailed lengths (log-normal, cut at the limit; those of
groups that do not pass 1.3 times as long); a group passes with the rate of its step. A row is stale if it is trained in
a later step than it was sampled in. `ideal` knows how many groups a step will need, starts these at once and leaves
none over: what a step takes longer is the price of not knowing. `before` is the rule that demand.py replaced: the pass
rate of the last step, weighed like 8 groups of this one, a look at it after every group, and surplus of any age.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.machine import cpu_name
from prime_fast.config import RolloutConfig
from prime_fast.engine.batch import Sample
from prime_fast.rewards.pool import Verdict
from prime_fast.rollout import Request, RolloutEngine
from prime_fast.rollout.collect import Collector
from prime_fast.rollout.fleet import Fleet

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LONGEST, MEDIAN, SIGMA, LONGER = 3072, 700.0, 0.7, 1.3  # of responses, tokens; by how much those of failing groups are
ROUNDS = 20  # rollout.max_rounds: at a rate of 0.1 the default of 8 would end most steps before they are full
DRIFT = 50  # steps in which a drifting rate goes from 0.1 to 0.9
WARM_UP = 3  # steps that are not counted: the first ones know no pass rate
RIGHT, WRONG = 1, 0  # the token that stands for a response


class Case(NamedTuple):
    prompts: int
    samples: int
    rate: Callable[[int], float]  # step -> share of the groups that pass
    slots: int | None  # sequences that are decoded at once; None: hardly fewer than a step has


class Result(NamedTuple):
    stale: float  # share of the trained rows
    stalest: float  # that share in the stalest step
    over: float  # groups started / groups needed to fill the steps
    wasted: float  # share of the rollouts that max_age drops
    rounds: float  # how often a step starts groups
    time: float  # of a step's generation, in times that the longest response takes
    ideal_time: float
    idle: float  # share of the slots' time until a step has all its groups
    ideal_idle: float


class World(RolloutEngine):
    """An engine on virtual time, a unit a token, and the reward of what it writes."""

    def __init__(self, slots: int, seed: int) -> None:
        self.slots, self.seed = slots, seed

    def step_begins(self, rate: float) -> None:
        self.now, self.rate, self.rounds = 0.0, rate, 0
        self.free = [0.0] * self.slots  # when each slot is
        self.work: list[tuple[float, int, list[Sample]]] = []  # (when it is done, key, samples)
        self.lengths: list[list[int]] = []  # of the groups of this step, in the order of their start

    def submit(self, request: Request) -> None:
        draw = random.Random(f"{self.seed}/{request.key}")
        passes, all_right, count = draw.random() < self.rate, draw.random() < 0.5, len(request.seeds)
        right = count // 2 if passes else count * all_right
        median = math.log(MEDIAN * (1 if passes else LONGER))
        lengths = [min(LONGEST, 1 + int(draw.lognormvariate(median, SIGMA))) for _ in range(count)]
        samples = [_sample(RIGHT if k < right else WRONG, length) for k, length in enumerate(lengths)]
        self.lengths.append(lengths)
        heapq.heappush(self.work, (_decode(self.free, self.now, lengths), request.key, samples))

    def step(self) -> list[tuple[int, list[Sample]]]:
        self.now, key, samples = heapq.heappop(self.work)
        return [(key, samples)]

    def load_weights(self, weights) -> None:
        for _ in weights:
            pass

    def decode(self, tokens: torch.Tensor, skip_special_tokens: bool) -> str:
        return str(int(tokens[0]))

    def judge(self, responses: list[str], rows: list[dict]) -> list[Verdict]:
        return [Verdict(float(int(response) == RIGHT)) for response in responses]


class Inline(futures.Executor):
    """For the verifier, which has no time to wait here."""

    def submit(self, work: Callable, *arguments) -> futures.Future:
        done = futures.Future()
        done.set_result(work(*arguments))
        return done


class Now(Collector):
    max_age = RolloutConfig().max_age

    def _start(self, count: int) -> None:
        self.verifier.pool.rounds += count > 0
        super()._start(count)


class Before(Now):
    max_age, pass_rate = 1 << 30, 1.0

    def collect(self, phases: Callable, *beside, **options):
        groups, record, fresh = super().collect(phases, *beside, **options)
        self.pass_rate = record.get("groups_kept", self.pass_rate)
        return groups, record, fresh

    def _wanted(self, missing: int, looked_at: int, passed: int, limit: int, surplus: float) -> int:
        rate, wanted = (8 * self.pass_rate + passed) / (8 + looked_at), 0
        while wanted < limit - self.drawn and rate * (self.drawn - self.turn + wanted) < missing:
            wanted += 1
        return wanted


RULES = {"before": Before, "now": Now}


def run(case: Case, steps: int, rule: type[Now] = Now, seed: int = 0) -> Result:
    rates = [case.rate(step) for step in range(steps + WARM_UP)]
    slots = case.slots or round(case.prompts * case.samples / min(rates))
    world = World(slots, seed)
    options = {"prompts": case.prompts, "samples": case.samples, "max_rounds": ROUNDS, "max_age": rule.max_age}
    config, fleet = RolloutConfig(**options), Fleet(world, lambda: iter(()))
    collector = rule(config, seed, [{"prompt_ids": [0]}] * 4096, fleet, world, world)
    collector.verifier.thread = Inline()
    trained = stale = started = needed = rounds = wasted = 0
    time = ideal = busy = ideal_busy = stalest = 0.0
    for step, rate in enumerate(rates):
        world.step_begins(rate)
        groups, record, fresh = collector.collect(lambda name: nullcontext())
        fleet.version += 1
        if step < WARM_UP:
            continue
        old = sum(group.version < fleet.version - 1 for group in groups)
        trained, stale, stalest = trained + len(groups), stale + old, max(stalest, old / len(groups))
        need = len(fresh) - record["overstart"]
        started, needed, rounds = started + len(fresh), needed + need, rounds + world.rounds
        wasted += record["wasted"] / case.samples
        time, busy = time + world.now, busy + sum(map(sum, world.lengths))
        free = [0.0] * slots
        ideal += max((_decode(free, 0.0, lengths) for lengths in world.lengths[:need]), default=0.0)
        ideal_busy += sum(map(sum, world.lengths[:need]))
    shares = stale / trained, stalest, started / needed, wasted / started, rounds / steps
    times = time / steps / LONGEST, ideal / steps / LONGEST
    return Result(*shares, *times, 1 - busy / (slots * time), 1 - ideal_busy / (slots * ideal))


def drifting(period: float) -> Callable[[int], float]:
    """From 0.1 to 0.9 and back in `period` steps."""
    return lambda step: 0.5 - 0.4 * math.cos(2 * math.pi * step / period)


def _sample(token: int, length: int) -> Sample:
    tokens = torch.tensor([token])
    return Sample(tokens, tokens.float(), length == LONGEST)


def _decode(free: list[float], now: float, lengths: Sequence[int]) -> float:
    """Give each sequence the slot that is free first; when the last of them is done."""
    end = now
    for length in lengths:
        done = max(now, free[0]) + length
        heapq.heapreplace(free, done)
        end = max(end, done)
    return end


def cases(rates: Sequence[float] = RATES) -> Iterator[tuple[str, Case]]:
    """(what its rate is called, case)"""
    for prompts in (64, 256):
        for samples, slots in ((4, None), (8, None), (4, 256)):
            for rate in rates:
                yield f"{rate:g}", Case(prompts, samples, lambda step, rate=rate: rate, slots)
            yield f"0.1 to 0.9 in {DRIFT} steps", Case(prompts, samples, drifting(2 * DRIFT), slots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of 64 prompts that are counted in a case; of 256 half")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "collection.json")
    options = parser.parse_args()
    rows = []
    print("prompts x K, slots, rate: " + ", ".join(f"{name} before -> now" for name in Result._fields))
    for name, case in cases():
        steps = 2 * DRIFT if " to " in name else options.steps * 64 // min(case.prompts, 128)
        results = {rule: run(case, steps, RULES[rule]) for rule in RULES}
        pairs = zip(*results.values(), strict=True)
        print(f"{case.prompts} x {case.samples}, {case.slots or 'all'}, {name}: "
              + ", ".join(f"{before:.2f} -> {now:.2f}" for before, now in pairs), flush=True)  # fmt: skip
        facts = {"prompts": case.prompts, "samples": case.samples, "slots": case.slots or "all", "rate": name}
        rounded = {rule: {k: round(v, 4) for k, v in result._asdict().items()} for rule, result in results.items()}
        rows.append(facts | {"steps": steps} | rounded)
    settings = {"cpu": cpu_name(), "longest": LONGEST, "median": MEDIAN, "sigma": SIGMA, "max_rounds": ROUNDS}
    options.out.write_text(json.dumps(settings | {"cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
