"""Prompts of the next step that start in this one: the real Collector and Fleet on an engine of virtual time."""

import random
import sys
from collections import Counter
from contextlib import nullcontext

import pytest
import torch

from benchmarks import collection as simulation
from prime_fast.config import RolloutConfig
from prime_fast.engine.batch import Batch, Sample
from prime_fast.rollout import EngineDied, RolloutEngine
from prime_fast.rollout.collect import Collector
from prime_fast.rollout.fleet import Fleet

TRAINING = 1500.0  # a step of it, in tokens of time
PROMPTS, SAMPLES, SLOTS = 16, 4, 64


class Slots(RolloutEngine):
    """Sequences of known lengths, SLOTS at a time; a new one takes the place of one that ends."""

    concurrent, batch = True, SLOTS

    def __init__(self, rate, seed=0):
        self.rate, self.seed, self.now, self.idle, self.busy = rate, seed, 0.0, 0.0, 0.0
        self.waiting, self.running, self.done = [], {}, {}  # running: (key, k) -> [tokens, of how many, runs, sample]

    def submit(self, request):
        draw = random.Random(f"{self.seed}/{request.key}")
        passes, count = draw.random() < self.rate(request.key), len(request.seeds)
        lengths = [min(3072, 1 + int(draw.lognormvariate(6.3 if passes else 6.6, 0.9))) for _ in range(count)]
        self.done[request.key] = [None] * count
        for k, length in enumerate(lengths):
            self.waiting.append((request.key, k, length, simulation.RIGHT if passes and k % 2 else simulation.WRONG))

    def step(self):
        """Until the next sequence ends."""
        self.fill()
        if self.running:
            self.advance(min(length - tokens for tokens, length, *_ in self.running.values()))
        ready = [key for key, samples in self.done.items() if None not in samples]
        return [(key, self.done.pop(key)) for key in ready]

    def fill(self):
        while self.waiting and len(self.running) < SLOTS:
            key, k, length, token = self.waiting.pop(0)
            self.running[key, k] = [0, length, [(0, self.version)], token]

    def advance(self, time):
        self.now += time
        self.idle += time * (SLOTS - len(self.running))
        for (key, k), work in list(self.running.items()):
            work[0] += time
            if work[0] >= work[1]:
                tokens = torch.full((work[1],), work[3])
                self.done[key][k] = Sample(tokens, tokens.float(), work[1] == 3072, tuple(work[2]))
                del self.running[key, k]

    def decode_beside(self, time):
        """The trainer works so long, and the engine as well."""
        end = self.now + time
        while self.now < end:
            self.fill()
            left = [length - tokens for tokens, length, *_ in self.running.values()]
            self.advance(min([end - self.now, *left]))

    def load_weights(self, weights):
        for work in self.running.values():
            runs = work[2]
            if runs[-1][1] != self.version:
                work[2] = [*(run for run in runs if run[0] < work[0]), (int(work[0]), self.version)]

    def sleep(self):
        pass

    def wake(self):
        pass

    ready = wake


class Run:
    """Steps, made one by one; the weights change after each."""

    def __init__(self, rate=lambda key: 0.4, **options):
        self.engine = Slots(rate)
        self.fleet = Fleet(self.engine, lambda: iter(()))
        self.config = RolloutConfig(**{"prompts": PROMPTS, "samples": SAMPLES, "engine": "vllm"} | options)
        world = simulation.World(1, 0)  # its reward and its decoding
        self.collector = Collector(self.config, 0, [{"prompt_ids": [0]}] * 4096, self.fleet, world, world)
        self.collector.verifier.thread = simulation.Inline()
        self.looked_at, self.trained, self.records, self.batches = [], [], [], []

    def __call__(self, steps, last=False):
        for step in range(steps):
            groups, record, fresh = self.collector.collect(lambda name: nullcontext(), last=last and step == steps - 1)
            self.looked_at += fresh
            self.trained += groups
            self.records.append(record)
            if groups:
                self.batches.append(Batch.of(groups, self.fleet.version))
            self.fleet.sleep()
            if self.config.ahead:
                self.engine.decode_beside(TRAINING)
            self.fleet.version += 1
            self.fleet.wake(changed=True)
        return self


