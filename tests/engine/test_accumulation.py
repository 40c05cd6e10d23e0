import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from transformers import LlamaConfig, LlamaForCausalLM

from prime_fast.config import EngineConfig, ModelConfig, OptimizerConfig
from prime_fast.engine.zero import Engine
from prime_fast.stages.sft import accumulate_nll

SHAPE = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
ROWS = 128
BOUND = 7e-3  # relative, of the whole gradient; float32 sums keep 4.8e-3, bfloat16 ones reach 1.2e-2


def gradient(path, dtype, device, micro_tokens, offload="none"):
    """Of the mean NLL over the rows, as AdamW's first moment is a tenth of it; and the number of micro-batches."""
    model = ModelConfig(policy=path, dtype=dtype)
    engine = Engine("sft", path, model, EngineConfig(offload=offload), OptimizerConfig(lr=0.0, grad_clip=0.0), device)
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 64, (4,), generator=random) for _ in range(ROWS)]
    responses = [torch.randint(0, 16, (16 + row % 8,), generator=random) for row in range(ROWS)]
    backward, count = engine.backward, []
    engine.backward = lambda loss: count.append(1) or backward(loss)
    accumulate_nll(engine, prompts, responses, micro_tokens)
    assert engine.step(0.0).applied
    moments = [safe_get_full_optimizer_state(p, "exp_avg").flatten() for p in engine.lm.parameters()]
    return 10 * torch.cat(moments), len(count)


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_bfloat16_gradient_does_not_depend_on_the_number_of_micro_batches(offload, tmp_path, device):
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, intermediate_size=128, max_position_embeddings=64, initializer_range=0.08)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    exact, _ = gradient(str(tmp_path), "float32", device, 10**6)
    whole, one = gradient(str(tmp_path), "bfloat16", device, 10**6, offload)
    parts, many = gradient(str(tmp_path), "bfloat16", device, 28, offload)
    assert (one, many) == (1, ROWS)
    assert (parts - whole).norm() / whole.norm() < BOUND
    assert (parts - exact).norm() <= (whole - exact).norm()  # a whole batch in one backward rounds more, if anything
