import math

import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from transformers import get_linear_schedule_with_warmup as get_linear_schedule

from prime_fast.config import OptimizerConfig
from prime_fast.schedule import learning_rate

THEIRS = {
    "constant": lambda optimizer, warmup, steps: get_constant_schedule_with_warmup(optimizer, warmup),
    "linear": get_linear_schedule,
    "cosine": get_cosine_schedule_with_warmup,
}


@pytest.mark.parametrize("schedule", THEIRS)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 200])
def test_the_rates_are_those_of_transformers_without_its_first_step_at_zero(schedule, warmup, steps):
    config = OptimizerConfig(lr=3e-4, warmup=warmup, schedule=schedule)
    ours = [learning_rate(config, step, steps) for step in range(1, steps + 1)]
    full = max(1, round(warmup * steps))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    scheduler = THEIRS[schedule](optimizer, full, steps + 1)  # its step 0 is the one at zero, which we do not make
    theirs = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        theirs.append(scheduler.get_last_lr()[0])
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert ours[full - 1] == 3e-4 and all(rate > 0 and math.isfinite(rate) for rate in ours)


def test_a_run_made_longer_never_has_a_negative_rate():
    config = OptimizerConfig(lr=1.0, warmup=0.1, schedule="linear")
    assert all(0 <= learning_rate(config, step, 10) <= 1 for step in range(1, 100))
