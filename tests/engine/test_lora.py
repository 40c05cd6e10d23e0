"""An adapter, and the model without it, against peft and against the model as it was loaded."""

from functools import partial

import peft
import pytest
import same_bits
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prime_fast.config import EngineConfig, LoraConfig, ModelConfig
from prime_fast.engine import packing, zero
from prime_fast.engine.lora import Trunk
from prime_fast.engine.writing import write
from prime_fast.memory.shapes import adapter

FAMILY = {"float32": "qwen3", "bfloat16": "llama"}
PROMPTS, RESPONSES = (
    [torch.arange(length) * 7 % 41 for length in side] for side in zip(*same_bits.LENGTHS, strict=True)
)


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    same_bits.write_models(root)
    return root


def the_pack():
    offsets = [sum(map(len, RESPONSES[:i])) for i in range(len(RESPONSES))]
    return packing.pack(range(len(PROMPTS)), PROMPTS, RESPONSES, offsets)


def logprobs(engine):
    pack, flat = the_pack(), torch.zeros(sum(map(len, RESPONSES)))
    with torch.no_grad():
        pack.put(flat, engine.run(pack, partial(same_bits.logprobs, pack.targets)))
    return flat


def dense(model):
    """The same log-probs, row by row through the logits."""
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.cat([prompt, response])
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, response[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("dtype", FAMILY)
def test_the_adapter_begins_as_nothing_and_off_it_is_the_frozen_model(dtype, models, device):
    path = str(models / FAMILY[dtype])
    made = same_bits.engine(path, device, dtype, lora=same_bits.LORA)
    frozen = zero.Engine("reference", path, ModelConfig(policy=path, dtype=dtype), EngineConfig(), None, device)
    reference, expected = Trunk("reference", made), logprobs(frozen)
    assert torch.equal(logprobs(made), expected) and torch.equal(logprobs(reference), expected)
    same_bits.step(made, 0)
    assert made.parameters_without_gradient() == []
    assert torch.equal(logprobs(reference), expected)
    assert made.deepspeed.training and not torch.equal(logprobs(made), expected)
    merged = dict(made.weights())
    assert merged.keys() == dict(frozen.weights()).keys()
    moved = {name for name, tensor in frozen.weights() if not torch.equal(merged[name], tensor)}
    assert {name.split(".")[-2] for name in moved} == set(made.adapter.config.target_modules) and len(moved) == 7 * 3


def test_gradients_and_files_are_pefts(models, tmp_path, device):
    """Of a scale other than 1. The merged model and the adapter say the same; the gradients are those of float64."""
    path = models / "llama"
    lora = LoraConfig(rank=3, alpha=8, targets=["q_proj", "o_proj", "down_proj"])
    made = same_bits.engine(path, device, lora=lora, grad_clip=0.0)
    same_bits.step(made, 0)
    same_bits.step(made, 1)  # from here on A has gradients too
    write(tmp_path / "prm", made.exported(NoTokenizer()))
    names = {name for name, _ in adapter(str(path), "prm", lora)}
    assert names == {name for name, _ in made.trained} and len(names) == 2 * 3 * 3

    with torch.no_grad():
        merged = dense(AutoModelForCausalLM.from_pretrained(tmp_path / "prm"))
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "prm" / "adapter", is_trainable=True).double()
    for name, tensor in load_file(tmp_path / "prm" / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(theirs.get_parameter(name.replace(".weight", ".default.weight")).float(), tensor)
    expected = dense(theirs)
    torch.testing.assert_close(merged.double(), expected.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(logprobs(made).double(), expected.detach(), rtol=0, atol=1e-5)

    expected.mean().backward()
    before = moments(made)
    pack = the_pack()
    made.backward(made.run(pack, partial(same_bits.logprobs, pack.targets)).mean())
    made.step(0.0)
    for name, moment in moments(made).items():
        want = theirs.base_model.model.get_parameter(name).grad
        got = (moment.double() - 0.9 * before[name].double()) / (1 - 0.9)
        assert (got - want).norm() < 1e-5 * want.norm(), name


def moments(engine):
    find = zero.deepspeed.utils.safe_get_full_optimizer_state
    return {name: find(parameter, "exp_avg").clone() for name, parameter in engine.trained}


def test_targets_are_linear_layers(models, device):
    with pytest.raises(ValueError, match=r"policy.lora.targets names 'lm_head', .* of down_proj, gate_proj, k_proj, o"):
        same_bits.engine(models / "llama", device, lora=LoraConfig(targets=["q_proj", "lm_head"]))
