import copy
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import prime_kernels
from prime_fast.engine.model import PackedLM
from prime_fast.engine.packing import pack

SHAPE = dict(
    vocab_size=41,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2-tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "mistral-window-5": MistralConfig(**SHAPE, sliding_window=5),
}


def rows(seed=0, count=7):
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, 41, (length,), generator=generator)

    prompts = [tokens(2, 9) for _ in range(count)]
    responses = [tokens(1, 12) for _ in range(count)]
    offsets = [0]
    for response in responses:
        offsets.append(offsets[-1] + len(response))
    return prompts, responses, offsets


def gradients(model, packs, op_for):
    model.zero_grad()
    values = []
    for part in packs:
        loss, value = op_for(part)
        values.append((part, value.detach()))
        loss.backward()
    return values, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_the_plain_model_row_by_row(name):
    """Log-probs, policy loss, PRM loss and every gradient, against an unpatched model in float64."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").double()
    packed = PackedLM(copy.deepcopy(plain)).float()
    prompts, responses, offsets = rows()
    total = offsets[-1]
    generator = torch.Generator().manual_seed(3)
    old, advantage = -3 + torch.randn(total, generator=generator), torch.randn(total, generator=generator)
    ref, outcome = -3 + torch.randn(total, generator=generator), torch.rand(len(prompts), generator=generator)

    expected = torch.zeros(total, dtype=torch.float64)
    policy_loss = prm_loss = 0
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logits = plain(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logprob = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        part = slice(offsets[i], offsets[i + 1])
        expected[part] = logprob.detach()
        ratio = (logprob - old[part]).exp()
        policy_loss = (
            policy_loss + torch.maximum(-advantage[part] * ratio, -advantage[part] * ratio.clamp(0.8, 1.2)).sum()
        )
        score = 0.05 * (logprob - ref[part]).sum()
        prm_loss = prm_loss + torch.nn.functional.binary_cross_entropy_with_logits(score, outcome[i].double())
    whole = pack(range(len(prompts)), prompts, responses, offsets)

    def policy_op(part):
        op = partial(prime_kernels.linear_policy_loss)
        weights = torch.full((len(part.targets),), 1 / total)
        result = packed(
            part,
            lambda h, w, bias: op(h, w, part.targets, part.select(old), part.select(advantage), weights, bias=bias),
        )
        return result.loss, result.logprob

    def prm_op(part):
        weights = torch.full((len(part.rows),), 1 / len(prompts))
        result = packed(
            part,
            lambda h, w, bias: prime_kernels.linear_prm_loss(
                h, w, part.targets, part.select(ref), part.select_rows(outcome), part.cu_response, row_weight=weights
            ),
        )
        return result.loss, result.logprob

    for op, loss in ((policy_op, policy_loss / total), (prm_op, prm_loss / len(prompts))):
        plain.zero_grad()
        loss.backward(retain_graph=True)
        truth = dict(plain.named_parameters())
        values, grads = gradients(packed, [whole], op)
        flat = torch.zeros(total)
        for part, value in values:
            part.put(flat, value)
        torch.testing.assert_close(flat.double(), expected, rtol=1e-5, atol=1e-5)
        for parameter, grad in grads.items():
            exact = truth[parameter.removeprefix("lm.")].grad
            error = (grad.double() - exact).norm() / exact.norm().clamp(min=1e-12)
            assert error < 1e-5, (parameter, float(error))


@pytest.mark.parametrize(
    "parts", [[[0], [1], [2], [3], [4], [5], [6]], [[6, 0, 3], [2, 1], [5, 4]], [[0, 1, 2, 3, 4, 5, 6]]]
)
def test_any_split_gives_the_same_logprobs_and_gradients(parts):
    torch.manual_seed(1)
    model = PackedLM(AutoModelForCausalLM.from_config(CONFIGS["llama"]))
    prompts, responses, offsets = rows(5)

    def op(part):
        logprob = model(part, lambda h, w, bias: prime_kernels.linear_logprob(h, w, part.targets, bias=bias))
        return -logprob.sum() / offsets[-1], logprob

    results = []
    for split in (parts, [list(range(7))[::-1]]):
        values, grads = gradients(model, [pack(part, prompts, responses, offsets) for part in split], op)
        flat = torch.zeros(offsets[-1])
        for part, value in values:
            part.put(flat, value)
        results.append((flat, grads))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-4, atol=1e-6)


def test_a_row_does_not_see_its_neighbours():
    torch.manual_seed(2)
    model = PackedLM(AutoModelForCausalLM.from_config(CONFIGS["qwen3"]))
    prompts, responses, offsets = rows(7)
    op = lambda part: lambda h, w, bias: prime_kernels.linear_logprob(h, w, part.targets, bias=bias)  # noqa: E731
    before = pack([0, 1, 2], prompts, responses, offsets)
    changed = [prompts[0], torch.randint(0, 41, prompts[1].shape), prompts[2]]
    after = pack([0, 1, 2], changed, responses, offsets)
    flats = []
    with torch.no_grad():
        for part in (before, after):
            flat = torch.zeros(offsets[-1])
            part.put(flat, model(part, op(part)))
            flats.append(flat)
    other = [*range(offsets[0], offsets[1]), *range(offsets[2], offsets[3])]
    assert torch.equal(flats[0][other], flats[1][other])
    assert not torch.equal(flats[0][offsets[1] : offsets[2]], flats[1][offsets[1] : offsets[2]])


def test_gradient_checkpointing_changes_nothing():
    prompts, responses, offsets = rows(9)
    part = pack(range(7), prompts, responses, offsets)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        lm = AutoModelForCausalLM.from_config(CONFIGS["llama"])
        lm.config.use_cache = False
        if checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        model = PackedLM(lm).train()
        model(part, lambda h, w, bias: -prime_kernels.linear_logprob(h, w, part.targets, bias=bias).sum()).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_names_are_hugging_faces(name):
    plain = AutoModelForCausalLM.from_config(CONFIGS[name])
    names = set(plain.state_dict())
    assert set(PackedLM(plain).lm.state_dict()) == names
