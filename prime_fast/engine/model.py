"""A Hugging Face causal LM -> packed forward -> LM-head op. The only place that knows attention back-ends."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from prime_fast.config import ModelConfig
from prime_fast.engine.packing import Layout, Pack

ATTENTION = "prime_packed"
KNOWN = {"position_ids", "use_cache"}  # what models hand to attention that says nothing the pack does not
HEAD_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


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
        check_supported(lm.config)
        lm.set_attn_implementation(ATTENTION)
        if lm.config._attn_implementation != ATTENTION:
            raise ValueError(f"{lm.config.model_type} models are not supported: their attention cannot be replaced")
        self.longest = longest_row(lm.config)
        lm.set_output_embeddings(LMHead(lm.get_output_embeddings()))
        self.lm = lm

    def forward(self, pack: Pack, op: Callable[..., Any]) -> Any:
        """op(hidden (N, H), weight (V, H), bias=(V,) or None) -> whatever the op returns."""
        if pack.layout.max_length > self.longest:
            raise ValueError(
                f"a row has {pack.layout.max_length} tokens, and beyond {self.longest:g} this model's RoPE changes "
                "with the longest row of a pack; lower data.max_prompt or rollout.max_response"
            )
        hidden = self.lm.base_model(
            input_ids=pack.input_ids[None],
            position_ids=pack.position_ids[None],
            use_cache=False,
            layout=pack.layout,
        ).last_hidden_state[0]
        return self.lm.get_output_embeddings()(hidden[pack.predict], op)


def check_supported(config: PretrainedConfig) -> None:
    """Raises ValueError for a model that scales its logits, or whose layers mix tokens by more than attention."""
    scales = [name for name in HEAD_SCALES if getattr(config, name, None) not in (None, 1)]
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if scales or others:
        what = f"scales its logits ({scales[0]})" if scales else f"has {min(others)} layers"
        raise ValueError(f"{config.model_type} models are not supported: this one {what}; choose another model")


def longest_row(config: PretrainedConfig) -> float:
    """Tokens of a row up to which its RoPE does not depend on what it is packed with."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        return config.max_position_embeddings
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else math.inf


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
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of a pack: query (1, heads, T, d), key and value (1, kv_heads, T, d) ->
    (1, T, heads, d). transformers' attention interface; the row boundaries arrive through the model's kwargs. T are
    this rank's tokens, of those that layout.group holds.

    Raises ValueError for a model that does not pass them on, or whose attention does more (softcap, sinks, biases).
    """
    asked = [name for name, value in others.items() if name not in KNOWN and value is not None]
    asked += ["attention_mask"] * (attention_mask is not None)
    if layout is None or asked or not getattr(module, "is_causal", True):
        what = f"asks for {', '.join(asked)}" if asked else "is not causal" if layout else "takes no row boundaries"
        raise ValueError(f"this model is not supported: its {type(module).__name__} {what}; choose another model")
    attend = _by_length
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        attend = _torch_varlen if flash_attn() is None else _flash_attn
    parts = tuple(tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, d)
    if layout.group is None:
        return attend(*parts, scaling, dropout, sliding_window, layout)[None], None
    output = attend(*layout.group.by_heads(*parts), scaling, dropout, sliding_window, layout)
    return layout.group.by_tokens(output)[None], None


@cache
def flash_attn() -> Callable[..., Tensor] | None:
    """flash-attn 2's function, or None. What else is called flash_attn (version 4's namespace, a build for another
    torch) has it not and is passed over with a warning: torch's own kernel computes the same."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        warnings.warn(f"flash-attn is installed but not usable, so torch's attention is used: {error}", stacklevel=2)
        return None
    return flash_attn_varlen_func


def _flash_attn(q, k, v, scaling, dropout, window, layout):
    cu, longest = layout.cu_seqlens, layout.max_length
    span = (-1, -1) if window is None else (window - 1, 0)
    return flash_attn()(
        q, k, v, cu, cu, longest, longest, dropout, softmax_scale=scaling, causal=True, window_size=span
    )


def _torch_varlen(q, k, v, scaling, dropout, window, layout):
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError(
            "attention_dropout > 0 needs flash-attn on a GPU; install flash-attn or set it to 0 in config.json"
        )
    groups, options = q.shape[1] // k.shape[1], {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.12
        options["enable_gqa"] = groups > 1
    elif groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    cu, longest = layout.cu_seqlens, layout.max_length
    span = (-1 if window is None else window - 1, 0)
    return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=span, **options)


def _by_length(q, k, v, scaling, dropout, window, layout):
    """Exact on any device: one scaled_dot_product_attention per distinct row length."""
    q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))  # (heads, T, d)
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
