"""Activations and LM-head buffers of the plan against what autograd saves and what the ops allocate."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from prime_fast.engine import packing
from prime_fast.engine.model import PackedLM
from prime_fast.memory import passes
from prime_fast.memory.shapes import shape
from prime_kernels import linear_loss_triton

FAMILIES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


def model_of(family, tmp_path, **changes):
    config = FAMILIES[family](
        hidden_size=96,
        intermediate_size=200,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=3,
        vocab_size=50,
        sliding_window=None,
        **{"tie_word_embeddings": True} | changes,
    )
    config.save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_config(config), shape(str(tmp_path))


def saved_bytes(model, pack):
    """Storages that autograd keeps of a forward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(pack, lambda hidden, weight, bias: hidden.float().sum())
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["every layer kept", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_saves(family, dtype, checkpointing, tmp_path):
    lm, planned = model_of(family, tmp_path)
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    model = PackedLM(lm.to(dtype)).train()
    rows = [torch.randint(0, 50, (40,)) for _ in range(2)]
    pack = packing.pack([0, 1], rows, [row[:31] for row in rows], [0, 31])
    tokens = len(pack.input_ids)
    indices = pack.input_ids.nbytes + pack.predict.nbytes
    assert saved_bytes(model, pack) - indices == tokens * passes.saved(planned, dtype.itemsize, checkpointing)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_counted_once(tied, tmp_path):
    lm, planned = model_of("qwen2", tmp_path, tie_word_embeddings=tied)
    assert planned.count == sum(p.numel() for p in lm.parameters())
    assert planned.tied == tied and planned.head == 50 * 96
    assert {name: count for name, count in planned.parameters} == {n: p.numel() for n, p in lm.named_parameters()}


def test_vllm_joins_projections(tmp_path):
    lm, planned = model_of("qwen2", tmp_path)
    joined = planned.vllm_tensors
    assert sum(joined) == planned.count
    layer = lm.model.layers[0]
    parts = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    assert joined.count(sum(part.weight.numel() for part in parts)) == 3
    assert joined.count(2 * layer.mlp.gate_proj.weight.numel()) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_the_kernels_own_row_counts(dtype):
    hidden = torch.empty(8, 96, dtype=dtype, device="meta")
    mine, theirs = passes.GPURows(hidden), linear_loss_triton.Rows(hidden, hidden, None, 1.0, None)
    assert all(getattr(mine, name) == getattr(theirs, name) for name in ("operand", "chunk_rows", "logit_rows"))
    assert mine.padded(5) == theirs.padded(5)


@pytest.mark.parametrize("backward", [False, True])
def test_head_buffers_are_counted_from_the_op(backward, tmp_path):
    """On a GPU at 7B: 1024 rows of float32 logits, 4096 of bfloat16 dlogits, a float32 dW and a bfloat16 dX."""
    _, planned = model_of("qwen2", tmp_path)
    seven = replace(planned, hidden=3584, vocabulary=152064)
    tokens = 16384
    logits, dlogits = 1024 * 152064 * 4, 4096 * 152064 * 2
    made = passes.head_buffers(seven, tokens, torch.bfloat16, True, backward)
    expected = logits + (dlogits + 4 * seven.head + 2 * tokens * 3584 + 4096 * 3584 * 6 if backward else 0)
    assert made == expected
    assert passes.head_buffers(planned, 8, torch.bfloat16, False, backward) >= 4 * planned.head  # a float32 weight
