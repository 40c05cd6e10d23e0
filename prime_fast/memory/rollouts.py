"""What a rollout engine takes: awake, with its weights alone, asleep; and what it holds of sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch

from prime_fast.config import Config
from prime_fast.memory.items import GIB, Item, pinned
from prime_fast.memory.shapes import Shape
from prime_fast.rollout.process import CPU_BUCKET_BYTES
from prime_fast.rollout.vllm import CPU_KV_BYTES, GPU_SHARE, SLEEP_LEVEL
from prime_fast.rollout.weights import BUCKET_BYTES

# No source gives these three. A CUDA context with its kernels takes 0.4 to 0.6 GiB, vLLM's graphs for batches of up to
# 512 about 1 GiB at 7B (it prints the figure), an NCCL communicator over eight GPUs about 1 GiB.
CONTEXT = int(0.6 * GIB)
GRAPHS = 1 * GIB
NCCL = 1 * GIB

OWN_GPU_SHARE = 0.9  # rollout/process.py
STEP_TOKENS = 16384  # that vLLM profiles with (vllm/engine/arg_utils.py; A100: 8192)
LOGIT = 24  # bytes a logit while hf.py samples: float32 logits and log-probs, two float64 copies
NUCLEUS = 8  # and with top_p < 1: the sorted logits, their places and sums, before the float64 copies are made
SEGMENT, SMALL = 2 << 20, 20 << 20  # torch's caching allocator: rounding of blocks above 10 MiB, segments of the others


class Rollout(NamedTuple):
    """The engine that serves one rank."""

    config: Config
    shape: Shape
    dtype: torch.dtype
    card: int | None  # bytes of the GPU, None if unknown
    on_gpu: bool = True
    room: float = GPU_SHARE  # share of the card that an engine beside the trainer gets, unless it is given one

    @property
    def vllm(self) -> bool:
        return self.config.rollout.engine == "vllm"

    @property
    def apart(self) -> bool:
        return self.vllm and "gpus" in self.config.rollout.vllm

    @property
    def shards(self) -> int:
        return self.config.rollout.vllm.get("tensor_parallel_size", 1) if self.vllm else 1

    @property
    def weights(self) -> int:
        return self.dtype.itemsize * self.shape.count // self.shards

    @property
    def utilization(self) -> float:
        return self.config.rollout.vllm.get("gpu_memory_utilization", OWN_GPU_SHARE if self.apart else self.room)

    @property
    def sleep_level(self) -> int:
        return 0 if self.apart else self.config.rollout.vllm.get("sleep_level", SLEEP_LEVEL)

    @property
    def sequence(self) -> int:
        """Bytes of keys and values of one prompt and response of full length."""
        longest = self.config.data.max_prompt + self.config.rollout.max_response
        return self.shape.kv_bytes(self.dtype.itemsize) * longest // self.shards

    @property
    def sequences(self) -> float | None:
        """Full-length sequences that vLLM's cache has room for on this card; it refuses to start below one."""
        if not (self.vllm and self.on_gpu and self.card):
            return None
        return (self._share - self._beside_cache) / self.sequence

    def awake(self) -> list[Item]:
        """While it generates."""
        if not self.vllm:
            return self._hf_generating()
        if not self.on_gpu:
            kv = self.config.rollout.vllm.get("kv_cache_memory_bytes") or CPU_KV_BYTES
            return [*self._cpu(), self._item("KV cache", min(kv, self.config.rollout.batch * self.sequence))]
        # gpu_memory_utilization covers weights, profiled activations, CUDA graphs and the cache, but not the context,
        # which is there before vLLM looks (vllm/v1/worker/gpu_worker.py determine_available_memory)
        return [self._item("weights, graphs and KV cache", self._share), *self._contexts()]

    def loaded(self) -> list[Item]:
        """While weights are synchronised; the cache wakes after."""
        if not self.vllm:
            return [self._item("whole model", self.weights, holder="trainer")]
        if not self.on_gpu or self.sleep_level == 0:
            return self.awake()
        return [self._item("weights", self.weights), self._item("CUDA graphs", GRAPHS), *self._contexts()]

    def ready(self) -> list[Item]:
        """From then on until it sleeps: vLLM keeps its cache mapped, the embedded engine has none between batches."""
        return self.awake() if self.vllm else self.loaded()

    def asleep(self) -> list[Item]:
        if not self.on_gpu:  # there is no other memory to go to
            return self.loaded()
        if not self.vllm:
            return [Item("HF engine: whole model, asleep", self.weights, "host")]
        if self.sleep_level == 0:
            return self.awake()
        items = [self._item("CUDA graphs", GRAPHS), *self._contexts()]
        if self.sleep_level == 1:
            items.append(Item("vLLM: weights, asleep", self.backup_bytes(), "host", "engine"))
        return items

    def buckets(self) -> list[Item]:
        """In the trainer: two on their way, and a tensor larger than a bucket has its own (rollout/weights.py)."""
        if not self.vllm:
            return []
        default = BUCKET_BYTES if self.on_gpu else CPU_BUCKET_BYTES
        size = self.config.rollout.vllm.get("bucket_mib", default >> 20) << 20
        largest = self.dtype.itemsize * self.shape.largest
        lone = 2 * largest if largest > size else 0
        return [self._item("weight-sync buckets", min(2 * size, self.weights * self.shards) + lone, holder="trainer")]

    def backup_bytes(self) -> int:
        """Level-1 sleep copies every block of vLLM's weights to a pinned one (vllm/device_allocator/cumem.py), which
        torch rounds up to a power of two."""
        sizes = [self.dtype.itemsize * count // self.shards for count in self.shape.vllm_tensors]
        large = [-(-size // SEGMENT) * SEGMENT for size in sizes if size > SMALL // 2]
        small = sum(size for size in sizes if size <= SMALL // 2)
        return sum(map(pinned, large)) + -(-small // SMALL) * pinned(SMALL)

    @property
    def _share(self) -> int:
        """Of the card; without a card, or with rollout.vllm.kv_cache_memory_bytes, what the parts add up to."""
        cache = self.config.rollout.vllm.get("kv_cache_memory_bytes")
        if self.card and not cache:
            return int(self.utilization * self.card)
        return self._beside_cache + (cache or self.config.rollout.batch * self.sequence)

    @property
    def _beside_cache(self) -> int:
        return self.weights + self._profiled + GRAPHS

    @property
    def _profiled(self) -> int:
        """Activations of vLLM's profile run: gate, up and product, and the sampler's float32 logits."""
        tokens = self.config.rollout.vllm.get("max_num_batched_tokens", STEP_TOKENS)
        mlp = tokens * 3 * self.shape.intermediate * self.dtype.itemsize // self.shards
        return mlp + 3 * 4 * self.config.rollout.batch * self.shape.vocabulary

    def _contexts(self) -> list[Item]:
        nccl = [Item("vLLM: NCCL", NCCL, "engine's GPU" if self.apart else "GPU", "driver")] if self.shards > 1 else []
        return [Item("vLLM: CUDA context", CONTEXT, "GPU", "driver"), *nccl]

    def _cpu(self) -> list[Item]:
        return [self._item("weights", self.weights)]

    def _hf_generating(self) -> list[Item]:
        """transformers' DynamicCache and sdpa with a mask: one layer's cache is made anew at each token, and its keys
        and values are repeated to all heads (integrations/sdpa_attention.py use_gqa_in_sdpa)."""
        rollout, width = self.config.rollout, self.dtype.itemsize
        tokens = rollout.batch * (self.config.data.max_prompt + rollout.max_response)
        repeated = 2 * tokens * self.shape.heads * self.shape.head_size * width
        if self.shape.kv_heads == self.shape.heads:
            repeated = 0
        logit = LOGIT + NUCLEUS * (rollout.top_p < 1)
        return [
            *self.loaded(),
            self._item("KV cache", rollout.batch * self.sequence, holder="trainer"),
            self._item("one layer's keys and values again", self.shape.kv_bytes(width) * tokens // self.shape.layers
                       + repeated, holder="trainer"),
            self._item("logits", rollout.batch * self.shape.vocabulary * (logit + width), holder="trainer"),
        ]  # fmt: skip

    def _item(self, name: str, size: int, holder: str = "engine") -> Item:
        where = "host" if not self.on_gpu else "engine's GPU" if self.apart and holder == "engine" else "GPU"
        return Item(f"{'vLLM' if self.vllm else 'HF engine'}: {name}", int(size), where, holder)
