from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:  # tests of the kernels run where the trainer's packages are missing
    from prime_fast.config import Config

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is on the hub, and without a network each try takes 23 s

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info):
    return float(sum(map(ord, solution_str)) % 3 == 0)
"""


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A tiny random model with its tokenizer, rows whose outcome is a coin flip, and a config for them."""
    from prime_fast.stages.quickstart import write_model

    root = tmp_path_factory.mktemp("workspace")
    torch.manual_seed(0)
    write_model(root / "model", seed=4)
    rng = random.Random(0)
    with open(root / "rows.jsonl", "w") as file:
        for index in range(40):
            prompt = "".join(rng.choice("0123456789+-*") for _ in range(rng.randint(3, 10))) + ":"
            row = {
                "data_source": "test",
                "prompt": [{"role": "user", "content": prompt}],
                "ability": "test",
                "reward_model": {"style": "rule", "ground_truth": "1"},
                "extra_info": {"index": index, "solution": f"{index}+1={index + 1}"},
            }
            file.write(json.dumps(row) + "\n")
    (root / "reward.py").write_text(REWARD)
    (root / "config.yaml").write_text(
        f"""
run_dir: {root}/unset
steps: 2
model: {{policy: {root}/model, dtype: float32}}
data: {{train: {root}/rows.jsonl, eval: {root}/rows.jsonl, eval_rows: 8, max_prompt: 16}}
rollout: {{prompts: 6, samples: 4, max_response: 12, keep: [0.1, 0.9], batch: 64}}
reward: {{function: "{root}/reward.py:compute_score"}}
policy: {{lr: 1.0e-3, mini_batch: 12}}
prm: {{lr: 1.0e-3, mini_batch: 12}}
engine: {{micro_tokens: 120}}
log: {{eval_every: 2, checkpoint_every: 0}}
sft: {{data: {root}/rows.jsonl, steps: 2, mini_batch: 4}}
"""
    )
    return root


@pytest.fixture
def configure(workspace, tmp_path):
    from prime_fast.config import load_config

    def make(*overrides: str, run_dir: str = "run") -> Config:
        return load_config(workspace / "config.yaml", [f"run_dir={tmp_path / run_dir}", *overrides])

    return make


@pytest.fixture(scope="session")
def other_prm(workspace) -> str:
    """The setting for a PRM that is not its reference."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(workspace / "model").save_pretrained(workspace / "prm")
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    model.save_pretrained(workspace / "prm")
    return f"model.prm={workspace / 'prm'}"


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Of bytes: tokens of several characters, and characters of several tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(["so 12 + 30 = 42, and 42 + 8 = 50", "Ω = 3 → 4 ÷ 2 = 2", "one"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


@pytest.fixture(scope="session")
def device() -> torch.device:
    from prime_fast.engine import zero

    return zero.start()
