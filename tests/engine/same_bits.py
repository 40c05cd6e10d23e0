"""What trades memory or traffic for time and must not change a bit: `torchrun ... same_bits.py MODELS SCRATCH` on
several ranks, or each check in this process."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import prime_kernels
from prime_fast.config import EngineConfig, LoraConfig, ModelConfig, OptimizerConfig
from prime_fast.engine import distributed, packing, shards, zero
from prime_fast.engine.recompute import ATTENTION_OPS
from prime_fast.engine.writing import write

LAYERS = 3
SHAPE = dict(
    vocab_size=41,
    hidden_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)
FAMILIES = {"llama": LlamaConfig(**SHAPE, tie_word_embeddings=True), "qwen3": Qwen3Config(**SHAPE, head_dim=16)}
LENGTHS = ((5, 7), (9, 3), (2, 8))  # of prompts and responses; two distinct sums
STEPS = 2
LORA = LoraConfig(rank=4)
GATHERED = {"stage3_param_persistence_threshold": 0}  # else parameters this small are left whole on every rank


def write_models(root: Path) -> None:
    torch.manual_seed(0)
    for name, config in FAMILIES.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)


class Attended(TorchDispatchMode):
    """How often attention is computed, beneath whatever checkpointing keeps of it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op.name() in ATTENTION_OPS
        return op(*args, **(kwargs or {}))


@contextmanager
def settings(choice: dict) -> Iterator[None]:
    """Engines made meanwhile have these in DeepSpeed's section zero_optimization."""
    usual = zero.deepspeed_config

    def config(*arguments):
        made = usual(*arguments)
        return made | {"zero_optimization": made["zero_optimization"] | choice}

    zero.deepspeed_config = config
    try:
        yield
    finally:
        zero.deepspeed_config = usual


def engine(
    path: Path,
    device: torch.device,
    dtype: str = "float32",
    recompute: str | int = "none",
    lora: LoraConfig | None = None,
    **optimizer: float,
) -> zero.Engine:
    model = ModelConfig(policy=str(path), dtype=dtype, recompute=recompute)
    adam = OptimizerConfig(lr=1e-2, **optimizer)
    return zero.Engine("policy", str(path), model, EngineConfig(), adam, device, lora, seed=5)


