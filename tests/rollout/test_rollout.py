import pytest
import torch
from engines import EOS, start_engine
from transformers import AutoModelForCausalLM

from prime_fast.rollout import EngineError
from prime_fast.rollout.hf import _sample

STOP = 6  # an ordinary token
ENDS = (EOS, STOP)


@pytest.fixture(scope="module", params=["hf", "vllm"])
def engine(request, workspace):
    engine = start_engine(request.param, workspace / "model", batch=16, ends=ENDS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 9, 4, 4, 7, 1, 12]
    return [torch.randint(2, 18, (length,), generator=generator).tolist() for length in lengths]


def seeds(prompts, k=3):
    return [[100 * i + j for j in range(k)] for i in range(len(prompts))]


def nucleus(logits, top_p):
    """(L, V) log-probs of the smallest set of tokens of at least that probability, the definition taken literally."""
    result = torch.full_like(logits, -torch.inf)
    for row, probabilities in enumerate(logits.double().softmax(-1)):
        mass, chosen = 0.0, []
        for token in probabilities.argsort(descending=True).tolist():
            if top_p < 1 and mass >= top_p:
                break
            chosen.append(token)
            mass += probabilities[token]
        result[row, chosen] = (probabilities[chosen] / mass).log().float()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (0.0, 1.0), (1.0, 0.7), (0.6, 0.9), (0.0, 0.7)]
)
def test_logprobs_are_the_models_own(engine, workspace, prompts, temperature, top_p):
    """Greedy ones of the whole vocabulary. A response ends with the first EOS or stop token."""
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    results = engine.generate(prompts, seeds(prompts), max_tokens=20, temperature=temperature, top_p=top_p)
    assert [len(samples) for samples in results] == [3] * len(prompts)
    lengths, ends, outside = set(), set(), 0
    for prompt, samples in zip(prompts, results, strict=True):
        for sample in samples:
            ids = torch.cat([torch.tensor(prompt), sample.tokens])
            with torch.no_grad():
                logits = model(ids[None]).logits[0, len(prompt) - 1 : -1] / (temperature or 1.0)
            allowed = nucleus(logits, top_p if temperature else 1.0)
            outside += int(allowed.isinf().sum())
            expected = allowed.gather(1, sample.tokens[:, None])[:, 0]
            torch.testing.assert_close(sample.logprob, expected, rtol=0, atol=1e-5)
            assert sample.truncated == (sample.tokens[-1] not in ENDS)
            assert not torch.isin(sample.tokens[:-1], torch.tensor(ENDS)).any()
            assert len(sample.tokens) == 20 or not sample.truncated
            lengths.add(len(sample.tokens))
            ends.add(int(sample.tokens[-1]))
            if temperature == 0:
                assert torch.equal(sample.tokens, logits.argmax(-1))
    assert temperature == 0 or (len(lengths) > 3 and STOP in ends)
    assert (outside > 0) == (temperature > 0 and top_p < 1)


def test_a_seed_fixes_its_sample_whatever_else_is_generated(engine, prompts):
    together = engine.generate(prompts, seeds(prompts), max_tokens=15, temperature=1.0)
    for i, (prompt, row) in enumerate(zip(prompts, seeds(prompts), strict=True)):
        alone = engine.generate([prompt], [row[1:2]], max_tokens=15, temperature=1.0)[0][0]
        assert torch.equal(alone.tokens, together[i][1].tokens)
    other = engine.generate(
        prompts, [[s + 1000 for s in row] for row in seeds(prompts)], max_tokens=15, temperature=1.0
    )
    assert any(
        not torch.equal(a.tokens, b.tokens)
        for x, y in zip(together, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(200_000, 4)
    draws = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprob = _sample(logits, draws, temperature=2.0)
    share = torch.bincount(tokens, minlength=4) / len(tokens)
    expected = (logits[0] / 2).softmax(-1)
    torch.testing.assert_close(share, expected, rtol=0, atol=5e-3)
    torch.testing.assert_close(logprob, expected.log()[tokens])
    edges, _ = _sample(logits[:2], torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64), temperature=1.0)
    assert edges.tolist() == [0, 3]


def test_draws_stay_in_the_nucleus():
    """The last token of it is chosen at the end of the draws, not one of probability 0 behind it."""
    probabilities = torch.tensor([[0.05, 0.4, 0.3, 0.15, 0.1]]).log().expand(200_000, 5)
    draws = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws[0], draws[1] = 0.0, 1 - 1e-16
    tokens, logprob = _sample(probabilities, draws, temperature=1.0, top_p=0.8)
    expected = torch.tensor([0.0, 0.4, 0.3, 0.15, 0.0]) / 0.85
    torch.testing.assert_close(torch.bincount(tokens, minlength=5) / len(tokens), expected, rtol=0, atol=5e-3)
    torch.testing.assert_close(logprob, expected.log()[tokens])
    assert tokens[:2].tolist() == [1, 3]
    one, logprob = _sample(probabilities[:9], draws[:9], temperature=1.0, top_p=1e-6)
    assert set(one.tolist()) == {1} and not logprob.any()


def test_weights_must_be_complete_and_known(engine, workspace):
    weights = AutoModelForCausalLM.from_pretrained(workspace / "model").state_dict()
    with pytest.raises(EngineError, match="model.norm.weight"):
        engine.load_weights((name, tensor) for name, tensor in weights.items() if name != "model.norm.weight")
    engine.load_weights(weights.items())
    with pytest.raises((EngineError, ValueError), match="lm_head.wait"):
        engine.load_weights([*weights.items(), ("lm_head.wait", torch.zeros(1))])
