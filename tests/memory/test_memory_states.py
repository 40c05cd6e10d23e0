"""The plan of one engine against the tensors of a real one, byte by byte."""

import json
from pathlib import Path

import processes
import pytest
import torch
from engine_bytes import LORA

from prime_fast.config import EngineConfig, OptimizerConfig
from prime_fast.memory import states as planned
from prime_fast.memory.shapes import adapter, shape
from prime_fast.memory.states import States

PROGRAM = Path(__file__).with_name("engine_bytes.py")
SHAPES = Path(__file__).parents[2] / "configs" / "shapes"
CASES = [f"{dtype}:{offload}" for dtype in ("float32", "bfloat16") for offload in ("none", "cpu")]
SUMMED_IN_BFLOAT16 = "bfloat16:none:bf16"  # DeepSpeed's default
ADAPTER = ["bfloat16:none:lora", "bfloat16:cpu:lora"]
SPECIAL = [SUMMED_IN_BFLOAT16, *ADAPTER]


def states(path, dtype, offload="none", ranks=1, on_gpu=False, trained=True, lora=None):
    optimizer = OptimizerConfig(lr=1e-3) if trained else None
    engine, adapted = EngineConfig(offload=offload), adapter(str(path), "policy", lora)
    return States("policy", shape(str(path)), getattr(torch, dtype), ranks, engine, optimizer, on_gpu, adapted)


def sizes(items):
    return {item.name.removeprefix("policy: "): item.size for item in items}


@pytest.fixture(scope="module", params=[1, 2])
def held(request, workspace, tmp_path_factory):
    """(ranks, case -> bytes that a real engine holds after two steps)."""
    arguments = [workspace / "model", tmp_path_factory.mktemp("states"), *CASES, *SPECIAL]
    result = processes.torchrun(request.param, PROGRAM, *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(CASES) + len(SPECIAL)
    return request.param, {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("case", [*CASES, *SPECIAL])
def test_the_plan_is_what_deepspeed_holds(case, held, workspace, monkeypatch):
    ranks, found = held
    found = found[case]
    dtype, offload, *_ = case.split(":")
    if case == SUMMED_IN_BFLOAT16:
        monkeypatch.setattr(planned, "deepspeed_config", summing_in("bf16", planned.deepspeed_config))
    lora = LORA if case in ADAPTER else None
    plan = states(workspace / "model", dtype, offload, ranks, lora=lora)
    assert plan.training.count < plan.shape.count / 10 or not lora
    rest = sizes(plan.rest())
    for name in ("parameters", "float32 weights", "AdamW moments", "gradients"):
        assert rest[name] == found[name], name
    assert rest.get("float32 gradients", 0) == found["float32 gradients"]
    on_gpu = sizes(states(workspace / "model", dtype, ranks=ranks, on_gpu=True, lora=lora).rest())
    assert on_gpu["reduce bucket"] == found["reduce bucket"]  # on a CPU its untouched pages do not count
    if ranks > 1:
        assert sizes(plan.gathered())["gathered parameters"] == found["gathered parameters"]
    assert plan.stepping()[0].size >= found["gradient in the step"] == 4 * plan.sub_group
    rel = 0.2 if lora else 0.02  # names are long beside small tensors
    assert found["written"] == pytest.approx(plan.checkpoint_bytes() - plan.width * plan.whole.count, rel=rel)


def summing_in(name, config):
    return lambda *arguments: config(*arguments) | {"data_types": {"grad_accum_dtype": name}}


def test_partitions_are_padded_parameter_by_parameter(workspace):
    model = shape(str(workspace / "model"))
    counts = [count for _, count in model.parameters]
    assert model.partition(1) == model.count == sum(counts)
    assert model.partition(7) == sum((count + 6) // 7 for count in counts) > model.count / 7


@pytest.mark.parametrize(
    ("offload", "place"), [("none", "GPU"), ("cpu", "host"), ("disk", "disk")], ids=lambda value: value
)
def test_offloading_says_where_the_states_lie(offload, place, workspace):
    plan = states(workspace / "model", "bfloat16", offload, ranks=2, on_gpu=True)
    places = {item.name.removeprefix("policy: "): item.where for item in plan.rest()}
    assert {places[name] for name in ("parameters", "float32 weights", "AdamW moments")} == {place}
    assert places["reduce bucket"] == "GPU"
    assert sum(item.size for item in states(workspace / "model", "bfloat16", offload, trained=False).rest()) > 0


def test_pinned_memory_comes_in_powers_of_two():
    sevens = states(SHAPES / "qwen2.5-math-7b", "bfloat16", "cpu", 8, on_gpu=True)
    rest = sizes(sevens.rest())
    assert rest["parameters"] == 2 << 30 and rest["float32 gradients"] == 4 << 30  # of 1.77 and 3.55 GiB
    assert rest["AdamW moments"] == 8 * sevens.partition  # never pinned


def test_a_frozen_engine_holds_its_parameters_alone(workspace):
    plan = states(workspace / "model", "bfloat16", trained=False)
    assert sizes(plan.rest()) == {"parameters": 2 * plan.shape.count}
    assert plan.checkpoint_bytes() == 0


def test_a_large_model_steps_one_group_after_another():
    """1.54 B parameters on one rank, in groups of at least 1e9: the float32 gradient never has all of them."""
    plan = states(SHAPES / "qwen2.5-1.5b", "bfloat16", on_gpu=True)
    assert len(plan.sub_groups) == 2 and sum(plan.sub_groups) == plan.shape.count
    assert 1e9 <= plan.sub_group < 1.3e9
    assert len(states(SHAPES / "qwen2.5-math-7b", "bfloat16", ranks=8).sub_groups) == 1
