"""Prompts -> responses -> outcomes -> groups worth training on; the surplus waits for the next step."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch

from prime_fast.config import RolloutConfig
from prime_fast.data.rows import PromptSampler, Rows
from prime_fast.engine import distributed
from prime_fast.engine.batch import Group, Sample
from prime_fast.engine.distributed import Stop
from prime_fast.metrics import Phases
from prime_fast.prime import keep_groups
from prime_fast.progress import progress
from prime_fast.rewards import RewardPool
from prime_fast.rewards.pool import Verdict
from prime_fast.rollout import Request, demand, failures
from prime_fast.rollout.fleet import Fleet
from prime_fast.rollout.verify import Verifier

TICK_SECONDS = 0.2  # how long a rank whose engine has nothing to do waits for outcomes, before it looks at the others


class Beside(Protocol):
    """Work for the ranks while their engines decode: `put` takes the groups of a step in their order, as soon as they
    are known; `work`, called again and again, does a little. Every rank makes the same calls."""

    def put(self, group: Group) -> None: ...

    def work(self) -> bool: ...


class Collector:
    """Keeps engines and verifiers busy until enough groups pass the filter.

    Active sampling without a bias towards short answers: prompts start in a fixed order, every group that was started
    is finished, and a step takes passing groups in the order in which they started, never in the order in which they
    finished. Whether one more prompt starts depends on the outcomes of the groups before it alone, each looked at in
    its turn, so a rerun starts the same ones (`demand`). Groups that pass beyond the need open the next step, unless
    the weights have changed more than config.max_age times since they were sampled.
    """

    def __init__(
        self,
        config: RolloutConfig,
        seed: int,
        rows: Rows,
        fleet: Fleet,
        pool: RewardPool,
        tokenizer: Any,
        max_failures: float = 1.0,
    ) -> None:
        self.config, self.seed, self.rows = config, seed, rows
        self.fleet, self.tokenizer = fleet, tokenizer
        self.verifier, self.max_failures = Verifier(pool), max_failures
        self.sampler = PromptSampler(len(rows), seed)
        self.drawn = 0  # groups started so far, which numbers them
        self.seen = (1.0, 1.0)  # groups of former steps, fading: looked at, passed; at first all are thought to pass
        self.surplus: list[Group] = []
        self.rows_in_work: dict[int, tuple[int, dict]] = {}  # of this rank: key -> (index, row)
        self.tick: Callable[..., None] = lambda *_, **__: None  # told of groups that start and finish

    def collect(
        self, phases: Phases, beside: Beside | None = None
    ) -> tuple[list[Group], dict[str, float], list[Group]]:
        """`_collect`, which tells how far it is."""
        with progress("rollouts", 0, "groups") as self.tick:
            return self._collect(phases, beside)

    def _collect(self, phases: Phases, beside: Beside | None) -> tuple[list[Group], dict[str, float], list[Group]]:
        """Groups to train on (at most config.prompts), metrics of the step, and all groups that it sampled.

        At most config.max_rounds * config.prompts prompts are started. Identical on every rank. Raises Stop where the
        reward fails on more than max_failures of the responses, looked at whenever as many groups as a step needs came.
        """
        prompts, now = self.config.prompts, self.fleet.version
        waiting = [group for group in self.surplus if now - group.version <= self.config.max_age]
        wasted = len(self.surplus) - len(waiting)
        need, first = prompts - len(waiting), self.drawn
        fresh, passing = [], []  # fresh: the groups looked at, in the order of their start
        arrived: dict[int, Group] = {}
        for group in waiting[:prompts] if beside else ():
            beside.put(group)
        try:
            while True:
                self._start(self._wanted(need - len(passing), len(fresh), len(passing), self.drawn - first))
                turn = first + len(fresh)
                if turn == self.drawn:
                    break
                while turn not in arrived:
                    arrived |= {group.id: group for group in self._tick(phases)}
                    if beside:
                        beside.work()
                fresh.append(arrived[turn])
                if self._worth_training(arrived[turn], self.config.filter_truncated):
                    passing.append(arrived[turn])
                    if beside and len(passing) <= need:
                        beside.put(arrived[turn])
                if len(fresh) % prompts == 0:
                    failures.check(fresh, self.rows, self.max_failures)
            if fresh:
                failures.check(fresh, self.rows, self.max_failures)
        except Stop:
            self.surplus = waiting + passing  # for the checkpoint of a PRM that has trained on some of them already
            raise
        self.seen = tuple(demand.MEMORY * (a + len(b)) for a, b in zip(self.seen, (fresh, passing), strict=True))
        kept = waiting + passing
        kept, self.surplus = kept[:prompts], kept[prompts:]
        record = self._metrics(fresh, len(passing))
        if kept:
            ages = [now - group.version for group in kept]
            record |= {"age": sum(ages) / len(ages), "stale": sum(age > 0 for age in ages) / len(ages)}
        if fresh and self.config.filter_truncated:
            lost = sum(self._worth_training(group, False) for group in fresh) - len(passing)
            record |= {"groups_truncated": lost / len(fresh)}
        overstart = self.drawn - 1 - passing[need - 1].id if 0 < need <= len(passing) else 0
        return kept, record | {"overstart": overstart, "wasted": wasted * self.config.samples}, fresh

    def greedy(self, rows: Rows) -> list[Group]:
        """One greedy response to each of `rows`, in their order."""
        self._submit({i: (i, [0]) for i in range(len(rows))}, rows, temperature=0.0)
        groups, phases = {}, Phases()
        with progress("evaluating", len(rows), "problems") as self.tick:
            while len(groups) < len(rows):
                groups |= {group.id: group for group in self._tick(phases)}
        return [groups[i] for i in range(len(rows))]

    def state_dict(self) -> dict[str, Any]:
        surplus = [(g.id, g.row, g.prompt, [tuple(s) for s in g.samples], g.outcomes, g.version) for g in self.surplus]
        position = {"sampler": self.sampler.state_dict(), "drawn": self.drawn, "seen": self.seen}
        return position | {"surplus": surplus, "version": self.fleet.version}

    def load_state_dict(self, state: dict[str, Any], renewed: Collection[str] = ()) -> None:
        """renewed: the parts of `identity` that are others now. Groups that were waiting, of other rows, tokens or
        outcomes, are dropped."""
        self.sampler.load_state_dict(state["sampler"], "data" in renewed)
        self.drawn, self.seen, self.fleet.version = state["drawn"], tuple(state["seen"]), state["version"]
        self.surplus = [
            Group(
                id_, row, tuple(prompt), tuple(Sample(*sample) for sample in samples), tuple(outcomes), version=version
            )
            for id_, row, prompt, samples, outcomes, version in state["surplus"]
            if not {"data", "tokenizer", "reward"} & set(renewed)
        ]

    def close(self) -> None:
        self.verifier.close()

    def _wanted(self, missing: int, looked_at: int, passed: int, started: int) -> int:
        """How many more prompts to start."""
        room, (before, passed_before) = self.config.max_rounds * self.config.prompts - started, self.seen
        allowed = demand.SURPLUS * self.config.prompts
        return demand.more(
            before + looked_at, passed_before + passed, started - looked_at, missing, room=room, surplus=allowed
        )

    def _start(self, count: int) -> None:
        if count == 0:
            return
        draws = enumerate(self.sampler.take(count), start=self.drawn)
        self.drawn += count
        self.tick(0, more=count)
        jobs = {id_: (row, [self._seed(id_, k) for k in range(self.config.samples)]) for id_, row in draws}
        self._submit(jobs, self.rows, self.config.temperature)

    def _submit(self, jobs: dict[int, tuple[int, list[int]]], rows: Rows, temperature: float) -> None:
        """jobs: key -> (index of the prompt in `rows`, seeds)."""
        requests = []
        for key, (index, seeds) in jobs.items():
            if self.fleet.mine(key):
                self.rows_in_work[key] = index, rows[index]
                prompt = rows[index]["prompt_ids"]
                requests.append(Request(key, prompt, seeds, self.config.max_response, temperature, self.config.top_p))
        self.fleet.submit(requests)

    def _tick(self, phases: Phases) -> list[Group]:
        """Let the engines and the verifier work for a while; the groups of all ranks that are complete now."""
        with phases("generate"):
            for key, samples in self.fleet.step():
                index, row = self.rows_in_work.pop(key)
                texts = [self.tokenizer.decode(sample.tokens, skip_special_tokens=True) for sample in samples]
                self.verifier.put((key, index, tuple(row["prompt_ids"]), tuple(samples)), texts, row)
        patience = 0.0 if self.fleet.pending else TICK_SECONDS
        with phases("reward"):  # engines that work by themselves, other ranks' among them, are not kept waiting
            scored = self.verifier.take(patience if self.fleet.concurrent else None)
        with phases("generate"):
            now = self.fleet.version
            everywhere = distributed.gather_lists([([_group(*item, now) for item in scored.done], scored.problem)])
        for _, problem in everywhere:
            if problem:
                raise Stop(problem)
        groups = [group for groups, _ in everywhere for group in groups]
        self.tick(len(groups), tokens=sum(len(sample.tokens) for group in groups for sample in group.samples))
        return groups

    def _worth_training(self, group: Group, filter_truncated: bool) -> bool:
        outcome = torch.tensor(group.outcomes)
        low, high = self.config.keep
        truncated = torch.tensor([sample.truncated for sample in group.samples]) if filter_truncated else None
        alike = torch.zeros(len(outcome), dtype=torch.int64)
        return bool(keep_groups(outcome, alike, low=low, high=high, truncated=truncated)[0])

    def _metrics(self, groups: list[Group], passed: int) -> dict[str, float]:
        if not groups:  # the surplus alone filled the step
            return {"rollouts": self.drawn * self.config.samples}
        samples = [sample for group in groups for sample in group.samples]
        outcomes = [outcome for group in groups for outcome in group.outcomes]
        return {
            "rollouts": self.drawn * self.config.samples,
            "outcome": sum(outcomes) / len(outcomes),
            "groups_kept": passed / len(groups),
            "response_length": sum(len(sample.tokens) for sample in samples) / len(samples),
            "truncated": sum(sample.truncated for sample in samples) / len(samples),
        } | failures.shares(groups)

    def _seed(self, group: int, k: int) -> int:
        return random.Random(f"{self.seed}/{group}/{k}").getrandbits(63)


def _group(start: tuple, verdicts: list[Verdict], version: int) -> Group:
    failed = tuple((verdict.failure, verdict.reason) for verdict in verdicts if verdict.failure)
    return Group(*start, tuple(verdict.outcome for verdict in verdicts), version, failed)
