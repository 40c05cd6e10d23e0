"""Run by test_memory_states.py, alone or under torchrun: what real DeepSpeed engines hold, as JSON lines on rank 0.

usage: engine_bytes.py MODEL DIRECTORY dtype:offload[:dtype in which gradients are summed, or lora] ...
"""

import json
import sys
from pathlib import Path

import torch

from prime_fast.config import EngineConfig, LoraConfig, ModelConfig, OptimizerConfig
from prime_fast.engine import distributed, packing, shards, zero
from prime_fast.engine.writing import write

LORA = LoraConfig(rank=3)


def held(
    model: str, directory: Path, device: torch.device, dtype: str, offload: str, special: str | None = None
) -> dict[str, int]:
    settings = zero.deepspeed_config
    lora, summed = (LORA, None) if special == "lora" else (None, special)
    if summed:
        zero.deepspeed_config = lambda *arguments: settings(*arguments) | {"data_types": {"grad_accum_dtype": summed}}
    engine = zero.Engine(
        "policy",
        model,
        ModelConfig(policy=model, dtype=dtype),
        EngineConfig(offload=offload),
        OptimizerConfig(lr=1e-3),
        device,
        lora,
    )
    zero.deepspeed_config = settings
    gathered, stepped = [], []
    parameters = list(engine.lm.parameters())

    def loss(hidden, weight, bias):
        gathered.append(sum(p.data.nbytes for p in parameters))
        return (hidden.float() @ weight.float().T).square().mean()

    engine.deepspeed.optimizer.optimizer.register_step_pre_hook(
        lambda adam, *_: stepped.extend(p.grad.nbytes for group in adam.param_groups for p in group["params"])
    )
    ids = torch.arange(8)
    pack = packing.pack([0], [ids[:4]], [ids[4:]], [0])
    for _ in range(2):  # the first pass records the order of the parameters
        engine.backward(engine.run(pack, loss))
        engine.step(1e-3)
    optimizer = engine.deepspeed.optimizer
    groups = optimizer.fp32_partitioned_groups_flat
    moments = [state[name] for state in optimizer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    flat = optimizer.param_groups_fp16_flat_cpu_memory if offload == "cpu" else [optimizer.lp_param_buffer]
    frozen = [p.ds_tensor for p in parameters if not p.requires_grad]
    write(directory, {shards.file_name(distributed.rank()): engine.states()})
    distributed.barrier()
    written = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    return {
        "parameters": stored([*flat, *frozen]),
        "float32 weights": stored(groups),
        "AdamW moments": stored(moments),
        "gradients": stored([optimizer.grad_partitions_flat_buffer]),
        "float32 gradients": stored([group.grad for group in groups if group.grad is not None]),
        "reduce bucket": stored([bucket.buffer for bucket in optimizer.ipg_buckets.values()]),
        "gathered parameters": max(gathered),
        "gradient in the step": max(stepped),
        "written": written,
    }


def stored(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def main() -> None:
    model, directory, *cases = sys.argv[1:]
    device = zero.start()
    for case in cases:
        result = held(model, Path(directory, case), device, *case.split(":"))
        distributed.barrier()
        if distributed.rank() == 0:
            print(json.dumps({"case": case} | result), flush=True)


if __name__ == "__main__":
    main()
