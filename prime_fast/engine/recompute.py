"""Which decoder layers make their activations again in the backward, and what of them is kept all the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

# what engine.model.packed_attention may call, as torch sees it: flash-attn 2.7, torch's varlen_attn, and the parts of
# scaled_dot_product_attention
ATTENTION_OPS = frozenset(
    {
        "flash_attn::_flash_attn_varlen_forward",
        "torch_attn::_varlen_attn",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
    }
)


class Recompute(NamedTuple):
    """`layers` of a model's `of` layers are recomputed: the first ones, whose backward comes last, when the activations
    of the others are gone. attention: its outputs are kept, and not recomputed."""

    layers: int
    of: int
    attention: bool = False

    @classmethod
    def fixed(cls, setting: str | int, of: int, path: str) -> Recompute:
        """What a setting of model.recompute other than auto means for the model at `path`."""
        if isinstance(setting, int) and setting > of:
            raise ValueError(
                f"model.recompute={setting} is more than the {of} layers of {path}; "
                "give no more, or let model.recompute=auto choose"
            )
        layers = {"none": 0, "attention-saved": of, "all": of}.get(setting, setting)
        return cls(layers, of, setting == "attention-saved")

    @property
    def setting(self) -> str | int:
        """The value of model.recompute that means this."""
        if self.attention:
            return "attention-saved"
        return {0: "none", self.of: "all"}.get(self.layers, self.layers)


def enable(lm: PreTrainedModel, setting: str | int, path: str) -> None:
    """Make the layers recompute as model.recompute says; auto is nothing, for what knows no memory plan."""
    if setting == "auto":
        return
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    chosen = Recompute.fixed(setting, lm.config.num_hidden_layers, path)
    if chosen.layers and len(layers) != chosen.of:
        raise ValueError(
            f"{lm.config.model_type} models cannot recompute their layers: {len(layers)} of {chosen.of} are able to; "
            "set model.recompute=none"
        )
    function = _all_but_attention if chosen.attention else partial(checkpoint, use_reentrant=False)
    for layer in layers[: chosen.layers]:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, function


def _all_but_attention(layer: Callable[..., Any], *inputs: Tensor) -> Any:
    """Raises ValueError where the layer's attention is of no op known here: all of it would be recomputed."""
    kept: deque[Any] = deque()
    output = checkpoint(layer, *inputs, use_reentrant=False, context_fn=lambda: (_Keep(kept), _Reuse(kept)))
    if torch.is_grad_enabled() and not kept:
        raise ValueError(
            "model.recompute=attention-saved finds no attention that it could keep: dropout and flash-attn before 2.7 "
            "run it as something else; set model.recompute=auto"
        )
    return output


class _Keep(TorchDispatchMode):
    """The forward. torch's create_selective_checkpoint_contexts wants every op again in the recomputation, in the same
    number, and ZeRO-3 gathers parameters when it likes: here attention alone is looked at."""

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = op(*args, **(kwargs or {}))
        if op.name() in ATTENTION_OPS:
            self.kept.append(tree_map_only(Tensor, Tensor.detach, output))  # what autograd gets would hold its graph
        return output


class _Reuse(_Keep):
    """The recomputation, which asks for attention in the same order."""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.kept.popleft() if op.name() in ATTENTION_OPS else op(*args, **(kwargs or {}))
