from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prime_fast.evaluation import bestofn
from prime_fast.evaluation.bestofn import best_of, implicit_rewards, majority, pass_at

PROBLEMS, SAMPLES = 12, 6
SIZES = [1, 2, 3, 5, 6]


@pytest.fixture
def draws():
    """scores with ties, answers with abstentions, solved."""
    rng = np.random.default_rng(0)
    scores = rng.integers(4, size=(PROBLEMS, SAMPLES)).astype(float)
    answers = [[None if a == 0 else "abc"[a - 1] for a in row] for row in rng.integers(4, size=(PROBLEMS, SAMPLES))]
    answers[0] = [None] * SAMPLES
    return scores, answers, rng.random((PROBLEMS, SAMPLES)) < 0.4


def by_enumeration(choose, solved, n):
    """The mean over all subsets of the mean over the samples that choose(problem, subset) returns as equally good."""
    subsets = list(combinations(range(SAMPLES), n))
    return [np.mean([right[list(choose(i, subset))].mean() for subset in subsets]) for i, right in enumerate(solved)]


@pytest.mark.parametrize("n", SIZES)
def test_best_of(draws, n):
    scores, _, solved = draws

    def choose(i, subset):
        best = max(scores[i][k] for k in subset)
        return [k for k in subset if scores[i][k] == best]

    np.testing.assert_allclose(best_of(scores, solved, n), by_enumeration(choose, solved, n))


@pytest.mark.parametrize("n", SIZES)
def test_pass_at(draws, n):
    _, _, solved = draws

    def choose(i, subset):
        return [k for k in subset if solved[i][k]] or subset

    np.testing.assert_allclose(pass_at(solved, n), by_enumeration(choose, solved, n), atol=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_majority(draws, n):
    _, answers, _ = draws
    solved = np.array([[answer == "a" for answer in row] for row in answers])
    solved[0, 2] = True  # nobody votes, one is right

    def choose(i, subset):
        given = [answers[i][k] for k in subset if answers[i][k] is not None]
        top = [a for a in sorted(set(given)) if given.count(a) == max(map(given.count, given))]
        return [next(k for k in subset if answers[i][k] == a) for a in top] or subset

    np.testing.assert_allclose(majority(answers, solved, n), by_enumeration(choose, solved, n))


def test_majority_of_many_is_sampled(monkeypatch, draws):
    _, answers, solved = draws
    exact = majority(answers, solved, 3)
    monkeypatch.setattr(bestofn, "MAX_SUBSETS", 19)
    assert 0 < np.abs(majority(answers, solved, 3) - exact).max() < 0.35
    np.testing.assert_array_equal(majority(answers, solved, 6), majority(answers, solved, 6))


def test_implicit_rewards(workspace, tmp_path):
    reference = str(workspace / "model")
    lm = AutoModelForCausalLM.from_pretrained(reference)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    lm.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 1), (5, 7), (3, 4), (9, 2)]
    prompts = [torch.randint(18, (size,), generator=generator) for size, _ in sizes]
    responses = [torch.randint(18, (size,), generator=generator) for _, size in sizes]
    options = {"beta": 0.05, "dtype": torch.float32, "device": torch.device("cpu")}
    scores = implicit_rewards(str(tmp_path), reference, prompts, responses, **options)
    for score, prompt, response in zip(scores, prompts, responses, strict=True):
        row = torch.cat([prompt, response])[None]
        logprobs = [
            model(row).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, response[:, None]).sum()
            for model in (lm, AutoModelForCausalLM.from_pretrained(reference))
        ]
        assert float(score) == pytest.approx(0.05 * float((logprobs[0] - logprobs[1]).detach()), abs=1e-6)
    same = implicit_rewards(reference, reference, prompts, responses, **options)
    assert same.tolist() == [0.0] * len(sizes)
