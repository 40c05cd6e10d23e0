"""One step of PrimeTrainer on given rows; as a program: `python trl_step.py MODEL PRM OUT [DEEPSPEED_CONFIG]`."""

import json
import random
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from prime_fast.engine.batch import Group, Sample
from prime_fast.integrations.trl import PrimeConfig, PrimeTrainer

GROUPS, K, EOS = 6, 4, 1


def rollouts() -> list[Group]:
    """Responses of 2 to 9 tokens, the last one EOS, with a mean outcome that differs between groups."""
    draw, torch_draw, groups = random.Random(5), torch.Generator().manual_seed(5), []
    for number in range(GROUPS):
        prompt = tuple(torch.randint(2, 18, (draw.randint(3, 8),), generator=torch_draw).tolist())
        rows = [torch.randint(2, 18, (draw.randint(1, 8),), generator=torch_draw) for _ in range(K)]
        samples = [Sample(torch.cat([row, torch.tensor([EOS])]), torch.zeros(len(row) + 1), False) for row in rows]
        outcomes = tuple(float(k <= number % 3) for k in range(K))
        groups.append(Group(number, number, prompt, tuple(samples), outcomes))
    return groups


def make(model: str, prm: str | None, out: Path, **options) -> PrimeTrainer:
    """A trainer that is handed those rows where it would sample."""
    groups = rollouts()

    def given(prompts, trainer):
        first = trainer.accelerator.process_index * len(prompts)
        rows = [(g.prompt, sample.tokens) for g in groups for sample in g.samples][first : first + len(prompts)]
        ids = {"prompt_ids": [list(prompt) for prompt, _ in rows], "completion_ids": [t.tolist() for _, t in rows]}
        outcomes = [o for g in groups for o in g.outcomes][first : first + len(prompts)]
        return ids | {"logprobs": None, "outcome": outcomes}

    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 6,
        "num_generations": K,
        "max_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "prm_learning_rate": 1e-3,
        "prm_batch_size": 12,
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
        train_dataset=Dataset.from_dict({"prompt": [str(group.id) for group in groups]}),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        prm_model=prm,
        rollout_func=given,
    )


def main(model: str, prm: str, out: str, deepspeed: str | None = None) -> None:
    trainer = make(
        model, prm, Path(out), deepspeed=deepspeed, per_device_train_batch_size=2, save_strategy="steps", save_steps=1
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        Path(out, "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(*sys.argv[1:])