class Mortal(Slots):
    """Dies at its twentieth step, or when it gets weights, and comes back without work."""

    due, calls = "", 0

    def die(self, where):
        self.calls += where == "step"
        if where == self.due and self.calls >= 20:
            self.due = ""
            raise EngineDied("lost")

    def step(self):
        self.die("step")
        return super().step()

    def load_weights(self, weights):
        self.die("load")
        super().load_weights(weights)

    def restart(self, room):
        self.waiting, self.running, self.done = [], {}, {}


def ids(groups):
    return [group.id for group in groups]


def lengths(groups):
    return Counter(len(sample.tokens) for group in groups for sample in group.samples)


EARLY = [{"carry": True}, {"ahead": 1}]


@pytest.mark.parametrize("early", EARLY)
def test_the_trained_groups_and_their_lengths_are_those_without(early):
    """The passing groups in the order of their start, each with all that it would have: nothing is lost for its
    length, and the same lengths train at every time."""
    plain, run = Run()(40), Run(**early)(40)
    for one in (plain, run):
        assert ids(one.looked_at) == list(range(len(one.looked_at)))  # each once, in its turn
        assert ids(one.trained) == [group.id for group in one.looked_at if 0 < sum(group.outcomes) < SAMPLES][:640]
        assert one.records[0]["rollouts"] < one.records[-1]["rollouts"] == SAMPLES * len(one.looked_at)
        assert all(len(batch.prompts) == PROMPTS * SAMPLES for batch in one.batches)
    assert ids(run.trained) == ids(plain.trained) and lengths(run.trained) == lengths(plain.trained)
    for first in range(0, 640, 160):
        assert lengths(run.trained[first : first + 160]) == lengths(plain.trained[first : first + 160])
    assert sum(record["wasted"] for record in run.records) < 0.03 * SAMPLES * len(run.looked_at)


@pytest.mark.parametrize("early", EARLY)
def test_slots_stay_full_and_no_token_is_older_than_one_update(early):
    plain, run = Run()(40), Run(**early)(40)
    assert run.engine.now - TRAINING * 40 * run.config.ahead < 0.75 * plain.engine.now
    assert run.engine.idle / run.engine.now < 0.7 * plain.engine.idle / plain.engine.now
    ages = torch.cat([batch.age for batch in run.batches])
    assert set(ages.tolist()) == {0, 1}
    for batch, record in zip(run.batches, run.records, strict=True):
        assert record["token_age"] == pytest.approx(batch.age.float().mean().item())
        spans = [len(age.unique()) > 1 for age in batch.age.split(batch.cu_seqlens.diff().tolist())]
        assert record["carried"] == pytest.approx(sum(spans) / len(spans))
        assert not (batch.fresh & torch.tensor(spans)).any()
    assert sum(record["carried"] > 0 for record in run.records[1:]) > 5
    assert run.records[0]["carried"] == run.records[0]["token_age"] == 0


@pytest.mark.parametrize("early", EARLY)
def test_what_would_be_too_old_is_sampled_anew(early):
    """After a jump of the pass rate far too many are in work; none of them is left out, and none trains too late."""
    run = Run(lambda key: 0.1 if key < 300 else 0.9, **early, max_rounds=40)(14)
    assert ids(run.looked_at) == list(range(len(run.looked_at))) and len(run.trained) == 14 * PROMPTS
    assert ids(run.trained) == [group.id for group in run.looked_at if 0 < sum(group.outcomes) < SAMPLES]
    assert max(int(batch.age.max()) for batch in run.batches) == 1
    assert sum(record["wasted"] for record in run.records) > SAMPLES * PROMPTS


