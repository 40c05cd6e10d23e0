import copy
import inspect
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    StableLmConfig,
)

import prime_kernels
from prime_fast.engine import model as engine_model
from prime_fast.engine.model import PackedLM
from prime_fast.engine.packing import pack
from prime_fast.engine.zero import attention_share

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


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_names_are_hugging_faces(name):
    plain = AutoModelForCausalLM.from_config(CONFIGS[name])
    names = set(plain.state_dict())
    assert set(PackedLM(plain).lm.state_dict()) == names


def plain_varlen(q, k, v, cu, scale, left):
    """Causal attention of each row over the last left + 1 tokens (all if left is -1): q (T, heads, d), k and v
    (T, kv_heads, d) -> (T, heads, d), in float64."""
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    rows = []
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", *(tensor[start:end].double() for tensor in (q, k))) * scale
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        rows.append(torch.einsum("hqk,khd->qhd", weights, v[start:end].double()))
    return torch.cat(rows)


def torch_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    assert q.shape == k.shape == v.shape and window_size[1] == 0 and isinstance(window_size, tuple)
    return plain_varlen(q, k, v, cu_q, scale, window_size[0])


def torch_2_13(
    q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert (q.shape == k.shape or enable_gqa) and window_size[1] == 0 and isinstance(window_size, tuple)
    return plain_varlen(q, k, v, cu_q, scale, window_size[0])


def flash_attn_2(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal, window_size):
    assert causal and window_size in ((-1, -1), (4, 0))
    return plain_varlen(q, k, v, cu_q, softmax_scale, window_size[0])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kernel", [torch_2_11, torch_2_13, flash_attn_2], ids=lambda kernel: kernel.__name__)
def test_the_attention_kernels_of_a_gpu_are_asked_for_what_the_cpu_computes(kernel, window, monkeypatch):
    """The kernels themselves need a GPU; their signatures and what the arguments mean do not."""
    generator = torch.Generator().manual_seed(6)
    prompts, responses, offsets = rows(6)
    layout = pack(range(7), prompts, responses, offsets).layout
    q, k, v = (torch.randn(int(layout.cu_seqlens[-1]), n, 8, generator=generator) for n in (4, 2, 2))
    real = inspect.signature(varlen.varlen_attn)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(engine_model, "flash_attn", lambda: kernel)
    attend = engine_model._flash_attn if kernel is flash_attn_2 else engine_model._torch_varlen
    got = attend(q, k, v, 0.3, 0.0, window, layout)
    expected = engine_model._by_length(q, k, v, 0.3, 0.0, window, layout)
    torch.testing.assert_close(got.float(), expected, rtol=1e-5, atol=1e-6)
    assert {"scale", "window_size"} <= set(real.parameters)  # of the torch that is installed


@pytest.mark.parametrize("installed", ["nothing", "a namespace, as flash-attn 4 is", "a broken build", "flash-attn 2"])
def test_flash_attn_counts_only_if_its_function_can_be_imported(installed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    del sys.modules["flash_attn"]
    if installed != "nothing":
        (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    if installed == "a broken build":
        (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol')")
    elif installed == "flash-attn 2":
        (tmp_path / "flash_attn" / "__init__.py").write_text("def flash_attn_varlen_func(): ...")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = engine_model.flash_attn.__wrapped__()
    assert (found is not None) == (installed == "flash-attn 2")
    told = any("flash-attn is installed but not usable" in str(warning.message) for warning in warned)
    assert told == (installed not in ("nothing", "flash-attn 2"))


TINY = SHAPE | dict(pad_token_id=0, bos_token_id=0, eos_token_id=0)
REFUSED = {
    "this one scales its logits .final_logit_softcapping": Gemma2Config(**TINY),
    "this one scales its logits .logit_scale": CohereConfig(**TINY),
    "this one has linear_attention layers": Qwen3NextConfig(**TINY),
    "Gemma2Attention asks for softcap": Gemma2Config(**TINY, final_logit_softcapping=None),
    "GptOssAttention asks for s_aux": GptOssConfig(**TINY),
    "StableLmAttention takes no row boundaries": StableLmConfig(**TINY),
    "their attention cannot be replaced": FalconConfig(**TINY),
    "a row has 18 tokens, and beyond 17 this model's RoPE changes": LlamaConfig(
        **TINY, max_position_embeddings=17, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_that_packed_rows_would_compute_wrongly_are_refused(reason):
    part = pack([0], [torch.arange(9)], [torch.arange(10)], [0])
    with pytest.raises(ValueError, match=reason), torch.no_grad():
        PackedLM(AutoModelForCausalLM.from_config(REFUSED[reason]))(part, lambda h, w, bias: h)


@pytest.mark.parametrize("what", ["attention_mask", "position_bias", "is not causal"])
def test_attention_that_asks_for_more_is_refused(what):
    part = pack([0], [torch.arange(9)], [torch.arange(10)], [0])
    module, tensor = SimpleNamespace(is_causal=what != "is not causal"), torch.zeros(1, 2, 18, 4)
    more = {} if "causal" in what else {what: torch.zeros(18, 18)}
    with pytest.raises(ValueError, match=what):
        engine_model.packed_attention(
            module, tensor, tensor, tensor, scaling=1.0, layout=part.layout, **{"attention_mask": None} | more
        )


def test_the_share_of_attention_is_that_of_its_flops(workspace):
    """Against torch's own count of a forward, of whose attention causality leaves half out."""
    from torch.utils.flop_counter import FlopCounterMode

    lm = AutoModelForCausalLM.from_pretrained(workspace / "model", attn_implementation="eager")
    for parameter in lm.parameters():
        parameter.ds_numel = parameter.numel()
    counts = []
    for length in (40, 80):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            lm.base_model(torch.zeros(1, length, dtype=torch.int64))
        total, attends = counter.get_total_flops(), 0
        for operator, flops in counter.get_flop_counts()["Global"].items():
            attends += flops * ("bmm" in str(operator))
        counts.append((total - attends / 2, length))
    (short, n), (long, m) = counts
    share = attention_share(lm)
    assert long / short == pytest.approx(m * (1 + share * m) / (n * (1 + share * n)), rel=1e-2)
