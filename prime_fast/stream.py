"""The reference's and the PRM's passes of a step, made while its groups come in.

Groups that train the PRM alone, and its further passes over all of them, come last: scores are of the first pass.
A PRM mini-batch is of whole groups in their order, so the passes over its first groups need not wait for its last, nor
for the groups after it: rollout engines on devices of their own decode meanwhile. Only the optimizer's step waits for
its mini-batch. What is packed together is decided by the groups alone, not by when they came: early or late, the
numbers are the same to the bit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from prime_fast import passes, prime
from prime_fast.engine import distributed, packing
from prime_fast.engine.batch import Batch, Group
from prime_fast.engine.lora import Trunk
from prime_fast.engine.zero import Engine, StepResult
from prime_fast.metrics import Phases
from prime_fast.progress import progress

# A wave is packed once its rows fill so many micro-batches of every rank, up to a rest that no row may fit in: larger
# ones balance the ranks better (`packing.efficiency`), smaller ones leave less to do after the last group
WAVE_MICRO_BATCHES, WAVE_FILL = 2, 0.9


class Scored(NamedTuple):
    """R rows, T response tokens; of a model that is not there, None."""

    ref_logprob: dict[float, Tensor]  # by temperature: (T,) of the reference
    logprob: Tensor | None  # (T,) of the PRM, in the forward that first trained it if it trains
    score: Tensor | None  # (R,) beta * Q of that forward
    updates: passes.Updates | None  # of the PRM if it trains; the loss is that of the first pass


class Passes(NamedTuple):
    """What is to be made of every group. reference: the engine that gives reference log-probs, at `temperatures`."""

    reference: Engine | Trunk | None
    temperatures: tuple[float, ...]
    prm: Engine | None  # trained if it trains; its rewards need the reference at temperature 1
    beta: float
    lr: float
    micro_tokens: int
    mini_batch: int  # rows per optimizer step of the PRM
    loss: str = "response"  # PrmConfig.loss
    epochs: int = 1  # its passes over the rows


@dataclass
class Wave:
    """Groups packed together, and what the passes over them gave on this rank; zeros where another's rows stand."""

    batch: Batch
    micros: passes.MiniBatch
    ref_logprob: dict[float, Tensor]
    logprob: Tensor
    score: Tensor


