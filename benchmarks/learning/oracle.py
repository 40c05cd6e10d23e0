"""A training run whose PRM is replaced by the true labels of the steps: what its credit form gives at best.

    python -m benchmarks.learning.oracle prime_fast.stages.quickstart train CONFIG key=value ...

The first argument is the task's module, whose `step_labels` are taken; the rest is a command line of prime-fast, with
prime.update=none. Where a step's result stands, beta * log-ratio is RIGHT or WRONG; it is 0 elsewhere. All that
follows, from calibration to the policy's update, is the trainer's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from unittest import mock

import torch
from torch import Tensor

from prime_fast import cli, learner, stream
from prime_fast.engine.batch import Group
from prime_fast.stages.quickstart import CHARACTERS

# As log-odds of success move: one error decides, a right step adds a little. With 1 and -1 the sum rises along every
# response, and a value that is linear in it explains nothing (measured: 1 - Var(R - B) / Var(R - b) is -0.2, not 0.4)
RIGHT, WRONG = 0.1, -1.0
Labels = Callable[[str, str], list[tuple[int, bool]]]


def label_rewards(group: Group, step_labels: Labels) -> list[Tensor]:
    """(L,) of each response: RIGHT or WRONG where a step ends, 0 elsewhere."""
    prompt, rewards = text(group.prompt), []
    for sample in group.samples:
        reward = torch.zeros(len(sample.tokens))
        for position, right in step_labels(prompt, text(sample.tokens)):
            reward[position] = RIGHT if right else WRONG
        rewards.append(reward)
    return rewards


def text(tokens) -> str:
    return "".join(CHARACTERS[int(token)] for token in tokens)


def labelled(step_labels: Labels) -> type[stream.Stream]:
    """A Stream whose PRM knows the labels."""

    class Labelled(stream.Stream):
        def __init__(self, what: stream.Passes, *arguments, **options) -> None:
            if what.prm is None or what.prm.trains:
                raise ValueError("labels take the place of a PRM that does not train; set prime.update=none")
            super().__init__(what, *arguments, **options)
            self.rewards: list[Tensor] = []

        def put(self, group: Group) -> None:
            super().put(group)
            self.rewards += label_rewards(group, step_labels)

        def finish(self, *others) -> stream.Scored:
            scored = super().finish(*others)
            reference = scored.ref_logprob[1.0]
            ratio = torch.cat(self.rewards).to(reference) / self.what.beta
            score = torch.stack([reward.sum() for reward in self.rewards]).to(reference)
            return scored._replace(logprob=reference + ratio, score=score)

    return Labelled


def main() -> int:
    module, *command = sys.argv[1:]
    with mock.patch.object(learner, "Stream", labelled(import_module(module).step_labels)):
        return cli.main(command)


if __name__ == "__main__":
    sys.exit(main())
