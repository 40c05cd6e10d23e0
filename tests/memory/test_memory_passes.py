"""Activations and LM-head buffers of the plan against what autograd saves and what the ops allocate."""

import gc
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from prime_fast.config import LoraConfig
from prime_fast.engine import packing, recompute
from prime_fast.engine.lora import Adapter
from prime_fast.engine.model import PackedLM
from prime_fast.engine.recompute import Recompute
from prime_fast.memory import passes
from prime_fast.memory.shapes import shape
from prime_kernels import dispatch, linear_loss_triton

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


class Made(TorchDispatchMode):
    """Bytes of the storages that operators make besides those given, as long as anything keeps them."""

    def __init__(self, given):
        super().__init__()
        self.given, self.storages = {tensor.untyped_storage().data_ptr() for tensor in given}, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr(), storage.nbytes()] = StorageWeakRef(storage)
        return result

    @property
    def kept(self):
        return sum(size for (_, size), storage in self.storages.items() if not storage.expired())


class Most(Made):
    """The most that was kept at a time."""

    most = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(op, types, args, kwargs)
        self.most = max(self.most, self.kept)
        return result


def kept_bytes(model):
    """What the forward of a pack leaves behind for its backward, in autograd's graph or in Python; for each token."""
    rows = [torch.randint(0, 50, (40,)) for _ in range(2)]
    pack = packing.pack([0, 1], rows, [row[:31] for row in rows], [0, 31])
    given = [*model.parameters(), *model.buffers(), pack.input_ids, pack.position_ids, pack.predict]
    with Made(given) as made:
        loss = model(pack, lambda hidden, weight, bias: hidden.float().sum())
    gc.collect()
    return (made.kept - loss.nbytes) / len(pack.input_ids)


@pytest.mark.parametrize("mode", ["none", 1, 2, "attention-saved", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_saves(family, dtype, mode, tmp_path):
    lm, planned = model_of(family, tmp_path)
    recompute.enable(lm, mode, family)
    model = PackedLM(lm.to(dtype)).train()
    assert kept_bytes(model) == passes.saved(planned, dtype.itemsize, Recompute.fixed(mode, 3, family))


@pytest.mark.parametrize("mode", ["none", 1, "attention-saved"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_beside_an_adapter(family, mode, tmp_path):
    """Exact on all linear layers, and no less than it takes on some."""
    for targets in ("all-linear", ["v_proj", "up_proj"]):
        lm, planned = model_of(family, tmp_path)
        recompute.enable(lm, mode, family)
        model = PackedLM(lm.bfloat16()).train()
        Adapter(lm, "prm", family, LoraConfig(rank=5, targets=targets))
        ranks = 5 * (7 if targets == "all-linear" else len(targets))
        most = passes.saved(planned, 2, Recompute.fixed(mode, 3, family), ranks)
        kept = kept_bytes(model)
        assert kept == most if targets == "all-linear" else 0.5 * most < kept <= most


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
    long, short = (passes.head_buffers(seven, tokens, torch.bfloat16, True, backward, rows) for rows in (4097, 4096))
    ahead = 1024 * 152064 * 2 + 1024 * 3584 * 6  # prm_loss: dlogits of 1024 rows more
    assert short - made == (ahead if backward else 0) and long - short == (4 * seven.head if backward else 0)
    assert passes.head_buffers(planned, 8, torch.bfloat16, False, backward) >= 4 * planned.head  # a float32 weight


def test_the_prms_op_makes_what_is_counted(tmp_path, monkeypatch):
    """A buffer of dlogits, and for a sequence longer than a chunk a second float32 dW; the loss of prefixes needs
    neither."""
    _, planned = model_of("qwen2", tmp_path)
    monkeypatch.setenv("PRIME_KERNELS_CHUNK_ROWS", "64")
    shape, tokens = replace(planned, hidden=64, vocabulary=3000), 300
    counted = [passes.head_buffers(shape, tokens, torch.float32, False, True, longest) for longest in (60, 64, 65)]
    assert counted[0] == counted[1] == counted[2] - 4 * 64 * 3000
    counts = []
    for lengths, prefix in (([60] * 5, False), ([300], False), ([60] * 5, True), ([300], True)):
        hidden, weight = torch.randn(tokens, 64, requires_grad=True), torch.randn(3000, 64, requires_grad=True)
        numbers, cuts = torch.randn(tokens), torch.tensor([0, *lengths]).cumsum(0)
        row = torch.ones(len(lengths))
        implementation, grads = dispatch.resolve("linear_prm_loss", "cpu"), [True, True, False]
        with torch.no_grad(), Most([hidden, weight]) as made:
            implementation(
                hidden, weight, None, torch.zeros(tokens, dtype=torch.int64), numbers, row, cuts, row,
                None, beta=0.1, softcap=None, every_prefix=prefix, grads=grads,
            )  # fmt: skip
        counts.append(made.most)
    for count, longest in zip(counts, (60, 300, None, None), strict=True):
        want = passes.head_buffers(shape, tokens, torch.float32, False, True, longest)
        assert 0.95 * want <= count <= 1.05 * want, (want, count)
