import loading
import processes
import pytest
import torch
from transformers import AutoModelForCausalLM

from prime_fast.data.models import load_tokenizer
from prime_fast.engine.model import PackedLM
from prime_fast.evaluation import bestofn
from prime_fast.rollout.hf import HFEngine


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    loading.write_models(root)
    return root


def test_every_parameter_and_buffer_is_that_of_from_pretrained(models, tmp_path, workspace, device):
    """Llama with every RoPE type, Qwen2, Qwen3, Mistral and one full of buffers; float32 and bfloat16; trained as
    policy, PRM and SFT are, frozen as the reference is; with and without checkpointing and offload; as loaded, after a
    step, after a restart, and as saved."""
    loading.check(models, tmp_path, device, load_tokenizer(str(workspace / "model")))


def test_on_two_ranks_as_well(models, tmp_path, workspace):
    result = processes.torchrun(2, loading.__file__, models, tmp_path, workspace / "model")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.endswith("2 ranks\n")


@pytest.mark.parametrize("name", ["buffered", "llama3"])
def test_the_embedded_engine_and_best_of_n_load_plainly(name, models, monkeypatch):
    path = str(models / name)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    engine = HFEngine(path, [1], dtype=torch.bfloat16, device=torch.device("cpu"))
    loaded = [engine.model]
    monkeypatch.setattr(bestofn, "PackedLM", lambda lm: loaded.append(lm) or PackedLM(lm))
    rows = [torch.arange(4)], [torch.arange(3)]
    bestofn.response_logprobs(path, *rows, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert len(loaded) == 2
    for model in loaded:
        assert loading.differences(model, dict(model.named_parameters()), plain) == []
