"""One step of PrimeTrainer on given rows; `python trl_step.py MODEL PRM OUT GROUPS` makes it on ranks under ZeRO-3."""

import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from prime_fast.engine.batch import Group, Sample
from prime_fast.integrations.trl import PrimeConfig, PrimeTrainer

K, EOS = 4, 1


def rollouts(count: int) -> list[Group]:
    """Responses of 2 to 9 tokens, the last one EOS, with a mean outcome that differs between groups."""
    draw, torch_draw, groups = random.Random(5), torch.Generator().manual_seed(5), []
    for number in range(count):
        prompt = tuple(torch.randint(2, 18, (draw.randint(3, 8),), generator=torch_draw).tolist())
        rows = [torch.randint(2, 18, (draw.randint(1, 8),), generator=torch_draw) for _ in range(K)]
        samples = [Sample(torch.cat([row, torch.tensor([EOS])]), torch.zeros(len(row) + 1), False) for row in rows]
        outcomes = tuple(float(k <= number % 3) for k in range(K))
        groups.append(Group(number, number, prompt, tuple(samples), outcomes))
    return groups


def prompts(groups: list[Group]) -> Dataset:
    return Dataset.from_dict({"prompt": [str(group.id) for group in groups]})


def make(
    model: str, prm: str | None, out: Path, groups: list[Group], peft_config: Any = None, **options
) -> PrimeTrainer:
    """A trainer that is handed those rows where it would sample."""

    def given(asked, trainer):
        first = trainer.accelerator.process_index * len(asked)
        rows = [(g.prompt, sample.tokens) for g in groups for sample in g.samples][first : first + len(asked)]
        ids = {"prompt_ids": [list(prompt) for prompt, _ in rows], "completion_ids": [t.tolist() for _, t in rows]}
        outcomes = [o for g in groups for o in g.outcomes][first : first + len(asked)]
        return ids | {"logprobs": None, "outcome": outcomes}

    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": len(groups),
        "num_generations": K,
        "max_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "prm_learning_rate": 1e-4,
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return PrimeTrainer(
        model=model,
        reward_funcs=lambda outcome, **_: outcome,
        args=PrimeConfig(**settings | options),
        train_dataset=prompts(groups),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=peft_config,
        prm_model=prm,
        rollout_func=given,
    )


def main(model: str, prm: str, out: str, groups: int) -> None:
    from prime_fast.engine.zero import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled
    settings = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}
    settings |= {name: "auto" for name in ("train_micro_batch_size_per_gpu", "gradient_clipping")}
    settings["gradient_accumulation_steps"] = "auto"
    rows = K // int(os.environ["WORLD_SIZE"])
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = make(
        model, prm, Path(out), rollouts(groups), per_device_train_batch_size=rows, deepspeed=settings, **saving
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
