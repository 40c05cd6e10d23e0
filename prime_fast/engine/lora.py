"""LoRA (arXiv 2106.09685), by peft: beside the frozen weight W of a linear layer a product B A of rank r is trained,
and the layer computes with W + alpha / r * B A.

B begins as zeros, so that the model with its adapter is the model without it, to the bit. With the adapter off it is
what it started from: the frozen reference, which then needs no weights of its own (`Trunk`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prime_fast.config import LoraConfig
from prime_fast.engine.packing import Pack
from prime_fast.values import ALL_LINEAR

if TYPE_CHECKING:
    from prime_fast.engine.zero import Engine

NAME = "default"  # of the adapter, to peft
FOLDER = "adapter"  # of its files beside the merged model, where AutoModelForCausalLM does not look for one


class Adapter:
    """The adapter of `lm`, which is frozen apart from it.

    config: as peft saves it. layers: (name of W as Hugging Face has it, peft's layer around it), by the name that W has
    within that layer.
    """

    def __init__(self, lm: PreTrainedModel, role: str, path: str, lora: LoraConfig, seed: int = 0) -> None:
        """path: where the model comes from. Raises ValueError without peft, or for a target that is no linear layer."""
        try:
            import peft
        except ImportError as error:
            raise ValueError(
                f"{role}.lora needs peft 0.21: pip install 'prime-fast[lora]', or leave {role}.lora out"
            ) from error
        self.config = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=targets(lm, role, path, lora.targets),
            task_type="CAUSAL_LM",
            base_model_name_or_path=path,
            inference_mode=True,  # of who loads it
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # A is drawn on the CPU; a GPU's generator is left alone
            peft.inject_adapter_in_model(self.config, lm, NAME)
        layers = [(name, layer) for name, layer in lm.named_modules() if isinstance(layer, peft.tuners.lora.Linear)]
        self.layers = {f"{name}.base_layer.weight": (f"{name}.weight", layer) for name, layer in layers}
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_(is_adapter(name))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Meanwhile the adapter counts zero times. Its products are made all the same: ZeRO-3 gathers ahead as long as
        every forward asks for the same modules in the same order, and they are a hundredth of the model's."""
        try:
            self._scale(0)
            yield
        finally:
            self._scale(1)

    def _scale(self, scale: float) -> None:
        for _, layer in self.layers.values():
            layer.set_scale(NAME, scale)

    def parts(self, name: str, parameter: nn.Parameter) -> tuple[str, list[nn.Parameter], float]:
        """What `product` makes the weight of: (its Hugging Face name, [W, A, B] or W alone, alpha / r)."""
        if name not in self.layers:
            return name.replace(".base_layer.", "."), [parameter], 0.0
        there, layer = self.layers[name]
        return there, [parameter, layer.lora_A[NAME].weight, layer.lora_B[NAME].weight], layer.scaling[NAME]


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_" in name


def saved_name(name: str) -> str:
    """What peft calls an adapter's parameter in adapter_model.safetensors."""
    return f"base_model.model.{name.replace(f'.{NAME}.', '.')}"


def product(scale: float, weight: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """W (out, in) + scale * B (out, r) A (r, in), computed in float32 and rounded once to W's dtype; W without A, B."""
    if a is None:
        return weight
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)


def targets(lm: PreTrainedModel, role: str, path: str, wanted: str | list[str]) -> list[str]:
    """The last parts of the names of the linear layers that get an adapter: of decoder layers, never of the LM head."""
    inner = lm.base_model.named_modules()
    known = {name.rsplit(".", 1)[-1] for name, module in inner if isinstance(module, nn.Linear)}
    if wanted == ALL_LINEAR:
        return sorted(known)
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"{role}.lora.targets names {name!r}, which is no linear layer of {path}; give {ALL_LINEAR}, or some "
                f"of {', '.join(sorted(known))}"
            )
    return sorted(wanted)


class Trunk:
    """The model of an engine with its adapter off: frozen, without weights of its own, called as an Engine is."""

    trains = False

    def __init__(self, role: str, engine: Engine) -> None:
        self.role, self.engine = role, engine
        self.device, self.dtype = engine.device, engine.dtype
        self.attention, self.sequence_group = engine.attention, engine.sequence_group

    def run(self, pack: Pack, op: Any) -> Any:
        """As Engine.run, without gradients."""
        module = self.engine.deepspeed.module
        with torch.no_grad(), self.engine.adapter.off():
            module.eval()
            try:
                return self.engine.run(pack, op)
            finally:
                module.train(self.engine.trains)