def logprobs(targets: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:
    return prime_kernels.linear_logprob(hidden, weight, targets, bias=bias)


def step(made: zero.Engine, seed: int) -> None:
    """Two micro-batches of other rows on each rank, scored before they are trained on, and an optimizer step."""
    random = torch.Generator().manual_seed(100 * distributed.rank() + seed)
    for lengths in (LENGTHS, LENGTHS[1:]):
        prompts, responses = (
            [torch.randint(41, (length,), generator=random) for length in side] for side in zip(*lengths, strict=True)
        )
        offsets = [sum(map(len, responses[:i])) for i in range(len(responses))]
        pack = packing.pack(range(len(prompts)), prompts, responses, offsets)
        op = partial(logprobs, pack.targets)
        with torch.no_grad():
            made.run(pack, op)
        logprob = made.run(pack, op)
        made.backward(-logprob.mean())
    assert made.step(1e-2).applied


def bits(made: zero.Engine) -> dict[str, torch.Tensor]:
    """The optimizer's states on this rank, and the gathered weights."""
    optimizer, found = made.deepspeed.optimizer, {}
    for index, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        found[f"float32 weights {index}"] = master.detach()
        found |= {f"{key} {index}": optimizer.optimizer.state[master][key] for key in ("exp_avg", "exp_avg_sq")}
    found |= dict(made.weights())
    return {name: tensor.clone() for name, tensor in found.items()}


def differences(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def trained(made: zero.Engine, around: Callable[[zero.Engine], None] = lambda made: None) -> dict[str, torch.Tensor]:
    for seed in range(STEPS):
        step(made, seed)
        around(made)
    return bits(made)


def check_recompute(path: Path, dtype: str, device: torch.device, lora: LoraConfig | None = None) -> None:
    """Every mode; and each computes attention as often as it says."""
    again, results = {"none": 0, 1: 1, "attention-saved": 0, "all": LAYERS}, {}
    for mode, layers in again.items():
        with settings(GATHERED):
            made = engine(path, device, dtype, mode, lora)
        with Attended() as attended:
            results[mode] = trained(made)
        calls = STEPS * 2 * 2  # two micro-batches of two lengths of row
        assert attended.count == calls * (2 * LAYERS + layers), (mode, attended.count)
    for mode, result in results.items():
        assert not (wrong := differences(results["none"], result)), f"recompute={mode}: {wrong}"


def check_parking(path: Path, dtype: str, scratch: Path, device: torch.device, lora: LoraConfig | None = None) -> None:
    """Parked around every step; saved, and loaded into, while parked."""
    straight, parked = (engine(path, device, dtype, lora=lora) for _ in range(2))
    moves = Counter()
    expected, optimizer = trained(straight), parked.deepspeed.optimizer

    def places() -> list[int]:
        return [master.data_ptr() for master in optimizer.fp32_partitioned_groups_flat]

    def around(made: zero.Engine) -> None:
        given_up = [optimizer.grad_partitions_flat_buffer, *(b.buffer for b in optimizer.ipg_buckets.values())]
        for tensor in given_up:
            tensor.fill_(torch.nan)  # nothing of it may be read again
        sizes = [tensor.untyped_storage().nbytes() for tensor in given_up]
        for _ in range(2):
            made.park()
            assert not any(tensor.untyped_storage().nbytes() for tensor in given_up)
        moves[tuple(places())] += 1
        for _ in range(2):
            made.unpark()
            assert [tensor.untyped_storage().nbytes() for tensor in given_up] == sizes
            assert not given_up[0].any()  # the padding of partitions in the sum of gradients counts in their norm
        assert not set(places()) & set(*moves)

    parked.park()  # before the first step there are no moments
    parked.unpark()
    wrong = differences(expected, trained(parked, around))
    assert not wrong, f"parked around every step: {wrong}"
    assert list(moves.values()) == [STEPS], "the buffers are not used again"

    parked.park()
    assert not differences(expected, bits(parked))  # weights are gathered while it is parked
    write(scratch, {shards.file_name(distributed.rank()): parked.states()})
    distributed.barrier()
    loaded = engine(path, device, dtype, lora=lora)
    step(loaded, 9)
    loaded.park()
    loaded.load_states(scratch)
    parked.unpark()
    for made in (straight, parked, loaded):
        step(made, 10)
    for made in (parked, loaded):
        assert not (wrong := differences(bits(straight), bits(made))), f"saved while parked: {wrong}"


def check_traffic(path: Path, device: torch.device) -> None:
    """Reductions beside the backward, and parameters gathered ahead in buckets of any size."""
    results = []
    choices = [{}, {"overlap_comm": True}, *({"stage3_prefetch_bucket_size": size} for size in (0, 10**9))]
    for choice in choices:
        with settings(GATHERED | choice):
            results.append(trained(engine(path, device, "bfloat16")))
    for choice, result in zip(choices, results, strict=True):
        assert not (wrong := differences(results[0], result)), f"{choice}: {wrong}"


if __name__ == "__main__":
    models, scratch = map(Path, sys.argv[1:])
    device = zero.start()
    check_recompute(models / "llama", "bfloat16", device)
    check_parking(models / "qwen3", "bfloat16", scratch, device)
    check_traffic(models / "llama", device)
    check_recompute(models / "llama", "bfloat16", device, LORA)
    check_parking(models / "qwen3", "bfloat16", scratch, device, LORA)
    distributed.barrier()
    if distributed.rank() == 0:
        print(f"{distributed.world_size()} ranks", flush=True)