class Stream:
    """`put` takes the groups in their order, `work` makes one micro-batch of what can be made, `finish` the rest.

    Every rank makes the same calls. groups, samples: how many groups will come, of so many rows each. Should fewer
    come, the rows of a mini-batch cut short weigh in the gradient what they would have in a whole one. waves: pack
    groups as they come; else a mini-batch at a time, with fewer micro-batches.
    """

    def __init__(self, what: Passes, phases: Phases, groups: int, samples: int, *, waves: bool) -> None:
        self.what, self.phases = what, phases
        parts = passes.even(list(range(groups)), groups * samples / what.mini_batch)
        self.mini_rows = deque(len(part) * samples for part in parts)  # of the mini-batches to come
        capacity = what.micro_tokens * distributed.world_size()
        self.wave_tokens = WAVE_FILL * WAVE_MICRO_BATCHES * capacity if waves else math.inf
        self.engine = what.reference or what.prm
        self.waiting: list[Group] = []
        self.waves: list[Wave] = []
        self.jobs: deque[tuple[str, Callable[[], None]]] = deque()  # phase, micro-batch or optimizer step
        self.again: list[tuple[str, Callable[[], None]]] = []  # what a further pass of the PRM is made of
        self.open_rows = 0  # of the present mini-batch that have come
        self.loss = torch.zeros((), device=self.engine.device) if self.engine else None
        self.losses: list[float] = []
        self.steps: list[StepResult] = []

    @property
    def moved(self) -> bool:
        """Whether a weight of the PRM has changed."""
        return any(step.applied for step in self.steps)

    def put(self, group: Group) -> None:
        if self.engine is None:
            return
        self.waiting.append(group)
        self.open_rows += len(group.samples)
        whole = self.open_rows == self.mini_rows[0]
        fed = sum(len(g.prompt) + len(sample.tokens) - 1 for g in self.waiting for sample in g.samples)
        if whole or fed >= self.wave_tokens:
            self._plan(whole)

    def work(self) -> bool:
        """Make one micro-batch of what has been planned; False if there is none."""
        if not self.jobs:
            return False
        phase, job = self.jobs.popleft()
        with self.phases(phase):
            job()
        return True

    def finish(self, others: Sequence[Group] = ()) -> Scored:
        """Make what is left, and share the results with all ranks. others: groups that train the PRM as well, and are
        not scored: their mini-batches follow those of the groups that were put."""
        if self.waiting or self.open_rows:
            self._plan(last=True)
        if others:
            rows = sum(len(group.samples) for group in others)
            for part in passes.even(list(others), rows / self.what.mini_batch):
                self.waiting, self.open_rows = part, sum(len(group.samples) for group in part)
                self.mini_rows = deque([self.open_rows])
                self._plan(last=True, scored=False)
        self.jobs += self.again * (self.what.epochs - 1)
        with progress("reference and PRM", len(self.jobs), "micro-batches") as tick:
            while self.work():
                tick()
        if self.engine is None:
            return Scored({}, None, None, None)
        prm = self.what.prm
        updates = passes.updates(self.losses, self.steps) if self.steps else None
        if updates and self.what.epochs > 1:
            first = len(self.steps) // self.what.epochs
            updates = updates._replace(loss=passes.updates(self.losses[:first], self.steps[:first]).loss)
        if not self.waves:
            return Scored({}, None, None, updates)
        ref_logprob = {
            temperature: self._shared(lambda wave, at=temperature: wave.ref_logprob[at])
            for temperature in self.what.temperatures
        }
        if prm is None:
            return Scored(ref_logprob, None, None, None)
        logprob = self._shared(lambda wave: wave.logprob)
        if prm.trains:
            score = self._shared(lambda wave: wave.score)
            return Scored(ref_logprob, logprob, score, updates)
        rows = [len(response) for wave in self.waves for response in wave.batch.responses]
        cu_seqlens = torch.tensor([0, *accumulate(rows)], dtype=torch.int32, device=prm.device)
        score = self.what.beta * prime.segment_sum(logprob - ref_logprob[1.0], cu_seqlens)
        return Scored(ref_logprob, logprob, score, None)

    def rescore(self) -> Tensor:
        """(T,) of the PRM as it is now, on the same packs."""
        for wave in self.waves:
            for micro in wave.micros:
                self._score(wave, micro)
        return self._shared(lambda wave: wave.logprob)

    def _shared(self, of: Callable[[Wave], Tensor]) -> Tensor:
        """The waves' values end to end, those of every rank's rows."""
        return distributed.sum_(torch.cat([of(wave) for wave in self.waves]))

    def _plan(self, last: bool, scored: bool = True) -> None:
        """Pack the groups that wait, and note down the passes over them. last: they end their mini-batch."""
        what, prm = self.what, self.what.prm
        trains = prm is not None and prm.trains
        if self.waiting:
            batch = Batch.of(self.waiting)
            tokens, rows = int(batch.cu_seqlens[-1]), len(batch.responses)
            ranks, engine = distributed.world_size(), self.engine
            zeros = partial(torch.zeros, device=self.engine.device)
            wave = Wave(
                batch,
                packing.plan(batch.lengths, what.micro_tokens, ranks, engine.attention, engine.sequence_group.size),
                {temperature: zeros(tokens) for temperature in what.temperatures},
                zeros(tokens),
                zeros(rows),
            )
            weight = ranks / self.mini_rows[0] if trains else 0.0
            if scored:
                self.waves.append(wave)
            self.waiting = []
            if what.reference is not None:
                self.jobs += [("reference", partial(self._refer, wave, micro)) for micro in wave.micros]
            if trains:
                odds = (
                    prime.prm_intercept(batch.outcome, batch.group).to(prm.device) if what.loss != "response" else None
                )
                make = partial(self._train, wave, row_weight=zeros(rows) + weight, intercept=odds)
                self.jobs += [("prm", partial(make, micro, first=True)) for micro in wave.micros]
                self.again += [("prm", partial(make, micro, first=False)) for micro in wave.micros]
            elif prm is not None:
                self.jobs += [("prm", partial(self._score, wave, micro)) for micro in wave.micros]
        if last:
            if trains:
                step = "prm", partial(self._step, self.open_rows / self.mini_rows[0])
                self.jobs.append(step)
                self.again.append(step)
            self.open_rows = 0
            self.mini_rows.popleft()

    def _refer(self, wave: Wave, micro: list[list[int]]) -> None:
        pack = passes.pack_here(wave.batch, micro, self.what.reference)
        passes.score_pack(self.what.reference, pack, wave.ref_logprob)

    def _score(self, wave: Wave, micro: list[list[int]]) -> None:
        pack = passes.pack_here(wave.batch, micro, self.what.prm)
        passes.score_pack(self.what.prm, pack, {1.0: wave.logprob})

    def _train(
        self, wave: Wave, micro: list[list[int]], *, row_weight: Tensor, intercept: Tensor | None, first: bool
    ) -> None:
        prm = self.what.prm
        pack = passes.pack_here(wave.batch, micro, prm)
        outcome, ref_logprob = wave.batch.outcome.to(prm.device), wave.ref_logprob[1.0]
        rows = {"row_weight": row_weight, "intercept": intercept, "every_prefix": self.what.loss == "prefix"}
        result = passes.train_prm_pack(prm, pack, ref_logprob, outcome, beta=self.what.beta, **rows)
        self.loss += result.loss.detach()
        if first:
            pack.put(wave.logprob, result.logprob)
            pack.put_rows(wave.score, result.score)

    def _step(self, share: float) -> None:
        """share: of the mini-batch's rows that have come."""
        self.losses.append(float(distributed.sum_(self.loss)) / distributed.world_size() / share)
        self.loss.zero_()
        self.steps.append(self.what.prm.step(self.what.lr))
