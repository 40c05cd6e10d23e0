"""A Hugging Face causal LM -> packed forward -> LM-head op. The only place that knows attention back-ends."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from prime_fast.config import ModelConfig
from prime_fast.engine.packing import Layout, Pack

ATTENTION = "prime_packed"
HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


def training_dtype(model: ModelConfig, device: torch.device) -> torch.dtype:
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class LMHead(nn.Module):
    """The output projection as a place to run an LM-head op on its weight, instead of a producer of logits.

    ZeRO-3 gathers a module's own parameters around its forward and backward, so the op has to run in here.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, hidden: Tensor, op: Callable[..., Any]) -> Any:
        return op(hidden, self.weight, bias=self.bias)


class PackedLM(nn.Module):
    """Runs a causal LM on packs and hands the hidden states that predict response tokens to an LM-head op."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        lm.set_attn_implementation(ATTENTION)
        lm.set_output_embeddings(LMHead(lm.get_output_embeddings()))
        self.lm = lm

    def forward(self, pack: Pack, op: Callable[..., Any]) -> Any:
        """op(hidden (N, H), weight (V, H), bias=(V,) or None) -> whatever the op returns."""
        hidden = self.lm.base_model(
            input_ids=pack.input_ids[None],
            position_ids=pack.position_ids[None],
            use_cache=False,
            layout=pack.layout,
        ).last_hidden_state[0]
        return self.lm.get_output_embeddings()(hidden[pack.predict], op)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    layout: Layout,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of a pack: query (1, heads, T, d), key and value (1, kv_heads, T, d) ->
    (1, T, heads, d). transformers' attention interface; the row boundaries arrive through the model's kwargs."""
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        attend = _flash_attn if HAS_FLASH_ATTN else _torch_varlen
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return attend(query, key, value, scaling, dropout, sliding_window, layout)[None], None
    return _by_length(query[0], key[0], value[0], scaling, dropout, sliding_window, layout)[None], None


def _flash_attn(q, k, v, scaling, dropout, window, layout):
    from flash_attn import flash_attn_varlen_func

    cu, longest = layout.cu_seqlens, layout.max_length
    span = (-1, -1) if window is None else (window - 1, 0)
    return flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, dropout, softmax_scale=scaling, causal=True, window_size=span
    )


def _torch_varlen(q, k, v, scaling, dropout, window, layout):
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError(
            "attention_dropout > 0 needs flash-attn on a GPU; install flash-attn or set it to 0 in config.json"
        )
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # enable_gqa came with torch 2.12
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    cu, longest = layout.cu_seqlens, layout.max_length
    span = (-1 if window is None else window - 1, 0)
    return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=span)


def _by_length(q, k, v, scaling, dropout, window, layout):
    """Exact on any device: one scaled_dot_product_attention per distinct row length."""
    groups = q.shape[0] // k.shape[0]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    outputs = []
    for start, rows, length in layout.runs:
        part = slice(start, start + rows * length)
        q_run, k_run, v_run = (t[:, part].unflatten(1, (rows, length)).transpose(0, 1) for t in (q, k, v))
        mask = None
        if window is not None and length > window:
            position = torch.arange(length, device=q.device)
            distance = position[:, None] - position
            mask = (distance >= 0) & (distance < window)
        output = F.scaled_dot_product_attention(
            q_run, k_run, v_run, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


AttentionInterface.register(ATTENTION, packed_attention)
