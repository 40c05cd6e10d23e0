"""Everything DeepSpeed: load sharded, forward, backward, step, gather, offload, copy out and restore."""

from __future__ import annotations

import gc
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from packaging.version import Version
from safetensors import safe_open
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import logging as transformers_logging

from prime_fast.config import EngineConfig, LoraConfig, ModelConfig, OptimizerConfig
from prime_fast.data.models import source
from prime_fast.engine import distributed, layers, lora, recompute, shards, ulysses
from prime_fast.engine.model import PackedLM, training_dtype
from prime_fast.engine.packing import Pack
from prime_fast.engine.parking import Parking
from prime_fast.progress import progress

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when DeepSpeed is imported
import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.runtime.zero import partition_parameters  # noqa: E402
from deepspeed.utils import safe_get_local_optimizer_state  # noqa: E402

gc.freeze()  # what was imported need not be walked whenever DeepSpeed collects garbage: 0.2 s for each trained engine

# zero.Init else casts every floating tensor that a model's constructor makes to the training dtype, whatever dtype it
# asks for; RoPE frequencies in bfloat16 are off by radians after a thousand tokens. transformers sets the parameters'.
partition_parameters.DEFAULT_TENSOR_OVERRIDES.remove(partition_parameters.DeepSpeedTensorOverride.dtype)

MINIMUM = "0.19.8"  # DeepSpeed's first that leaves float32 and bfloat16 weights alone where gradients are not finite
GATHER_BYTES = 1 << 30  # parameters gathered at a time when weights leave the engine
REDUCE_BUCKET = 500_000_000  # elements of gradients reduced at a time, unless told otherwise: DeepSpeed's default
WEIGHT_FILES, SHARD = "model{suffix}.safetensors", "50GB"  # as transformers names and cuts them


Content = bytes | Mapping[str, Tensor]  # of a file; tensors become a .safetensors
Part = tuple[str, list[nn.Parameter], float]  # a weight's name, and what lora.product makes it of


class StepResult(NamedTuple):
    grad_norm: float  # before clipping; inf where the step was skipped
    applied: bool


