"""Learning rates as functions of the step alone, so that a resumed run needs no scheduler's state."""

from __future__ import annotations

import math

from prime_fast.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of `step` (1 to `steps`), the same for all optimizer steps in it.

    It rises linearly to config.lr over the first config.warmup * steps steps, of which the first is not at 0, and goes
    on by config.schedule: constant; linear or cosine, which reach 0 with the step after the last.
    """
    warmup = round(config.warmup * steps)
    if step <= warmup:
        return config.lr * step / (warmup + 1)
    done = (step - 1 - warmup) / (steps - warmup)  # 0 at the first step at full rate
    if config.schedule == "linear":
        return config.lr * max(0.0, 1 - done)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * min(1.0, done))) / 2
    return config.lr
