"""Kernels in the place of elementwise chains: the same model, per layer and whole."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from prime_fast.engine import layers

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 50, "head_dim": 8, "pad_token_id": 0}
STANDARD = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Granite")


def make(name, **changes):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**SIZES | changes))
    with torch.no_grad():  # norms' weights are 1, which hides whether they scale at all
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return lm


def outputs(lm):
    """Logits, and every parameter's gradient."""
    tokens = torch.arange(14).view(2, 7) * 3 % 50
    logits = lm(tokens).logits
    lm.zero_grad()
    logits.square().sum().backward()
    return [logits.detach(), *(parameter.grad for parameter in lm.parameters())]


@pytest.mark.parametrize("name", STANDARD)
def test_norms_are_the_same_to_the_bit(name):
    lm = make(name)
    before = outputs(lm)
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in lm.modules())
    assert layers.fuse_norms(lm) == norms >= 5
    assert all(torch.equal(x, y) for x, y in zip(before, outputs(lm), strict=True))


@pytest.mark.parametrize("name", ["Gemma", "Gemma2"])
def test_a_norm_that_scales_otherwise_keeps_its_own_code(name):
    lm = make(name)
    before = outputs(lm)
    assert layers.fuse_norms(lm) == 0 and layers.fuse_mlps(lm, F.mul if hasattr(F, "mul") else torch.mul) == 0
    assert all(torch.equal(x, y) for x, y in zip(before, outputs(lm), strict=True))


def test_bfloat16_norms_stray_less_from_float32_than_those_of_transformers():
    lm = make("Llama").model.norm
    x = torch.randn(100, 32)
    exact = lm(x)
    lm.to(torch.bfloat16)
    before = (lm(x.bfloat16()) - exact).abs().mean()
    assert layers.fuse_norms(lm) == 1
    assert (lm(x.bfloat16()) - exact).abs().mean() < before


@pytest.mark.parametrize("name", STANDARD)
def test_rope_and_swiglu_are_found(name, monkeypatch):
    """With torch's own arithmetic in the place of the kernels."""
    lm = make(name)
    before = outputs(lm)
    calls = []

    def silu_mul(gate, up):
        calls.append("swiglu")
        return F.silu(gate) * up

    def rope(q, k, cos, sin):
        calls.append("rope")
        cos, sin = cos[:, None], sin[:, None]
        return [x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (q, k)]

    file = sys.modules[type(lm).__module__]
    monkeypatch.setattr(file, layers.ROPE, getattr(file, layers.ROPE))  # to be put back
    assert layers.fuse_mlps(lm, silu_mul) == 2 and layers.fuse_rope(lm, rope) == 1
    assert all(torch.equal(x, y) for x, y in zip(before, outputs(lm), strict=True))
    assert calls.count("swiglu") == 2 and calls.count("rope") in (1, 2)  # SmolLM3 has layers without
    assert layers.fuse_rope(make(name), rope) == 1  # a second model of the architecture


def test_what_each_setting_takes(monkeypatch):
    lm, gpu = make("Llama"), torch.device("cuda")
    assert layers.fuse(lm, "hf", gpu) == layers.fuse(lm, "auto", CPU) == []
    with pytest.raises(ValueError, match="model.layers=fused needs a GPU"):
        layers.fuse(lm, "fused", CPU)
    assert layers.fuse(lm, "auto", gpu) == ["rms_norm"]
    monkeypatch.setattr(layers, "liger", lambda device: (lambda *_: None, torch.mul))
    with pytest.raises(ValueError, match="knows no rms_norm and no swiglu in gemma models"):
        monkeypatch.setattr(layers, "fuse_rope", lambda *_: 1)
        layers.fuse(make("Gemma"), "fused", gpu)


LIGER = """
import torch
from liger_kernel.transformers.rope import liger_rotary_pos_emb
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

torch.manual_seed(0)
for heads, kv, tokens, size in ((4, 2, 7, 8), (14, 2, 33, 64)):
    q, k = torch.randn(1, tokens, heads, size).transpose(1, 2), torch.randn(1, tokens, kv, size).transpose(1, 2)
    angle = torch.randn(1, tokens, size // 2).repeat(1, 1, 2)
    results = []
    for rope in (apply_rotary_pos_emb, liger_rotary_pos_emb):
        inputs = q.clone().requires_grad_(), k.clone().requires_grad_()
        out = rope(inputs[0] * 1, inputs[1] * 1, angle.cos(), angle.sin())
        upstream = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in out]
        results.append([*out, *torch.autograd.grad(out, inputs, upstream)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
print("rope agrees")
"""


def test_ligers_rope_is_that_of_transformers_in_tritons_interpreter():
    pytest.importorskip("liger_kernel")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", LIGER], capture_output=True, text=True, env=environment, timeout=300)
    assert "rope agrees" in result.stdout, result.stderr[-2000:]
