"""What DeepSpeed 0.19.8 holds for one engine: at rest, while parameters are gathered, in the optimizer step, on disk.

Files named in comments are DeepSpeed's, under deepspeed/runtime/zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from deepspeed.runtime.config import DtypeEnum
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from prime_fast.config import EngineConfig, OptimizerConfig
from prime_fast.engine.zero import GATHER_BYTES, deepspeed_config
from prime_fast.memory.items import Item, pinned
from prime_fast.memory.shapes import Shape

MASTER, MOMENTS = 4, 8  # bytes a parameter: float32 weights; AdamW's two float32 moments
PARKED = ("float32 weights", "AdamW moments", "gradients", "reduce bucket")  # the last two are given up
RANK_0 = "on rank 0"
NORM = 8  # bytes an element: norms are taken in float64 (utils.py get_norm_dtype)


@dataclass(frozen=True)
class States:
    """One engine of the trainer; `optimizer` is None where it is frozen. `on_gpu` is False on a machine without one.

    adapter: (name, elements) of what trains in the place of the parameters of `shape` (memory/shapes.py adapter).
    """

    role: str
    shape: Shape
    dtype: torch.dtype
    ranks: int
    engine: EngineConfig
    optimizer: OptimizerConfig | None
    on_gpu: bool = True
    adapter: tuple[tuple[str, int], ...] = ()

    @cached_property
    def whole(self) -> Shape:
        """With the adapter's parameters."""
        return replace(self.shape, parameters=(*self.shape.parameters, *self.adapter))

    @cached_property
    def training(self) -> Shape:
        """Of the parameters that train."""
        return replace(self.shape, parameters=self.adapter) if self.adapter else self.shape

    @cached_property
    def settings(self) -> dict:
        """As engine/zero.py gives them to DeepSpeed; what offloading means is said below, whatever this machine has."""
        return deepspeed_config(self.role, EngineConfig(offload="none"), self.optimizer, self.dtype)

    @cached_property
    def zero(self) -> DeepSpeedZeroConfig:
        return DeepSpeedZeroConfig(**self.settings["zero_optimization"])

    @property
    def width(self) -> int:
        return self.dtype.itemsize

    @property
    def gradient_width(self) -> int:
        """Of the dtype in which gradients are summed (engine.py get_data_types)."""
        name = self.settings.get("data_types", {}).get("grad_accum_dtype")
        return (DtypeEnum(name).value if name else self.dtype).itemsize

    @property
    def trained(self) -> bool:
        return self.optimizer is not None

    @property
    def offloaded(self) -> bool:
        return self.engine.offload != "none"

    @property
    def gathers(self) -> bool:
        """A lone rank without offloading computes with its partitions (partition_parameters.py NoGatherHandle)."""
        return self.ranks > 1 or (self.offloaded and self.on_gpu)

    @cached_property
    def partition(self) -> int:
        """Of the parameters that train."""
        return self.training.partition(self.ranks)

    @cached_property
    def sub_groups(self) -> list[int]:
        """Elements of the groups that are stepped one after another (stage3.py _create_fp16_sub_groups)."""
        groups = [0]
        for _, count in self.training.parameters:
            if groups[-1] >= self.zero.sub_group_size:
                groups.append(0)
            groups[-1] += -(-count // self.ranks)
        return groups

    @property
    def sub_group(self) -> int:
        return max(self.sub_groups)

    def rest(self) -> list[Item]:
        """From the second step on."""
        return [*self._parameters(), *self._trained()] if self.trained else self._parameters()

    def fresh(self) -> list[Item]:
        """Before the first step, which makes AdamW's moments."""
        return [item for item in self.rest() if not item.name.endswith("AdamW moments")]

    def parked(self, items: list[Item]) -> list[Item]:
        """What a GPU still holds of `rest` or `fresh` (engine/parking.py)."""
        away = {f"{self.role}: {name}" for name in PARKED}
        return [item for item in items if item.name not in away]

    def parking(self) -> list[Item]:
        """The pinned buffers of parked states, kept from the first time on: weights and two moments a sub-group."""
        if not self.trained:
            return []
        size = sum((MASTER + MOMENTS) // MASTER * pinned(MASTER * group) for group in self.sub_groups)
        return [self._item("buffers to park in", size, "host")]

    def starting(self) -> list[Item]:
        """While the engine is made: float32 weights converted and cloned (stage3.py _create_fp32_partitions), then a
        gradient to initialise the optimizer with (initialize_optimizer_states), before buckets and gradients exist."""
        if not self.trained:
            return self._parameters()
        later = ("gradients", "reduce bucket")
        whole = [item for item in self.fresh() if not item.name.endswith(later)]
        items = [*whole, self._item("float32 weights, made twice", MASTER * self.sub_group, self._resting_place)]
        if self.on_gpu and not self.offloaded:  # utils.py defragment
            items.append(self._item("parameters, laid out anew", self.width * self.partition, "host"))
        return items

    def gathered(self) -> list[Item]:
        """Whole parameters while a pass runs: partitioned_param_coordinator.py releases none that is needed again
        within stage3_max_reuse_distance and prefetches up to stage3_max_live_parameters; an all-gather of several
        parameters is copied out of its buffer (partition_parameters.py AllGatherCoalescedHandle)."""
        if not self.gathers:
            return []
        live = min(self.whole.count, self.zero.max_live_parameters)
        inside = max(count for name, count in self.shape.parameters if count != self.shape.head)
        buffer = min(self.whole.count, self.zero.prefetch_bucket_size + inside) if self.ranks > 1 else 0
        return [
            self._item("gathered parameters", self.width * live),
            self._item("all-gather buffer", self.width * buffer),
        ]

    def gathered_for_export(self) -> list[Item]:
        """One bucket of engine/zero.py `weights`; a larger parameter is a bucket of its own. A weight that an adapter
        is merged into is made twice in float32 (engine/lora.py product)."""
        inside = max(count for name, count in self.shape.parameters if count != self.shape.head)
        items = [self._item("merged weight", (2 * 4 + self.width) * inside)] if self.adapter else []
        if not self.gathers:
            return items
        size = min(self.width * self.whole.count, max(GATHER_BYTES, self.width * self.shape.largest))
        return [*items, self._item("parameters gathered for export", size)]

    def reducing(self) -> list[Item]:
        """Besides the bucket: a gradient on its way into it, and the bucket laid out anew for the reduce-scatter
        (coalesced_collectives.py reduce_scatter_coalesced)."""
        inside = max(count for name, count in self.training.parameters if count != self.shape.head)
        bucket = min(self.zero.reduce_bucket_size, self.training.count)  # what is in it
        converted = self.gradient_width * bucket // self.ranks if self.gradient_width != self.width else 0
        return [
            self._item("a layer's gradient", self.width * inside),
            self._item("reduce-scatter buffer", self.width * bucket + converted),
        ]

    def stepping(self) -> list[Item]:
        """stage3.py step: norms parameter by parameter, then a flat float32 gradient of one sub-group at a time."""
        largest = -(-self.training.largest // self.ranks)
        if self.offloaded and self.on_gpu:  # _offload_grad_partition_at_boundary; the rest happens on the host
            return [self._item("gradients on their way to the host", (self.gradient_width + NORM) * largest)]
        flat = self.gradient_width if self.gradient_width != MASTER else 0  # is converted, then given up
        items = [self._item("flat float32 gradient", max(NORM * largest, (MASTER + flat) * self.sub_group))]
        if not self.on_gpu:  # torch.optim.AdamW is fused on a GPU alone (engine/zero.py)
            items.append(self._item("AdamW's denominator, made twice", 2 * 4 * self.sub_group))
        return items

    def copied(self) -> list[Item]:
        """On the host from the first checkpoint on: what is written from while training goes on, and kept for the next
        (engine/shards.py HostCopies). Each rank has its states there, rank 0 the whole model too."""
        if not self.trained:
            return []
        hold = pinned if self.on_gpu else int
        states = 0 if self.engine.offload == "disk" else sum(3 * hold(MASTER * group) for group in self.sub_groups)
        return [
            self._item("copy for the disk", states, "host"),
            self._item(f"copy of the whole model for the disk, {RANK_0}", self.width * self.whole.count, "host"),
        ]

    def imported(self) -> list[Item]:
        """On the host while a checkpoint is read (engine.py _load_zero_checkpoint)."""
        size = (MASTER + MOMENTS) * self.partition if self.trained else 0
        return [self._item("states on their way from disk", size, "host")]

    def checkpoint_bytes(self) -> int:
        """Of all ranks: the Hugging Face copy, an adapter beside it, float32 weights and moments. Frozen engines are
        not written."""
        if not self.trained:
            return 0
        return self.width * self.whole.count + (MASTER + MOMENTS) * self.partition * self.ranks

    def _parameters(self) -> list[Item]:
        size, offload = self.width * self.whole.partition(self.ranks), self.engine.offload
        if offload == "none" or not self.on_gpu:
            return [self._item("parameters", size, "GPU" if offload != "disk" else "disk")]
        threshold = self.zero.param_persistence_threshold  # parameter_offload.py mark_persistent_parameters
        small = sum(count for _, count in self.whole.parameters if count <= threshold)
        items = [self._item("small parameters", self.width * small)]
        if offload == "cpu":  # those that train move to one flat buffer
            flat = pinned(self.width * self.partition) if self.trained else 0
            left = self._blocks if self.adapter or not self.trained else 0
            return [*items, self._item("parameters", flat + left, "host")]
        buffers = self._offload_param.buffer_count * self._offload_param.buffer_size
        kept = min(self.partition, self._offload_param.max_in_cpu) if self.trained else 0
        return [
            *items,
            self._item("parameters", size, "disk"),
            self._item("parameters kept in memory", pinned(self.width * kept), "host"),
            self._item("swap buffers of parameters", self.width * buffers, "host"),
        ]

    def _trained(self) -> list[Item]:
        offload = self.engine.offload
        where = self._resting_place
        bucket = self.zero.reduce_bucket_size
        if self.adapter or not self.on_gpu:  # untouched pages of a buffer take no memory
            bucket = min(bucket, self.training.count)
        gradients = self.gradient_width * self.partition
        items = [
            # for float32 parameters too: _create_fp32_partitions compares a device with its name, and shares nothing
            self._item("float32 weights", MASTER * self.partition, where),
            self._item("AdamW moments", MOMENTS * self.partition, where),
            self._item("reduce bucket", self.width * bucket),
        ]
        if offload == "none":
            return [*items, self._item("gradients", gradients)]
        hold = pinned if self.on_gpu else int
        items.append(self._item("gradients", hold(gradients), "host"))  # grad_partitions_flat_buffer
        flat = sum(hold(MASTER * group) for group in self.sub_groups)
        if offload == "disk":  # optimizer_utils.py: buffer_count locked buffers of the largest sub-group
            items.append(self._item("float32 gradients", MASTER * self.partition, "disk"))
            flat = 4 * MASTER * self.sub_group
            return [*items, self._item("swap buffers of the optimizer", flat, "host")]
        return [*items, self._item("float32 gradients", flat, "host")]

    def loaded_into(self) -> list[Item]:
        """The pinned blocks, one a parameter, that an engine offloaded to the CPU was loaded into, if it is not there
        that its parameters stay; torch keeps them."""
        left = self.engine.offload == "cpu" and self.on_gpu and not self.adapter
        blocks = self._blocks if left else 0
        return [self._item("pinned blocks left from loading", blocks, "host")]

    @property
    def parked_bytes(self) -> int:
        """That move one way."""
        return (MASTER + MOMENTS) * self.partition if self.trained else 0

    @property
    def _blocks(self) -> int:
        return sum(pinned(self.width * -(-count // self.ranks)) for _, count in self.shape.parameters)

    @property
    def _resting_place(self) -> str:
        return {"none": "GPU", "cpu": "host", "disk": "disk"}[self.engine.offload]

    @property
    def _offload_param(self):
        return DeepSpeedZeroConfig(stage=3, offload_param={"device": "nvme"}).offload_param

    def _item(self, name: str, size: int, where: str = "GPU") -> Item:
        return Item(f"{self.role}: {name}", int(size), where if self.on_gpu or where == "disk" else "host")
