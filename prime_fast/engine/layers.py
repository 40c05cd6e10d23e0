"""Kernels in the place of a transformers model's elementwise chains: RMSNorm from torch, RoPE and SwiGLU from Liger.

A chain is replaced where it computes what the kernel computes, which is found out with random numbers: a norm that
scales by 1 + weight, or an MLP of another activation, keeps its own code. Float32 norms are the same to the bit; in
bfloat16 torch's rounds once, where transformers' rounds before it scales too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType, ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE = "apply_rotary_pos_emb"  # what modeling files call it
SIZE, HEADS = 8, 2  # of the random numbers


def fuse(lm: nn.Module, layers: str, device: torch.device) -> list[str]:
    """Replace in `lm` what `layers` (model.layers) asks for; returns the names of the kinds that were: rms_norm, rope,
    swiglu. "auto" is RMSNorm on a GPU alone, "fused" all three, "hf" nothing.

    RoPE is replaced for all models of that architecture in this process. Raises ValueError for "fused" without a GPU or
    Liger, or where the model has none of a kind.
    """
    if layers == "hf" or (layers == "auto" and device.type != "cuda"):
        return []
    if layers == "auto":
        return ["rms_norm"] * (fuse_norms(lm) > 0)
    rope, swiglu = liger(device)
    found = {"rms_norm": fuse_norms(lm), "rope": fuse_rope(lm, rope), "swiglu": fuse_mlps(lm, swiglu)}
    if missing := [kind for kind, count in found.items() if not count]:
        raise ValueError(
            f"model.layers=fused knows no {' and no '.join(missing)} in {lm.config.model_type} models; "
            "set model.layers=auto, which takes what there is"
        )
    return list(found)


def liger(device: torch.device) -> tuple[Callable, Callable]:
    """Its RoPE, and its SiLU(gate) * up."""
    if device.type != "cuda":
        raise ValueError("model.layers=fused needs a GPU, for its kernels are Triton's; set model.layers=auto")
    try:
        from liger_kernel.ops import LigerSiLUMulFunction
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except ImportError as error:
        raise ValueError(
            "model.layers=fused needs liger-kernel 0.8.5 or newer: pip install 'prime-fast[fused]', or set "
            "model.layers=auto"
        ) from error
    return liger_rotary_pos_emb, lambda gate, up: LigerSiLUMulFunction.apply(gate, up, 1.0, 1.0)


def fuse_norms(lm: nn.Module) -> int:
    """How many RMSNorms are torch's from now on."""
    norms = [module for module in lm.modules() if _is_rms_norm(module)]
    for norm in norms:
        norm.forward = MethodType(_rms_norm, norm)
    return len(norms)


def fuse_mlps(lm: nn.Module, silu_mul: Callable[[Tensor, Tensor], Tensor]) -> int:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))

    mlps = [module for module in lm.modules() if _is_swiglu(module)]
    for mlp in mlps:
        mlp.forward = MethodType(forward, mlp)
    return len(mlps)


def fuse_rope(lm: nn.Module, rope: Callable) -> int:
    files = {sys.modules[type(module).__module__] for module in lm.modules()}
    files = [file for file in files if _has_rope(file, rope)]
    for file in files:
        setattr(file, ROPE, rope)
    return len(files)


def _rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _is_rms_norm(module: nn.Module) -> bool:
    if not hasattr(module, "variance_epsilon"):
        return False
    probe = SimpleNamespace(weight=_random(SIZE), variance_epsilon=module.variance_epsilon)
    x = _random(3, SIZE)
    return _agrees(lambda: type(module).forward(probe, x), _rms_norm(probe, x))


def _is_swiglu(module: nn.Module) -> bool:
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    gate, up, x = _random(SIZE, SIZE), _random(SIZE, SIZE), _random(3, SIZE)
    parts = {"gate_proj": lambda y: y @ gate, "up_proj": lambda y: y @ up, "down_proj": lambda y: y}
    probe = SimpleNamespace(**parts, act_fn=module.act_fn)
    return _agrees(lambda: type(module).forward(probe, x), F.silu(x @ gate) * (x @ up))


def _has_rope(file: ModuleType, rope: Callable) -> bool:
    """Whether the file rotates both halves of a head, as Llama does."""
    theirs = getattr(file, ROPE, None)
    if theirs is None or theirs is rope:
        return theirs is rope
    q, k = _random(1, HEADS, 3, SIZE), _random(1, 1, 3, SIZE)
    cos, sin = (x.repeat(1, 1, 2) for x in (_random(1, 3, SIZE // 2), _random(1, 3, SIZE // 2)))

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    return _agrees(lambda: torch.cat(theirs(q, k, cos, sin), 1), torch.cat([rotated(q), rotated(k)], 1))


def _agrees(theirs: Callable[[], Tensor], ours: Tensor) -> bool:
    try:
        found = theirs()
    except (AttributeError, TypeError):  # it needs more than such a module has: it computes something else
        return False
    return found.shape == ours.shape and torch.allclose(found, ours, rtol=1e-5, atol=1e-6)


def _random(*shape: int) -> Tensor:
    """Always the same, and on the CPU in float32 whatever zero.Init makes of new tensors."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32, device="cpu")
