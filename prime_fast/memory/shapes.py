"""What a memory plan needs to know of a model, from its config.json alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from prime_fast.config import LoraConfig
from prime_fast.data.models import model_config
from prime_fast.engine.lora import Adapter, is_adapter

FUSED_BY_VLLM = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


@dataclass(frozen=True)
class Shape:
    parameters: tuple[tuple[str, int], ...]  # (name, elements); tied ones once
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool

    @cached_property
    def count(self) -> int:
        return sum(count for _, count in self.parameters)

    @cached_property
    def largest(self) -> int:
        return max(count for _, count in self.parameters)

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def normed_heads(self) -> int:
        """Query and key heads that are normed before attention (Qwen3)."""
        return self.heads + self.kv_heads if any("q_norm" in name for name, _ in self.parameters) else 0

    def partition(self, ranks: int) -> int:
        """Elements on each rank: ZeRO-3 pads every parameter to a multiple of the ranks."""
        return sum(-(-count // ranks) for _, count in self.parameters)

    def kv_bytes(self, width: int) -> int:
        """Of the keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size * width

    @cached_property
    def vllm_tensors(self) -> list[int]:
        """Elements of vLLM's parameters, which join q, k and v, and gate and up."""
        sizes: dict[str, int] = {}
        for name, count in self.parameters:
            joined = re.sub("|".join(FUSED_BY_VLLM), lambda found: FUSED_BY_VLLM[found[0]], name)
            sizes[joined] = sizes.get(joined, 0) + count
        return list(sizes.values())


@cache
def shape(path: str) -> Shape:
    """Raises ValueError if there is no config at `path`. Nothing is built: parameters live on the meta device."""
    config = model_config(path)
    parameters = tuple((name, p.numel()) for name, p in _empty(path).named_parameters())
    heads = config.num_attention_heads
    return Shape(
        parameters,
        config.num_hidden_layers,
        config.hidden_size,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.intermediate_size,
        config.vocab_size,
        config.tie_word_embeddings,
    )


def adapter(path: str, role: str, lora: LoraConfig | None) -> tuple[tuple[str, int], ...]:
    """(name, elements) of the adapter's parameters: none without one. Raises ValueError as engine.lora.Adapter does."""
    return () if lora is None else _adapter(path, role, lora.model_dump_json())


@cache
def _adapter(path: str, role: str, lora: str) -> tuple[tuple[str, int], ...]:
    lm = _empty(path)
    with torch.device("meta"):
        Adapter(lm, role, path, LoraConfig.model_validate_json(lora))
    return tuple((name, p.numel()) for name, p in lm.named_parameters() if is_adapter(name))


def _empty(path: str) -> PreTrainedModel:
    with torch.device("meta"):  # accelerate's init_empty_weights would untie the head
        return AutoModelForCausalLM.from_config(model_config(path))
