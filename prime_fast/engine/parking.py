"""Optimizer states of one ZeRO-3 engine in host memory, for as long as another needs the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage


class Parking:
    """optimizer: DeepSpeed's for stage 3, around a torch.optim.AdamW, without offloading.

    Float32 weights and AdamW's moments move, to buffers that are pinned and kept for the next time; what gradients are
    summed and reduced in is given up, for nothing is in it between steps. While parked the states can be read, and so
    saved, but not stepped or loaded.
    """

    def __init__(self, optimizer: Any, device: torch.device) -> None:
        self.optimizer, self.device = optimizer, device
        self.buffers: dict[tuple[int, str], Tensor] = {}
        self.scratch: list[tuple[UntypedStorage, int]] = []  # given up, with its bytes
        self.parked = False

    def park(self) -> None:
        """Raises RuntimeError where a backward still waits for its step."""
        if self.parked:
            return
        if self.optimizer.micro_step_id or self.optimizer._epilogue_ran_this_backward:
            raise RuntimeError("gradients wait for their step, so the optimizer's states cannot be parked")
        moves = [(tensor, self._buffer(key, tensor)) for key, tensor in self._states()]
        for tensor, buffer in moves:
            buffer.copy_(tensor.data, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for tensor, buffer in moves:
            tensor.data = buffer
        self.scratch = [(storage, storage.nbytes()) for storage in self._scratch()]
        for storage, _ in self.scratch:
            storage.resize_(0)
        self.parked = True

    def unpark(self) -> None:
        if not self.parked:
            return
        for _, tensor in self._states():
            tensor.data = torch.empty_like(tensor.data, device=self.device).copy_(tensor.data, non_blocking=True)
        for storage, size in self.scratch:
            storage.resize_(size)
        self.optimizer.grad_partitions_flat_buffer.zero_()  # the padding of partitions is 0 and counts in norms
        self.parked = False

    def _states(self) -> Iterator[tuple[tuple[int, str], Tensor]]:
        for group, master in enumerate(self.optimizer.fp32_partitioned_groups_flat):
            moments = self.optimizer.optimizer.state.get(master, {})  # none before the first step
            yield (group, "float32 weights"), master
            for name in ("exp_avg", "exp_avg_sq"):
                if name in moments:
                    yield (group, name), moments[name]

    def _scratch(self) -> list[UntypedStorage]:
        """The sum of gradients, and the buckets that they are reduced in."""
        buckets = [bucket.buffer for bucket in self.optimizer.ipg_buckets.values() if bucket.buffer is not None]
        return [tensor.untyped_storage() for tensor in (self.optimizer.grad_partitions_flat_buffer, *buckets)]

    def _buffer(self, key: tuple[int, str], tensor: Tensor) -> Tensor:
        if key not in self.buffers:
            pinned = self.device.type == "cuda"
            self.buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        return self.buffers[key]
