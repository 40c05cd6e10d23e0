"""A PRM that trains while another trainer, built on accelerate, trains the policy."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

import prime_kernels
from prime_fast.integrations.padded import Rows, add_lm_head_op

OPTIMIZER, SHARDS = "optimizer.pt", "deepspeed"  # of a checkpoint's folder, beside the model


class Optimizer(NamedTuple):
    lr: float
    weight_decay: float
    max_grad_norm: float
    micro_batches: int  # of a step, on each process


class OnlinePrm:
    """The model in each process, or where the launch is DeepSpeed's under the same ZeRO stage as the policy.

    optimizer: None for a model that gives scores alone. Every process must make the same calls.
    """

    def __init__(
        self, model: PreTrainedModel, accelerator: Accelerator, beta: float, optimizer: Optimizer | None
    ) -> None:
        add_lm_head_op(model)
        self.accelerator, self.beta, self.optimizer = accelerator, beta, optimizer
        self.model = self.module = model.train(optimizer is not None)
        self.adam, self.sharded = None, accelerator.state.deepspeed_plugin is not None
        if not self.sharded:
            model.to(accelerator.device)
        if optimizer is None:
            model.requires_grad_(False)
        else:
            self.adam = torch.optim.AdamW(model.parameters(), lr=optimizer.lr, weight_decay=optimizer.weight_decay)
        if self.sharded:
            self.model = _under_deepspeed(model, accelerator, self.adam, optimizer)

    @torch.no_grad()
    def logprob(self, rows: Rows) -> Tensor:
        """(N,) float32, nats, at temperature 1."""
        return logprob(self.model, rows, self.accelerator)

    def train(self, rows: Rows, ref_logprob: Tensor, outcome: Tensor, step_rows: int) -> prime_kernels.PrmLoss:
        """Forward and backward of a micro-batch's part of the mean cross-entropy over a step's rows, `step_rows` on
        this process. ref_logprob (N,), outcome (B,) in 0..1."""
        op = partial(
            prime_kernels.linear_prm_loss,
            targets=rows.targets,
            ref_logprob=ref_logprob,
            outcome=outcome,
            cu_seqlens=rows.cu_seqlens,
            beta=self.beta,
            row_weight=torch.full_like(outcome, 1 / step_rows),
        )
        with self.accelerator.autocast():
            result = rows.run(self.model, op)
        if self.sharded:
            self.model.backward(result.loss, scale_wrt_gas=False)
            self.model.step()  # which updates after the last micro-batch of a step
        else:
            result.loss.backward()
        return result

    def step(self) -> float:
        """After a step's micro-batches: the update, unless the gradient is not finite; its norm before clipping."""
        if self.sharded:
            return float(self.model.get_global_grad_norm())
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        for parameter in parameters:
            parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.optimizer.max_grad_norm or float("inf"))
        if norm.isfinite():
            self.adam.step()
        self.adam.zero_grad()
        return float(norm)

    def save(self, folder: Path, tokenizer: Any) -> None:
        """A model that `from_pretrained` loads, and what `load` needs besides."""
        state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            self.module.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)
            if not self.sharded:
                torch.save(self.adam.state_dict(), folder / OPTIMIZER)
        if self.sharded:
            self.model.save_checkpoint(str(folder / SHARDS))

    def load(self, folder: Path) -> None:
        if self.sharded:
            self.model.load_checkpoint(str(folder / SHARDS))
            return
        saved = type(self.module).from_pretrained(folder, dtype=self.module.dtype)
        self.module.load_state_dict(saved.state_dict())
        self.adam.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu"))


@torch.no_grad()
def logprob(model: Any, rows: Rows, accelerator: Accelerator, temperature: float = 1.0) -> Tensor:
    """(N,) float32, nats."""
    op = partial(prime_kernels.linear_logprob, targets=rows.targets, temperature=temperature)
    with accelerator.autocast():
        return rows.run(model, op)


def _under_deepspeed(
    model: PreTrainedModel, accelerator: Accelerator, adam: torch.optim.Optimizer | None, optimizer: Optimizer | None
) -> Any:
    """An engine of its own with the launch's settings; accelerate itself prepares one trained model alone."""
    import deepspeed

    settings = _decided(copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config))
    for name in ("optimizer", "scheduler", "train_batch_size"):
        settings.pop(name, None)
    zero = settings.setdefault("zero_optimization", {})
    zero["stage3_gather_16bit_weights_on_model_save"] = True
    if adam is None:
        zero.pop("offload_optimizer", None)
        zero["stage"] = zero.get("stage", 0) if zero.get("stage") == 3 else 0
    settings |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": optimizer.micro_batches if optimizer else 1,
        "gradient_clipping": optimizer.max_grad_norm if optimizer else 0.0,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=model, optimizer=adam, config=settings)[0]


def _decided(settings: Any) -> Any:
    """Without the values that a trainer fills in for the policy alone."""
    if isinstance(settings, dict):
        return {name: _decided(value) for name, value in settings.items() if value != "auto"}
    return settings
