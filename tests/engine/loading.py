"""Every model as the trainer loads it, against a plain `from_pretrained`: `torchrun ... loading.py MODELS SCRATCH` on
several ranks, or `check` in this process."""

import sys
from itertools import product
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    initialization,
)

import prime_kernels
from prime_fast.config import EngineConfig, ModelConfig, OptimizerConfig
from prime_fast.engine import distributed, packing, shards, zero
from prime_fast.engine.writing import export, write

SHAPE = dict(
    vocab_size=41,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=48,
    max_position_embeddings=4096,
    bos_token_id=None,
    eos_token_id=1,
)
TURNED = dict(original_max_position_embeddings=1024, factor=4.0)
ROPE = {
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=4.0),
    "yarn": TURNED,
    "llama3": TURNED | dict(low_freq_factor=1.0, high_freq_factor=4.0),
    "longrope": TURNED | dict(long_factor=[4.0] * 16, short_factor=[1.0 + i / 16 for i in range(16)]),
}


class BufferedConfig(LlamaConfig):
    model_type = "prime_fast_buffered"


class Buffered(LlamaForCausalLM):
    """A Llama whose constructor makes buffers of every kind, none of them in the default dtype."""

    config_class = BufferedConfig

    def __init__(self, config):
        super().__init__(config)
        for name, value in self.values().items():
            self.register_buffer(name, value, persistent=name.endswith("kept"))
        self.post_init()

    @staticmethod
    def values():
        return {
            "table_arange": torch.arange(0, 7, 0.7, dtype=torch.float32),
            "table_full": torch.full((3,), 1 / 3, dtype=torch.float32),
            "table_tensor": torch.tensor([0.1, 0.2], dtype=torch.float32),
            "table_double": torch.eye(3, dtype=torch.float64) / 3,
            "table_integers": torch.arange(5),
            "table_kept": torch.linspace(0, 1, 9, dtype=torch.float32),
        }

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            for name, value in self.values().items():
                initialization.copy_(getattr(self, name), value)


AutoConfig.register(BufferedConfig.model_type, BufferedConfig)
AutoModelForCausalLM.register(BufferedConfig, Buffered)


def write_models(root: Path) -> None:
    configs = {
        "llama": LlamaConfig(**SHAPE),
        "qwen2-tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**SHAPE, head_dim=32),
        "mistral": MistralConfig(**SHAPE, sliding_window=5),
        "buffered": BufferedConfig(**SHAPE),
    }
    for kind, parameters in ROPE.items():
        rope = {"rope_type": kind, "rope_theta": 1e4} | parameters
        configs[kind] = LlamaConfig(**SHAPE, rope_parameters=rope)
    torch.manual_seed(0)
    for name, config in configs.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)


def state(model: torch.nn.Module) -> dict[str, object]:
    """Buffers, and the tensors, numbers and words that modules hold as plain attributes, by name; without the LM head,
    which the trainer replaces, and without what says how the model is run."""
    found = dict(model.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            plain = isinstance(value, (torch.Tensor, float, int, str)) and not name.startswith("_")
            if plain and name not in ("training", "gradient_checkpointing", "name_or_path") and path != "lm_head":
                found[f"{path}.{name}"] = value
    return found


def differences(model: torch.nn.Module, weights: dict[str, torch.Tensor], plain: torch.nn.Module) -> list[str]:
    """What the plain model has and this one has not, to the bit."""
    pairs = [("parameter", dict(plain.named_parameters()), weights), ("state", state(plain), state(model))]
    wrong = []
    for kind, expected, got in pairs:
        for name, value in expected.items():
            other = got.get(name)
            if isinstance(value, torch.Tensor):
                same = isinstance(other, torch.Tensor) and other.dtype == value.dtype and torch.equal(other, value)
            else:
                same = other == value
            if not same:
                wrong.append(f"{kind} {name}: {_show(other)} instead of {_show(value)}")
    return wrong


def _show(value: object) -> str:
    return f"{value.dtype} {value.flatten()[:4].tolist()}" if isinstance(value, torch.Tensor) else repr(value)


def gathered(engine: zero.Engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.weights()}


def step(engine: zero.Engine) -> None:
    """Forward, backward and an optimizer step of rate 0 on two rows."""
    prompts, responses = [torch.arange(5), torch.arange(9)], [torch.arange(7), torch.arange(3)]
    pack = packing.pack([0, 1], prompts, responses, [0, 7])
    logprob = engine.run(pack, lambda h, w, bias: prime_kernels.linear_logprob(h, w, pack.targets, bias=bias))
    if engine.trains:
        engine.backward(-logprob.mean())
        assert engine.step(0.0).applied


def check(models: Path, scratch: Path, device: torch.device, tokenizer) -> None:
    """Raises AssertionError naming what differs."""
    names = sorted(path.name for path in models.iterdir())
    whole = ["float32", "bfloat16"] if distributed.world_size() == 1 else ["bfloat16"]
    cases = [(name, dtype, True, False, "none") for name, dtype in product(names, whole)]
    cases += [("llama3", "bfloat16", *case) for case in product((True, False), (True, False), ("none", "cpu"))]
    cases += [("llama3", "float32", True, True, "cpu"), ("llama3", "float32", False, False, "none")]
    for name, dtype, trains, checkpointing, offload in dict.fromkeys(cases):
        case, path = f"{name} {dtype} trains={trains} checkpointing={checkpointing} offload={offload}", models / name
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        model = ModelConfig(policy=str(path), dtype=dtype, recompute="all" if checkpointing else "none")
        optimizer = OptimizerConfig(lr=0.0) if trains else None
        engine = zero.Engine("policy", str(path), model, EngineConfig(offload=offload), optimizer, device)
        for moment in ("loaded", "stepped", "restored"):
            if moment == "stepped":
                step(engine)
            elif moment == "restored":
                if not trains or name not in ("buffered", "llama3"):
                    continue
                write(scratch / case, {shards.file_name(distributed.rank()): engine.states()})
                distributed.barrier()
                engine.load_states(scratch / case)
                export(engine, tokenizer, scratch / case / "saved")
                saved = AutoModelForCausalLM.from_pretrained(scratch / case / "saved", dtype=getattr(torch, dtype))
                wrong = differences(saved, dict(saved.named_parameters()), plain)
                assert not wrong, f"{case}, saved: {wrong}"
            wrong = differences(engine.lm, gathered(engine), plain)
            assert not wrong, f"{case}, {moment}: {wrong}"


if __name__ == "__main__":
    from prime_fast.data.models import load_tokenizer

    models, scratch, tokenizer = map(Path, sys.argv[1:])
    check(models, scratch, zero.start(), load_tokenizer(str(tokenizer)))
    distributed.barrier()
    if distributed.rank() == 0:
        print(f"{distributed.world_size()} ranks", flush=True)
