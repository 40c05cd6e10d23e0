"""The plan beside the measurement, in a real run."""

from pathlib import Path

import pytest

from prime_fast import preflight
from prime_fast.memory import measured
from prime_fast.memory.plan import Plan
from prime_fast.trainer import Trainer


def test_only_what_exceeds_its_plan_is_said():
    record = {"memory/policy": 12.0, "memory_plan/policy": 10.0, "memory/sync": 10.9, "memory_plan/sync": 10.0}
    record |= {"memory/prm": 0.4, "memory_plan/prm": 0.1, "memory_plan/checkpoint": 1.0, "seconds": 3.0}
    (sentence,) = measured.beyond(record)
    assert sentence.startswith("memory: policy took 12.0 GiB at its peak, 20% more than the 10.0 GiB that were planned")


@pytest.mark.parametrize("overrides", [[], ["prime.process_weight=0"], ["rollout.old_logprobs=engine"]], ids=str)
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