def start(hang: float = distributed.HANG) -> torch.device:
    """Join the process group and quieten DeepSpeed; returns this rank's device. Raises ValueError for one that is too
    old."""
    if Version(deepspeed.__version__) < Version(MINIMUM):
        raise ValueError(
            f"DeepSpeed {deepspeed.__version__} applies gradients that are not finite; pip install "
            f"'deepspeed>={MINIMUM}'"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        # gloo serves; DeepSpeed's shared-memory all-reduce would need a C++ compiler and 20 s to build it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = distributed.initialize(hang)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return device


class Engine:
    """One causal LM under ZeRO-3, called by its `role` (policy, prm, ...): trained if `optimizer` is given; with
    `adapter` its LoRA alone, whose first weights `seed` draws.

    Parameters are in the training dtype; master weights, AdamW states and the sum of gradients in float32.
    Every rank must call run, backward, step, weights and save the same number of times.
    """

    wrap: type[nn.Module] = PackedLM  # what `run` calls; its attribute lm is the model

    def __init__(
        self,
        role: str,
        path: str,
        model: ModelConfig,
        engine: EngineConfig,
        optimizer: OptimizerConfig | None,
        device: torch.device,
        adapter: LoraConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.role, self.device = role, device
        self.trains = optimizer is not None
        self.dtype = training_dtype(model, device)
        self.sequence_group = ulysses.sequence_group(engine.sequence_parallel)
        settings = deepspeed_config(role, engine, optimizer, self.dtype)
        with progress(f"loading the {role} model", at_once=True):
            self._load(path, model, optimizer, settings, adapter, seed)

    def _load(
        self,
        path: str,
        model: ModelConfig,
        optimizer: OptimizerConfig | None,
        settings: dict,
        adapter: LoraConfig | None,
        seed: int,
    ) -> None:
        lm = load_sharded(path, self.dtype, settings)
        lm.config.use_cache = False
        layers.fuse(lm, model.layers, self.device)
        if self.trains:
            recompute.enable(lm, model.recompute, path)
        module = self.wrap(lm)
        self.attention = attention_share(lm)
        for parameter in module.parameters():
            parameter.requires_grad_(self.trains)
        self.adapter = lora.Adapter(lm, self.role, path, adapter, seed) if adapter else None
        if self.adapter:  # whose gradients need no more room than all of them take
            elements = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
            settings["zero_optimization"]["reduce_bucket_size"] = min(elements, REDUCE_BUCKET)
        adam = None
        if optimizer is not None:
            adam = torch.optim.AdamW(
                [parameter for parameter in module.parameters() if parameter.requires_grad],
                lr=optimizer.lr,
                weight_decay=optimizer.weight_decay,
                fused=self.device.type == "cuda",
            )
        self.deepspeed = deepspeed.initialize(model=module, optimizer=adam, config=settings)[0]
        self.deepspeed.train(self.trains)
        self.parking = Parking(self.deepspeed.optimizer, self.device) if self.trains else None
        self.copies = shards.HostCopies(pinned=self.device.type == "cuda")  # of the states
        self.whole = shards.HostCopies(pinned=False)  # which would take up to twice the room, parameter by parameter
        self.papers: dict[str, Content] | None = None

    @property
    def lm(self) -> PreTrainedModel:
        return self.deepspeed.module.lm

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that train, by name: all, or the adapter's."""
        return [(name, parameter) for name, parameter in self.lm.named_parameters() if parameter.requires_grad]

    def run(self, pack: Pack, op: Any) -> Any:
        """Packed forward through the LM-head op; see PackedLM.forward. The pack must be on `self.device`."""
        return self.deepspeed(pack, op)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. A non-finite loss poisons them, so that `step` sees it on every rank and skips."""
        if self.parking.parked:
            raise RuntimeError(f"the {self.role}'s optimizer states are parked; unpark them before they are trained")
        poison = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        self.deepspeed.backward(loss * poison, scale_wrt_gas=False)

    @record_function("optimizer")
    def step(self, lr: float) -> StepResult:
        """Average the accumulated gradients over ranks, clip, update. Non-finite gradients leave the weights alone."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        applied = self.deepspeed.was_step_applied()
        return StepResult(float(self.deepspeed.get_global_grad_norm()) if applied else float("inf"), applied)

    def park(self) -> None:
        """Between steps: move the optimizer states to host memory; the model can be run, gathered and saved."""
        if self.trains:
            self.parking.park()

    def unpark(self) -> None:
        if self.trains:
            self.parking.unpark()

    def parameters_without_gradient(self) -> list[str]:
        """Names of parameters whose first AdamW moment is zero everywhere: no gradient has reached them yet. Of an
        adapter only B is looked at: A's gradient is zero as long as B is.
        """
        named = [(name, parameter) for name, parameter in self.trained if not self.adapter or ".lora_B." in name]
        reached = torch.tensor(
            [float(safe_get_local_optimizer_state(p, "exp_avg").count_nonzero() > 0) for _, p in named],
            device=self.device,
        )
        distributed.sum_(reached)
        return [name for (name, _), ranks in zip(named, reached.tolist(), strict=True) if ranks == 0]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) of every parameter, gathered bucket by bucket; with the adapter merged.

        A tensor is valid until the next one is asked for; tied parameters appear once.
        """
        return _gathered(self._parts())

    def _parts(self) -> Iterator[Part]:
        for name, parameter in self.lm.named_parameters():
            if self.adapter is None:
                yield name, [parameter], 0.0
            elif not lora.is_adapter(name):
                yield self.adapter.parts(name, parameter)

    def exported(self, tokenizer: Any) -> dict[str, Content]:
        """The files of a directory that `AutoModelForCausalLM.from_pretrained` loads, in host memory, until the next
        call; of rank 0, for which all ranks gather. With an adapter, that lies in a folder of its own as well."""
        here = distributed.rank() == 0
        state, adapter = {}, {}
        for name, tensor in self.weights():
            if here:
                state[name] = self.whole(name, tensor)
        apart = self.trained if self.adapter else ()
        for name, tensor in _gathered((lora.saved_name(name), [parameter], 0.0) for name, parameter in apart):
            if here:
                adapter[name] = self.whole(name, tensor)
        if not here:
            return {}
        state = revert_weight_conversion(self.lm, state | self._buffers())
        parts = split_torch_state_dict_into_shards(state, filename_pattern=WEIGHT_FILES, max_shard_size=SHARD)
        files: dict[str, Content] = {
            file: {name: state[name].contiguous() for name in names}
            for file, names in parts.filename_to_tensors.items()
        }
        if parts.is_sharded:
            index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
            files["model.safetensors.index.json"] = json.dumps(index, indent=2, sort_keys=True).encode()
        if adapter:
            files[f"{lora.FOLDER}/adapter_model.safetensors"] = adapter
        if self.papers is None:
            self.papers = self._papers(tokenizer)
        return self.papers | files

    def states(self) -> dict[str, Tensor]:
        """This rank's part of float32 weights and optimizer states of what trains, for `load_states` of however many
        ranks, in host memory, until the next call; empty with engine.offload=disk, whose step count DeepSpeed does not
        give back."""
        optimizer = self.deepspeed.optimizer
        if optimizer.swap_optimizer:
            return {}
        buffers = {f"buffer/{name}": tensor for name, tensor in self._buffers().items()}
        return shards.copied(optimizer, self.trained, self.copies) | buffers

    def load_states(self, directory: Path) -> None:
        self.unpark()
        shards.restore(self.deepspeed.optimizer, self.trained, directory)
        with safe_open(directory / shards.file_name(0), "pt") as file, torch.no_grad():
            for name in self._buffers():
                self.lm.get_buffer(name).copy_(file.get_tensor(f"buffer/{name}"))

    def _buffers(self) -> dict[str, Tensor]:
        """A copy of the persistent ones."""
        persistent = self.lm.state_dict().keys()
        return {name: buffer.cpu().clone() for name, buffer in self.lm.named_buffers() if name in persistent}

    def _papers(self, tokenizer: Any) -> dict[str, Content]:
        """What lies beside the weights and never changes: settings and tokenizer."""
        config = self.lm.config
        with tempfile.TemporaryDirectory() as folder:
            config.use_cache = True
            self.lm.save_pretrained(folder, state_dict={})
            config.use_cache = False
            tokenizer.save_pretrained(folder)
            if self.adapter:
                self.adapter.config.save_pretrained(Path(folder, lora.FOLDER))
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def attention_share(lm: PreTrainedModel) -> float:
    """What attention costs beside matrix products, for packing.work; every layer is taken to look back without end."""
    embeddings = {id(lm.get_input_embeddings().weight), id(lm.get_output_embeddings().weight)}
    products = sum(p.ds_numel for p in lm.parameters() if id(p) not in embeddings)
    config = lm.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head * config.num_hidden_layers / products


def load_sharded(path: str, dtype: torch.dtype, settings: dict) -> PreTrainedModel:
    """Load a checkpoint with every parameter partitioned over the ranks as it arrives."""
    zero3 = HfDeepSpeedConfig(settings)  # transformers partitions on load for as long as this object lives
    try:
        return AutoModelForCausalLM.from_pretrained(**source(path), use_safetensors=True, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a causal LM from {path!r}: {' '.join(str(error).split())[:300]}") from error
    finally:
        del zero3


def deepspeed_config(
    role: str, engine: EngineConfig, optimizer: OptimizerConfig | None, dtype: torch.dtype
) -> dict[str, Any]:
    if engine.offload == "disk" and not deepspeed.ops.__compatible_ops__["async_io"]:
        raise ValueError("engine.offload=disk needs the system library libaio (package libaio-dev) and a C++ compiler")
    zero: dict[str, Any] = {"stage": 3, "overlap_comm": engine.overlap_comm, "contiguous_gradients": True}
    if engine.offload != "none":
        target = {"device": "cpu"}
        if engine.offload == "disk":  # a folder each: DeepSpeed names the files alike in every engine
            target = {"device": "nvme", "nvme_path": str(Path(tempfile.gettempdir(), "prime-fast-offload", role))}
        zero["offload_param"] = target | {"pin_memory": torch.cuda.is_available()}
        if optimizer is not None:
            zero["offload_optimizer"] = target | {"pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # any number of backwards per step; our losses carry the normaliser
        "gradient_clipping": optimizer.grad_clip if optimizer else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # Summed in bfloat16, a gradient strays with the number of micro-batches: by 0.9% at 64, 2% at 256, as far as
        # bfloat16 itself is from float32. Summed in float32 it keeps the 0.5% of each backward's own rounding,
        # for 2 bytes more a sharded parameter and none at the optimizer step, which needs it in float32 anyway.
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1 << 62,
    }


@torch.no_grad()
def _gathered(parts: Iterable[Part]) -> Iterator[tuple[str, Tensor]]:
    for bucket in _buckets(parts):
        with deepspeed.zero.GatheredParameters([parameter for _, parameters, _ in bucket for parameter in parameters]):
            for name, parameters, scale in bucket:
                yield name, lora.product(scale, *(parameter.data for parameter in parameters))


def _buckets(parts: Iterable[Part]) -> Iterator[list[Part]]:
    bucket, size = [], 0
    for part in parts:
        bytes_ = sum(parameter.ds_numel * parameter.element_size() for parameter in part[1])
        if bucket and size + bytes_ > GATHER_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(part)
        size += bytes_
    if bucket:
        yield bucket
