"""Prompts -> responses -> outcomes -> groups worth training on; the surplus waits for the next step."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Any

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
from prime_fast.rollout import Request, failures
from prime_fast.rollout.fleet import Fleet
from prime_fast.rollout.verify import Verifier

TICK_SECONDS = 0.2  # how long a rank whose engine has nothing to do waits for outcomes, before it looks at the others
PRIOR_GROUPS = 8  # how many groups of this step the last step's pass rate weighs as much as


class Collector:
    """Keeps engines and verifiers busy until enough groups pass the filter.

    Active sampling without a bias towards short answers: prompts start in a fixed order, every group that was started
    is finished, and a step takes passing groups in the order in which they started, never in the order in which they
    finished. Whether one more prompt starts depends on the outcomes of the groups before it alone, each looked at in
    its turn, so a rerun starts the same ones. Groups that pass beyond the need open the next step.
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
        self.pass_rate = 1.0  # of the last step's groups; at first no group too many is started
        self.surplus: list[Group] = []
        self.rows_in_work: dict[int, tuple[int, dict]] = {}  # of this rank: key -> (index, row)
        self.tick: Callable[..., None] = lambda *_, **__: None  # told of groups that start and finish

    def collect(self, phases: Phases) -> tuple[list[Group], dict[str, float], list[Group]]:
        """`_collect`, which tells how far it is."""
        with progress("rollouts", 0, "groups") as self.tick:
            return self._collect(phases)

    def _collect(self, phases: Phases) -> tuple[list[Group], dict[str, float], list[Group]]:
        """Groups to train on (at most config.prompts), metrics of all fresh rollouts, and those fresh groups.

        At most config.max_rounds * config.prompts prompts are started. Identical on every rank. Raises Stop where the
        reward fails on more than max_failures of the responses, looked at whenever as many groups as a step needs came.
        """
        need = self.config.prompts - len(self.surplus)
        started, fresh, passing = self.drawn, [], []  # fresh: the groups looked at, in the order of their start
        arrived: dict[int, Group] = {}
        while True:
            self._start(self._wanted(need - len(passing), len(fresh), len(passing), self.drawn - started))
            turn = started + len(fresh)
            if turn == self.drawn:
                break
            while turn not in arrived:
                arrived |= {group.id: group for group in self._tick(phases)}
            fresh.append(arrived[turn])
            passing += [arrived[turn]] if self._worth_training(arrived[turn]) else []
            if len(fresh) % self.config.prompts == 0:
                failures.check(fresh, self.rows, self.max_failures)
        if fresh:
            failures.check(fresh, self.rows, self.max_failures)
            self.pass_rate = len(passing) / len(fresh)
        kept = self.surplus + passing
        kept, self.surplus = kept[: self.config.prompts], kept[self.config.prompts :]
        return kept, self._metrics(fresh, len(passing)), fresh

    def greedy(self, rows: Rows) -> list[Group]:
        """One greedy response to each of `rows`, in their order."""
        self._submit({i: (i, [0]) for i in range(len(rows))}, rows, temperature=0.0)
        groups, phases = {}, Phases()
        with progress("evaluating", len(rows), "problems") as self.tick:
            while len(groups) < len(rows):
                groups |= {group.id: group for group in self._tick(phases)}
        return [groups[i] for i in range(len(rows))]

    def state_dict(self) -> dict[str, Any]:
        surplus = [(g.id, g.row, g.prompt, [tuple(s) for s in g.samples], g.outcomes) for g in self.surplus]
        position = {"sampler": self.sampler.state_dict(), "drawn": self.drawn, "pass_rate": self.pass_rate}
        return position | {"surplus": surplus}

    def load_state_dict(self, state: dict[str, Any], renewed: Collection[str] = ()) -> None:
        """renewed: the parts of `identity` that are others now. Groups that were waiting, of other rows, tokens or
        outcomes, are dropped."""
        self.sampler.load_state_dict(state["sampler"], "data" in renewed)
        self.drawn, self.pass_rate = state["drawn"], state["pass_rate"]
        self.surplus = [
            Group(id_, row, tuple(prompt), tuple(Sample(*sample) for sample in samples), tuple(outcomes))
            for id_, row, prompt, samples, outcomes in state["surplus"]
            if not {"data", "tokenizer", "reward"} & set(renewed)
        ]

    def close(self) -> None:
        self.verifier.close()

    def _wanted(self, missing: int, looked_at: int, passed: int, started: int) -> int:
        """How many more prompts to start, so that the groups in work are expected to bring what is missing."""
        rate = (PRIOR_GROUPS * self.pass_rate + passed) / (PRIOR_GROUPS + looked_at)
        in_work, room = started - looked_at, self.config.max_rounds * self.config.prompts - started
        wanted = 0
        while wanted < room and rate * (in_work + wanted) < missing:
            wanted += 1
        return wanted

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
                requests.append(Request(key, prompt, seeds, self.config.max_response, temperature))
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
            everywhere = distributed.gather_lists([([_group(*item) for item in scored.done], scored.problem)])
        for _, problem in everywhere:
            if problem:
                raise Stop(problem)
        groups = [group for groups, _ in everywhere for group in groups]
        self.tick(len(groups), tokens=sum(len(sample.tokens) for group in groups for sample in group.samples))
        return groups

    def _worth_training(self, group: Group) -> bool:
        outcome = torch.tensor(group.outcomes)
        low, high = self.config.keep
        return bool(keep_groups(outcome, torch.zeros(len(outcome), dtype=torch.int64), low=low, high=high)[0])

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


def _group(start: tuple, verdicts: list[Verdict]) -> Group:
    failed = tuple((verdict.failure, verdict.reason) for verdict in verdicts if verdict.failure)
    return Group(*start, tuple(verdict.outcome for verdict in verdicts), failures=failed)