@pytest.mark.parametrize("early", EARLY)
def test_a_killed_run_loses_no_group_and_looks_at_none_twice(early):
    straight, killed = Run(**early)(9), Run(**early)(4)
    state = killed.collector.state_dict()
    assert len(state["started"]) >= PROMPTS
    resumed = Run(**early)
    resumed.collector.load_state_dict(state)
    assert resumed.collector.state_dict()["started"] == state["started"]
    resumed.fleet.wake(changed=True)
    resumed(5)
    assert ids(killed.trained) + ids(resumed.trained) == ids(straight.trained)
    assert ids(killed.looked_at) + ids(resumed.looked_at) == ids(straight.looked_at)
    assert [g.row for g in killed.looked_at + resumed.looked_at] == [g.row for g in straight.looked_at]
    assert resumed.batches[0].fresh.all()  # begun anew, with the weights of now
    plain = Run()  # the setting may change: what was in work is finished as well
    plain.collector.load_state_dict(state)
    plain.fleet.wake(changed=True)
    assert ids(plain(5).trained) == ids(resumed.trained)
    other = Run(**early)
    other.collector.load_state_dict(state, renewed=["data"])
    other.fleet.wake(changed=True)
    other(1)
    assert other.looked_at[0].id == state["started"][0][0]


@pytest.mark.parametrize("early", EARLY)
def test_an_engine_that_is_lost_redoes_its_unfinished_groups(early, monkeypatch):
    straight = Run(**early)(9)
    monkeypatch.setattr(sys.modules[__name__], "Slots", Mortal)
    run = Run(**early)
    for step in range(9):
        run.engine.due, run.engine.calls = ("step", "load")[step % 2], 0
        run(1)
        assert run.fleet.restarts == 1
        run.fleet.settled()
    assert ids(run.trained) == ids(straight.trained) and lengths(run.trained) == lengths(straight.trained)
    assert max(int(batch.age.max()) for batch in run.batches) == 1


@pytest.mark.parametrize("early", EARLY)
def test_the_last_step_starts_no_prompts_for_another_one(early):
    ended, going = Run(**early)(6, last=True), Run(**early)(6)
    assert ids(ended.trained) == ids(going.trained)
    assert len(ended.collector.started) < PROMPTS / 2 and len(going.collector.started) > PROMPTS


@pytest.mark.parametrize("early", EARLY)
def test_an_evaluation_finds_its_responses_among_groups_in_work(early):
    run = Run(**early)(3)
    working = set(run.collector.started)
    assert working
    groups = run.collector.greedy([{"prompt_ids": [i]} for i in range(5)])
    assert [(group.row, group.prompt, len(group.samples)) for group in groups] == [(i, (i,), 1) for i in range(5)]
    assert set(run.collector.started) == working
    assert ids(run(6).trained) == ids(Run(**early)(9).trained)


def test_max_rounds_bounds_what_a_step_looks_at():
    run = Run(lambda key: 0.0, carry=True, max_rounds=2)(3)
    assert ids(run.looked_at) == list(range(6 * PROMPTS)) and not run.trained


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["rollout.carry=true"],
            "rollout.carry=true needs an engine that keeps unfinished .*; set rollout.engine=vllm",
        ),
        (["rollout.ahead=1"], "rollout.ahead=1 needs an engine that keeps unfinished"),
        (["rollout.ahead=1", "rollout.engine=vllm", "rollout.max_age=0"], "rollout.max_age=0 forbids; set rollout.max"),
        (["rollout.ahead=2", "rollout.engine=vllm"], "rollout.ahead=2: input should be less than or equal to 1"),
    ],
)
def test_settings_that_do_not_go_together_are_one_sentence(overrides, words, configure):
    with pytest.raises(ValueError, match=words):
        configure(*overrides)


def test_a_step_ahead_needs_gpus_of_its_own(configure, monkeypatch):
    from prime_fast.preflight import load_inputs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ValueError, match="rollout.ahead=1 needs engines that work beside .* rollout.carry=true instead"
    ):
        load_inputs(configure("rollout.engine=vllm", "rollout.ahead=1"))
    load_inputs(configure("rollout.engine=vllm", "rollout.ahead=1", "rollout.vllm={gpus: [1]}"))
