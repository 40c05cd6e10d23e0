"""Padded batches, as Hugging Face trainers make them, through the LM-head ops: logits are built nowhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from prime_fast.engine.model import HEAD_SCALES

SOFTCAP = "final_logit_softcapping"


def add_lm_head_op(model: PreTrainedModel) -> None:
    """Teach the model `model(..., predict=(B, S-1) bool, op=op)`, which returns op(hidden, weight, bias=, softcap=) on
    the hidden states (N, H) whose next tokens `predict` marks, row after row. Without op it is the model that it was.

    The op runs within the LM head's own forward, and this within the model's, so that what wraps either (DDP, ZeRO-3)
    gathers and reduces the head's gradient like any other. Under autocast its arithmetic is as that of the head.
    Raises ValueError for a model that scales its logits.
    """
    config = model.config.get_text_config()
    if scales := [name for name in HEAD_SCALES if name != SOFTCAP and getattr(config, name, None) not in (None, 1)]:
        raise ValueError(f"{config.model_type} models are not supported: this one scales its logits ({scales[0]})")
    head = model.get_output_embeddings()
    forward, head_forward, softcap = model.forward, head.forward, getattr(config, SOFTCAP, None)

    def run(hidden: Tensor, op: Callable[..., Any] | None = None) -> Any:
        if op is None:
            return head_forward(hidden)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        bias = None if head.bias is None else head.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return op(hidden.to(dtype), head.weight.to(dtype), bias=bias, softcap=softcap)

    @functools.wraps(type(model).forward)  # whose signature `generate` reads
    def call(*inputs: Any, predict: Tensor | None = None, op: Callable[..., Any] | None = None, **options: Any) -> Any:
        if op is None:
            return forward(*inputs, **options)
        options.pop("labels", None)  # PEFT adds it, as None
        hidden = model.base_model(*inputs, **options, use_cache=False).last_hidden_state
        return head(hidden[:, :-1][predict], op=op)

    head.forward, model.forward = run, call


class Rows(NamedTuple):
    """B prompts, padded on the left, and their responses, padded on the right, in S columns."""

    ids: Tensor  # (B, S) int64
    attention: Tensor  # (B, S), 0 on padding
    made: Tensor  # (B, S) bool: tokens that the model made; N in all

    @classmethod
    def of(cls, prompt: Tensor, prompt_mask: Tensor, response: Tensor, response_mask: Tensor, made: Tensor) -> Rows:
        """Tensors (B, P) of the prompts and (B, C) of the responses."""
        ids, attention = torch.cat([prompt, response], 1), torch.cat([prompt_mask, response_mask], 1)
        return cls(ids, attention, F.pad(made.bool(), (prompt.shape[1], 0)))

    @property
    def targets(self) -> Tensor:
        """(N,): the tokens that the model made, row after row, as everything flat."""
        return self.ids[:, 1:][self.made[:, 1:]]

    @property
    def cu_seqlens(self) -> Tensor:
        """(B+1,) int32, on the CPU."""
        return F.pad(self.made.sum(1).cumsum(0), (1, 0)).int().cpu()

    def cut(self, size: int) -> Iterator[Rows]:
        """In parts of `size` rows, without the columns that all rows of a part leave empty."""
        for start in range(0, len(self.ids), size):
            part = [tensor[start : start + size] for tensor in self]
            used = part[1].any(0)
            yield Rows(*(tensor[:, used] for tensor in part))

    def run(self, model: Any, op: Callable[..., Any]) -> Any:
        """op(hidden (N, H), weight, bias=, softcap=) under a model with `add_lm_head_op`, wrapped or not."""
        return model(input_ids=self.ids, attention_mask=self.attention, predict=self.made[:, 1:], op=op)
