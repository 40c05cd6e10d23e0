import pytest
import torch
from transformers import AutoModelForCausalLM

from prime_fast.config import load_config
from prime_fast.views import plan

SHAPE = "model.policy=configs/shapes/qwen2.5-math-7b"


@pytest.fixture
def published(monkeypatch):
    from pathlib import Path

    monkeypatch.chdir(Path(__file__).parents[2])

    def make(*overrides):
        return load_config("configs/eurus2-7b-8xa100.yaml", [SHAPE, *overrides])

    return make


def gib(items, name):
    return sum(item.gib for item in items if item.name.startswith(name))


def test_sharded_states_follow_the_arithmetic(published):
    """16 bytes per trained parameter and 2 per frozen one, over the ranks."""
    items = plan.memory_plan(published(), 8)
    billion = 7.615616512e9 / 2**30
    assert gib(items, "policy") == pytest.approx(16 * billion / 8)
    assert gib(items, "prm") == pytest.approx(16 * billion / 8)
    assert gib(items, "reference") == pytest.approx(2 * billion / 8)
    assert sum(item.gib for item in items) < 80


def test_outcome_only_plans_one_model(published):
    items = plan.memory_plan(published("prime.process_weight=0"), 8)
    assert gib(items, "prm") == gib(items, "reference") == 0


def test_offload_moves_the_states_off_the_gpu(published):
    items = plan.memory_plan(published("engine.offload=cpu"), 8)
    assert {item.place for item in items if "sharded" in item.name} == {"host memory"}
    assert {item.place for item in items if "sharded" not in item.name} == {"GPU"}


@pytest.mark.parametrize(
    ("overrides", "units"),
    [
        ([], 1 + 4 + 3 / 4 + 4),  # the first of four policy steps needs no pass of its own for the old log-probs
        (["model.gradient_checkpointing=false"], 1 + 3 + 3 / 4 + 3),
        (["rollout.old_logprobs=recompute"], 1 + 4 + 1 + 4),
        (["policy.mini_batch=1024"], 1 + 4 + 4),  # one policy step: its own forward is the old policy
        (["rollout.old_logprobs=engine"], 1 + 4 + 4),
        (["prime.update=before"], 1 + 4 + 1 + 3 / 4 + 4),
        (["prime.reference=policy"], 4 + 1 + 4),  # the policy's forward serves as reference and as old log-probs
        (["prime.process_weight=0"], 3 / 4 + 4),
    ],
)
def test_passes_per_step(overrides, units, published):
    passes = plan.passes_per_step(published(*overrides))
    assert sum(unit for _, rows, unit in passes if rows == "kept responses") == units


def test_parameters_are_counted_without_building_them(workspace):
    from prime_fast.data.models import model_config

    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    assert plan.parameter_count(model_config(str(workspace / "model"))) == sum(p.numel() for p in model.parameters())
    assert all(p.device == torch.device("cpu") for p in model.parameters())
