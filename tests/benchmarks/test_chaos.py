"""The short part of `python -m benchmarks.chaos`: a handful of its events, on one tiny run."""

import pytest

from benchmarks.chaos.__main__ import Chaos
from benchmarks.chaos.events import PHASES, Event, events
from benchmarks.chaos.victim import Plan

EVENTS = {
    "amid a response": Plan("kill", phase="generate", nth=4, fraction=0.5, seconds=0.1),
    "after the PRM": Plan("kill", phase="policy", nth=2),
    "amid a checkpoint": Plan("kill", change=True, nth=30),
    "amid a line of metrics": Plan("tear", opens=r"metrics\.jsonl$", nth=2, keep_bytes=40),
    "a worker of the reward": Plan("kill worker", phase="reward", nth=2),
}


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    return Chaos(tmp_path_factory.mktemp("chaos"), seconds=240, seed=0)


@pytest.mark.parametrize("name", EVENTS)
def test_the_same_bits_after(name, chaos):
    told = chaos.suffer(Event(name, EVENTS[name]))
    assert told["hit"] and told["fine"] and told["same_bits"], told
    assert (told["codes"] == [0]) == ("worker" in name), told


def test_the_whole_of_it_hits_every_phase():
    every = list(events(0, 20.0))
    assert [event.plan for event in every] == [event.plan for event in events(0, 20.0)]
    killed = [event.plan.phase for event in every if event.kind == "kill the trainer" and event.engine == "hf"]
    assert len(every) > 80 and all(killed.count(phase) == 2 for phase in PHASES)
