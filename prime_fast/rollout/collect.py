"""Prompts -> responses -> outcomes -> groups worth training on; the surplus waits for the next step."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from statistics import pstdev
from typing import Any, Protocol

import torch

from prime_fast.config import RolloutConfig
from prime_fast.data.rows import PromptSampler, Rows
from prime_fast.engine import distributed
from prime_fast.engine.batch import Batch, Group, Sample
from prime_fast.engine.distributed import Stop
from prime_fast.metrics import Phases
from prime_fast.prime import keep_groups, length_correlation
from prime_fast.progress import progress
from prime_fast.rewards import RewardPool
from prime_fast.rewards.pool import Verdict
from prime_fast.rollout import TICK_SECONDS, Request, demand, failures
from prime_fast.rollout.fleet import Fleet
from prime_fast.rollout.verify import Verifier


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

    With config.carry or config.ahead the next step's prompts start behind those of this one, and a step ends as soon as
    enough of the groups that were looked at pass: what then decodes, goes on in the next step, or while the trainer
    works. Nothing else changes: each group is finished and has its turn, at which its own length plays no part, and if
    that comes more than config.max_age updates after its first token, it is sampled anew.
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
        self.drawn = self.turn = 0  # groups started so far, which numbers them; the next one to be looked at
        self.seen = (1.0, 1.0)  # groups of former steps, fading: looked at, passed; at first all are thought to pass
        self.surplus: list[Group] = []
        self.started: dict[int, int] = {}  # not looked at yet: id -> row
        self.stopped: list[int] = []  # those of them that the engines know nothing of, after a resume
        self.arrived: dict[int, Group] = {}  # by key
        self.rows_in_work: dict[int, tuple[int, dict]] = {}  # by key, on every rank: (index, row)
        self.tick: Callable[..., None] = lambda *_, **__: None  # told of groups that start and finish

    def collect(
        self, phases: Phases, beside: Beside | None = None, last: bool = False
    ) -> tuple[list[Group], dict[str, float], list[Group]]:
        """`_collect`, which tells how far it is. last: no step follows whose prompts could start now."""
        with progress("rollouts", 0, "groups") as self.tick:
            result = self._collect(phases, beside, early=self.overlaps and not last)
        self.fleet.patience = TICK_SECONDS
        if self.config.ahead:
            self.fleet.bind(everything=True)
        return result

    def _collect(
        self, phases: Phases, beside: Beside | None, early: bool
    ) -> tuple[list[Group], dict[str, float], list[Group]]:
        """Groups to train on (at most config.prompts), metrics of the step, and all groups that it looked at.

        early: start the next step's as well. At most config.max_rounds * config.prompts groups are looked at. Identical
        on every rank. Raises Stop where the reward fails on more than max_failures of the responses, looked at whenever
        as many groups as a step needs came.
        """
        prompts, now = self.config.prompts, self.fleet.version
        waiting = [group for group in self.surplus if now - group.version <= self.config.max_age]
        wasted = len(self.surplus) - len(waiting)
        need, limit = prompts - len(waiting), self.turn + self.config.max_rounds * prompts
        fresh, passing = [], []  # fresh: the groups looked at, in the order of their start
        for group in waiting[:prompts] if beside else ():
            beside.put(group)
        self._take_up()
        wasted += self._renew()
        try:
            while True:
                missing, seen = need - len(passing), (len(fresh), len(passing))
                self._start(self._wanted(missing, *seen, limit, demand.SURPLUS))
                if early:
                    self._start(self._wanted(missing + prompts, *seen, limit + prompts, demand.EARLY_SURPLUS))
                if self.turn in (self.drawn, limit) or (missing <= 0 and self.overlaps):
                    break
                while self.turn not in self.arrived:
                    self._tick(phases)
                    wasted += self._renew()
                    busy = beside is not None and beside.work()  # then there may be more to do than to wait
                    self.fleet.patience = 0.0 if busy else TICK_SECONDS
                group = self.arrived.pop(self.turn)
                del self.started[self.turn]
                self.turn += 1
                fresh.append(group)
                if self._worth_training(group, self.config.filter_truncated):
                    passing.append(group)
                    if beside and len(passing) <= need:
                        beside.put(group)
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
        if kept and self.overlaps:
            runs = [sample.runs for group in kept for sample in group.samples]
            age = Batch.of(kept, now).age
            record |= {"carried": sum(len(r) > 1 for r in runs) / len(runs), "token_age": float(age.float().mean())}
        if fresh and self.config.filter_truncated:
            lost = sum(self._worth_training(group, False) for group in fresh) - len(passing)
            record |= {"groups_truncated": lost / len(fresh)}
        overstart = self.turn - 1 - passing[need - 1].id if 0 < need <= len(passing) else 0
        return kept, record | {"overstart": overstart, "wasted": wasted * self.config.samples}, fresh

    def greedy(self, rows: Rows, phases: Phases | None = None) -> list[Group]:
        """One greedy response to each of `rows`, in their order."""
        keys = [-1 - i for i in range(len(rows))]  # ids of groups that train are not negative
        phases = phases or Phases()
        self._submit({key: (i, [0]) for i, key in enumerate(keys)}, rows, temperature=0.0)
        with progress("evaluating", len(rows), "problems") as self.tick:
            while not self.arrived.keys() >= set(keys):
                self._tick(phases)
        return [self.arrived.pop(key) for key in keys]

    def state_dict(self) -> dict[str, Any]:
        surplus = [(g.id, g.row, g.prompt, [tuple(s) for s in g.samples], g.outcomes, g.version) for g in self.surplus]
        position = {"sampler": self.sampler.state_dict(), "drawn": self.drawn, "seen": self.seen}
        position |= {"started": list(self.started.items())}
        return position | {"surplus": surplus, "version": self.fleet.version}

    def load_state_dict(self, state: dict[str, Any], renewed: Collection[str] = ()) -> None:
        """renewed: the parts of `identity` that are others now. Groups that were waiting, of other rows, tokens or
        outcomes, are dropped. Those that were in work start anew, with the same seeds, unless the rows are others."""
        self.sampler.load_state_dict(state["sampler"], "data" in renewed)
        self.drawn, self.seen, self.fleet.version = state["drawn"], tuple(state["seen"]), state["version"]
        started = dict(state.get("started", ()))
        self.turn = self.drawn - len(started)
        self.started = {} if "data" in renewed else started
        self.drawn, self.stopped = self.turn + len(self.started), list(self.started)
        self.surplus = [
            Group(
                id_, row, tuple(prompt), tuple(Sample(*sample) for sample in samples), tuple(outcomes), version=version
            )
            for id_, row, prompt, samples, outcomes, version in state["surplus"]
            if not {"data", "tokenizer", "reward"} & set(renewed)
        ]

    def close(self) -> None:
        self.verifier.close()

    @property
    def overlaps(self) -> bool:
        """Whether groups stay in work from one step to the next."""
        return self.config.carry or self.config.ahead > 0

    def _wanted(self, missing: int, looked_at: int, passed: int, limit: int, surplus: float) -> int:
        """How many more prompts to start, where no id may reach `limit`. surplus: as a share of a step's."""
        before, passed_before = self.seen
        room, allowed = max(0, limit - self.drawn), surplus * self.config.prompts
        in_work = self.drawn - self.turn
        return demand.more(before + looked_at, passed_before + passed, in_work, missing, room=room, surplus=allowed)

    def _start(self, count: int) -> None:
        ids = range(self.drawn, self.drawn + count)
        self.started |= zip(ids, self.sampler.take(count), strict=True)
        self.drawn += count
        self._sample(ids)

    def _take_up(self) -> None:
        """Groups of a former step, too, are finished."""
        self.tick(sum(key >= 0 for key in self.arrived), more=len(self.started) - len(self.stopped))
        self._sample(self.stopped)
        self.stopped = []

    def _renew(self) -> int:
        """Have groups whose turn comes too late for their age sampled once more, with the weights of now; how many.

        Where the pass rate jumps, more are in work than a step takes. Dropping these would not be a matter of their
        length either, but would leave prompts out.
        """
        oldest = self.fleet.version - self.config.max_age
        ids = sorted(key for key, group in self.arrived.items() if key >= 0 and group.version < oldest)
        for id_ in ids:
            del self.arrived[id_]
        self._sample(ids)
        return len(ids)

    def _sample(self, ids: Collection[int]) -> None:
        if not ids:
            return
        self.tick(0, more=len(ids))
        jobs = {id_: (self.started[id_], [self._seed(id_, k) for k in range(self.config.samples)]) for id_ in ids}
        self._submit(jobs, self.rows, self.config.temperature)

    def _submit(self, jobs: dict[int, tuple[int, list[int]]], rows: Rows, temperature: float) -> None:
        """jobs: key -> (index of the prompt in `rows`, seeds)."""
        self.rows_in_work |= {key: (index, rows[index]) for key, (index, _) in jobs.items()}
        how = self.config.max_response, temperature, self.config.top_p
        self.fleet.submit([Request(key, rows[i]["prompt_ids"], seeds, *how) for key, (i, seeds) in jobs.items()])

    def _tick(self, phases: Phases) -> None:
        """Let the engines and the verifier work for a while; the groups of all ranks that are complete then arrive."""
        with phases("generate"):
            for key, samples in self.fleet.step():
                index, row = self.rows_in_work[key]
                texts = [self.tokenizer.decode(sample.tokens, skip_special_tokens=True) for sample in samples]
                self.verifier.put((key, index, tuple(row["prompt_ids"]), tuple(samples)), texts, row)
        patience = 0.0 if self.fleet.pending else self.fleet.patience
        with phases("reward"):  # engines that work by themselves, other ranks' among them, are not kept waiting
            scored = self.verifier.take(patience if self.fleet.concurrent else None)
        with phases("generate"):
            now = self.fleet.version
            everywhere = distributed.gather_lists([([_group(*item, now) for item in scored.done], scored.problem)])
        for _, problem in everywhere:
            if problem:
                raise Stop(problem)
        groups = [group for groups, _ in everywhere for group in groups]
        for group in groups:
            del self.rows_in_work[group.id]
            self.arrived[group.id] = group
        self.tick(len(groups), tokens=sum(len(sample.tokens) for group in groups for sample in group.samples))

    def _worth_training(self, group: Group, filter_truncated: bool) -> bool:
        outcome = torch.tensor(group.outcomes)
        low, high = self.config.keep
        truncated = torch.tensor([sample.truncated for sample in group.samples]) if filter_truncated else None
        alike = torch.zeros(len(outcome), dtype=torch.int64)
        return bool(keep_groups(outcome, alike, low=low, high=high, truncated=truncated)[0])

    def _metrics(self, groups: list[Group], passed: int) -> dict[str, float]:
        if not groups:  # the surplus alone filled the step
            return {"rollouts": self.turn * self.config.samples}
        samples = [sample for group in groups for sample in group.samples]
        outcomes = [outcome for group in groups for outcome in group.outcomes]
        failed = failures.shares(groups) | failures.limits(groups)
        return {
            "rollouts": self.turn * self.config.samples,
            "outcome": sum(outcomes) / len(outcomes),
            "outcome_std": pstdev(outcomes),
            "groups_kept": passed / len(groups),
            "response_length": sum(len(sample.tokens) for sample in samples) / len(samples),
            "length_correlation": _length_correlation(groups),
            "truncated": sum(sample.truncated for sample in samples) / len(samples),
        } | failed

    def _seed(self, group: int, k: int) -> int:
        return random.Random(f"{self.seed}/{group}/{k}").getrandbits(63)


def _group(start: tuple, verdicts: list[Verdict], version: int) -> Group:
    """version: of engines that do not say."""
    *_, samples = start
    failed = tuple((verdict.failure, verdict.reason) for verdict in verdicts if verdict.failure)
    oldest = min((sample.runs[0][1] for sample in samples if sample.runs), default=version)
    programs = tuple(verdict.usage for verdict in verdicts if verdict.usage)
    return Group(*start, tuple(verdict.outcome for verdict in verdicts), oldest, failed, programs)


def _length_correlation(groups: list[Group]) -> float | None:
    """Of whole responses: one that is cut off is long, and fails, whatever the reward likes."""
    whole = [
        (len(sample.tokens), outcome, i)
        for i, group in enumerate(groups)
        for sample, outcome in zip(group.samples, group.outcomes, strict=True)
        if not sample.truncated
    ]
    return length_correlation(*map(torch.tensor, zip(*whole, strict=True))) if whole else None
