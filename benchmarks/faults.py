"""A training run with a fault that no setting gives.

    python -m benchmarks.faults FAULT train CONFIG key=value ...

The first argument names one of FAULTS; the rest is a command line of prime-fast.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import deepspeed

from prime_fast import cli
from prime_fast.rollout.hf import HFEngine
from prime_fast.trainer import Trainer

DAMAGED_STEP, DAMAGE = 14, 1e4


def stale_engine() -> None:
    """No new weights reach the rollout engine."""
    HFEngine.load_weights = lambda self, weights: None


def damaged_weight() -> None:
    """Memory fails: one number of the PRM's LM head is another, until the optimizer writes it anew."""
    step = Trainer.step

    def damage(self: Trainer, number: int) -> dict:
        if number == DAMAGED_STEP:
            weight = self.learner.prm.lm.get_output_embeddings().weight
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                weight.data[-1, 0] = DAMAGE
        return step(self, number)

    Trainer.step = damage


FAULTS: dict[str, Callable[[], None]] = {"stale-engine": stale_engine, "damaged-weight": damaged_weight}


def main() -> int:
    fault, *command = sys.argv[1:]
    FAULTS[fault]()
    return cli.main(command)


if __name__ == "__main__":
    sys.exit(main())
