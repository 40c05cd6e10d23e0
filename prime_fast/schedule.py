"""Learning rates as functions of the step alone, so that a resumed run needs no scheduler's state."""

from __future__ import annotations

import math

from prime_fast.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of `step` (1 to `steps`), the same for all optimizer steps in it.

    It rises linearly over the first config.warmup * steps steps, from lr / their number to lr, and goes on by
    config.schedule: constant; linear or cosine, which would reach 0 with the step after the last.
    """
    full = max(1, round(config.warmup * steps))  # the first step at config.lr
    if step < full:
        return config.lr * step / full
    done = min(1.0, (step - full) / (steps + 1 - full))
    if config.schedule == "linear":
        return config.lr * (1 - done)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    return config.lr
