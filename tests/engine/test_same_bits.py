import processes
import pytest
import same_bits
import torch
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM

from prime_fast.engine import recompute
from prime_fast.engine.recompute import Recompute


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    same_bits.write_models(root)
    return root


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_recomputing_changes_no_bit_and_only_what_is_asked_for_is_recomputed(family, models, device):
    same_bits.check_recompute(models / family, "float32" if family == "llama" else "bfloat16", device)


@pytest.mark.parametrize("lora", [None, same_bits.LORA], ids=["whole", "lora"])
def test_parking_changes_no_bit(lora, models, tmp_path, device):
    same_bits.check_parking(models / "llama", "float32", tmp_path, device, lora)


def test_on_two_ranks_as_well_and_neither_does_traffic(models, tmp_path):
    result = processes.torchrun(2, same_bits.__file__, models, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.endswith("2 ranks\n")


def test_gradients_that_wait_for_their_step_are_not_parked(models, device):
    made = same_bits.engine(models / "llama", device)
    whole = made.step
    made.step = lambda lr: made.park()
    with pytest.raises(RuntimeError, match="gradients wait for their step"):
        same_bits.step(made, 0)
    whole(0.0)
    made.park()
    with pytest.raises(RuntimeError, match="the policy's optimizer states are parked"):
        same_bits.step(made, 0)


@pytest.mark.parametrize(("setting", "layers"), [("none", 0), (0, 0), (2, 2), (3, 3), ("all", 3)])
def test_the_first_layers_are_recomputed(setting, layers):
    lm = AutoModelForCausalLM.from_config(same_bits.FAMILIES["llama"])
    recompute.enable(lm, setting, "tiny")
    on = [layer.gradient_checkpointing for layer in lm.model.layers]
    assert on == [True] * layers + [False] * (3 - layers)
    assert Recompute.fixed(Recompute.fixed(setting, 3, "tiny").setting, 3, "tiny").layers == layers


def test_more_layers_than_there_are():
    lm = AutoModelForCausalLM.from_config(same_bits.FAMILIES["llama"])
    with pytest.raises(ValueError, match="model.recompute=4 is more than the 3 layers of tiny; give no more, or let"):
        recompute.enable(lm, 4, "tiny")


def attention(query, key, value):
    """Of one row, on heads first: a plain stand-in for kernels that this machine has not."""
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return output, query.new_zeros(query.shape[:-1]).float()


@pytest.fixture(scope="module")
def flash_attn():
    """The op that flash-attn 2.7 registers (flash_attn_interface.py), by its name, with a backward through torch's."""

    @torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return attention(q, k, v)

    def backward(context, gradient, _):
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in context.saved_tensors]
            return torch.autograd.grad(attention(*inputs)[0], inputs, gradient)

    forward.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    return lambda x: forward(x, x, x)[0]


@pytest.fixture(scope="module")
def torch_varlen():
    """torch's own op, with kernels for a CPU."""

    @varlen._varlen_attn.register_kernel("cpu")
    def forward(q, k, v, *_, **__):
        return (*attention(q, k, v), torch.zeros(2, dtype=torch.uint64))

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def backward(gradient, q, k, v, *_, **__):
        return gradient.clone(), gradient.clone(), gradient.clone()

    cu = torch.tensor([0, 4], dtype=torch.int32)
    return lambda x: varlen.varlen_attn(x, x, x, cu, cu, 4, 4)


@pytest.mark.parametrize("kernel", ["flash_attn", "torch_varlen"])
def test_kernels_of_a_gpu_are_kept_too(kernel, request):
    attend = request.getfixturevalue(kernel)
    x = torch.randn(4, 2, 8, requires_grad=True)
    gradients = []
    for run in (lambda layer, x: layer(x), recompute._all_but_attention):
        with same_bits.Attended() as attended:
            (gradient,) = torch.autograd.grad(run(lambda x: attend(2 * x).exp(), x).sum(), x)
        gradients.append(gradient)
        assert attended.count == 1
    assert torch.equal(*gradients)


def test_attention_that_cannot_be_kept_is_an_error():
    x = torch.randn(4, 8, requires_grad=True)
    with pytest.raises(ValueError, match="attention-saved finds no attention that it could keep"):
        recompute._all_but_attention(lambda x: (x @ x.T).softmax(-1) @ x, x)
    with torch.no_grad():
        recompute._all_but_attention(lambda x: x, x)
