"""The plan beside the measurement, in a real run."""

from pathlib import Path

import pytest

from prime_fast import learner, preflight, trainer
from prime_fast.memory import measured
from prime_fast.memory.advice import card_bytes
from prime_fast.memory.plan import Plan
from prime_fast.trainer import Trainer


def test_only_what_exceeds_its_plan_is_said():
    record = {"memory/policy": 12.0, "memory_plan/policy": 10.0, "memory/sync": 10.9, "memory_plan/sync": 10.0}
    record |= {"memory/prm": 0.4, "memory_plan/prm": 0.1, "memory_plan/checkpoint": 1.0, "seconds": 3.0}
    (sentence,) = measured.beyond(record)
    assert sentence.startswith("memory: policy took 12.0 GiB at its peak, 20% more than the 10.0 GiB that were planned")


@pytest.mark.parametrize(
    "overrides", [[], ["prime.process_weight=0"], ["rollout.old_logprobs=engine", "prm.lora={}"]], ids=str
)
def test_every_phase_that_was_planned_is_one_that_the_trainer_times(overrides, configure, device):
    """So that no comparison is lost to a name; load and resume come before the stopwatch."""
    config = configure(*overrides)
    Path(config.run_dir).mkdir()
    trainer = Trainer(config, device, preflight.load_inputs(config))
    trainer.step(1)
    trainer.save(1)
    record = measured.beside(trainer.phases.memory(), trainer.planned_memory)
    trainer.close()
    expected = set(Plan(config, 1, on_gpu=False).trainer_peaks()) - {"load", "resume"}
    assert {name.removeprefix(measured.PLANNED) for name in record if name.startswith(measured.PLANNED)} == expected
    assert all(record[measured.MEASURED + phase] > 0 for phase in expected)


class Started(Exception):
    pass


def test_the_trainer_does_what_the_plan_of_its_card_says(configure, workspace, device, monkeypatch):
    """Up to the engine's start, which needs a GPU."""
    frozen = ("prime.update=none", f"model.prm={workspace / 'model'}")
    config = configure("rollout.engine=vllm", "model.recompute=1", *frozen)
    Path(config.run_dir).mkdir()
    plan, made = Plan(config, 1, card_bytes("a100-80")), []

    def start(given, *_):
        assert given.rollout.vllm == {"gpu_memory_utilization": plan.rollout.utilization}
        assert given.rollout.vllm["gpu_memory_utilization"] == 0.9 and config.rollout.vllm == {}
        assert [engine.role for engine in made if engine.parking and engine.parking.parked] == ["policy"]
        raise Started

    engine = learner.Engine
    monkeypatch.setattr(learner, "Engine", lambda *given: made.append(engine(*given)) or made[-1])
    monkeypatch.setattr(measured, "plan", lambda *_: plan)
    monkeypatch.setattr(trainer, "make_engine", start)
    with pytest.raises(Started):
        Trainer(config, device, preflight.load_inputs(config))
    recomputed = [sum(layer.gradient_checkpointing for layer in engine.lm.model.layers) for engine in made]
    assert recomputed == [1, 0, 0]  # what is frozen has no backward


def test_a_plan_of_this_machine(configure, device):
    plan = measured.plan(configure(), device)
    assert (plan.ranks, plan.card, plan.on_gpu, plan.place) == (1, None, False, "host")
