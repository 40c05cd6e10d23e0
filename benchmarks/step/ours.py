"""(a) ours: the trainer's own step, from the batch on, on its own ZeRO-3 engines; and what sampling the rows costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.step.workload import K, dtype_of, micro_tokens, prompt_room
from prime_fast.config import Config
from prime_fast.engine import zero
from prime_fast.engine.batch import Batch, Group
from prime_fast.learner import Learner, Work
from prime_fast.memory import measured
from prime_fast.metrics import Phases

STEP = 2  # its number: the first one also checks that every parameter trains


def configuration(settings: dict[str, Any], *, prm: bool) -> Config:
    folder, rows, longest = Path(settings["folder"]), settings["rows"], settings["longest"]
    return Config(
        run_dir=str(folder / "run"),
        model={
            "policy": str(folder / "policy"),
            "prm": str(folder / "prm"),
            "recompute": "all" if settings["checkpointing"] else "none",
        },
        data={"max_prompt": prompt_room(longest)},
        rollout={"prompts": rows // K, "samples": K, "max_response": longest, "batch": rows},
        reward={"function": "prime_fast.stages.quickstart:compute_score"},  # never called
        prime={"process_weight": 1.0 if prm else 0.0, "whiten": settings["whiten"]},
        # the published mean: over rows, of the mean over a row's tokens (its micro-batches hold one row)
        policy={"mini_batch": rows // settings["updates"], "lr": 0.0, "mean": "row"},
        prm={"mini_batch": rows // settings["updates"], "lr": 0.0},
        engine={"micro_tokens": micro_tokens(settings)},
        log={"eval_every": 0, "checkpoint_every": 0},
    )


class Ours:
    def __init__(self, settings: dict[str, Any], algorithm: str) -> None:
        config, device = configuration(settings, prm=algorithm == "PRIME"), zero.start()
        self.learner = Learner(config, measured.plan(config, device), device, None, Phases())

    def step(self, groups: list[Group]) -> tuple[Phases, dict[str, float]]:
        phases = self.learner.phases = Phases()
        work = Work(STEP, stream=self.learner.stream_of(STEP, groups))
        if failure := self.learner.learn(work, Batch.of(groups)):
            raise RuntimeError(failure)
        return phases, {key: work.record[key] for key in COMPARED if key in work.record}

    def close(self) -> None:
        """Nothing runs elsewhere."""


COMPARED = ("prm_loss", "prm_grad_norm", "policy_loss", "policy_grad_norm")


class Rollouts:
    """Samples rows of the same prompts and lengths with our vLLM engine, awake all the time."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import vllm  # noqa: F401  says at once, and in its own words, that it is missing

        from prime_fast.rollout import make_engine

        config = configuration(settings, prm=False)
        config.rollout.engine = "vllm"
        device, dtype = zero.start(), dtype_of(settings["device"])
        self.engine = make_engine(config, config.model.policy, (), dtype, device, trains=False)

    def step(self, groups: list[Group]) -> tuple[Phases, dict[str, float]]:
        from prime_fast.rollout import Request

        phases = Phases()
        rows = [(group.prompt, sample) for group in groups for sample in group.samples]
        with phases("rollouts"):
            for row, (prompt, sample) in enumerate(rows):
                self.engine.submit(Request(row, prompt, [row], len(sample.tokens), 1.0))
            finished: dict[int, list] = {}
            while len(finished) < len(rows):
                finished.update(self.engine.step())
        made = torch.tensor([len(finished[row][0].tokens) for row in range(len(rows))])
        if made.tolist() != [len(sample.tokens) for _, sample in rows]:
            raise RuntimeError("the rollout engine ended responses early")
        return phases, {}

    def close(self) -> None:
        self.engine.close()
