from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prime_fast.evaluation import bestofn
from prime_fast.evaluation.bestofn import answer_of, best_of, implicit_rewards, majority, pass_at
from prime_fast.evaluation.report import bootstrap, wilson

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


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{ 1 / 2 } or \boxed{3}.", "3"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("5 apples and 1,234.50 pears.", "1234.50"),
        ("3*9=7,7-6=1", "1"),
        ("#### -12", "-12"),
        ("It is blue.", "Itisblue"),
        ("  ", None),
    ],
)
def test_answers(response, answer):
    assert answer_of(response, "math") == answer


def test_code_votes_as_a_whole():
    assert answer_of("x = 1\n", "code") == "x = 1" and answer_of("x = 12\n", "code") == "x = 12"


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


def test_wilson():
    assert wilson(0, 10) == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    assert wilson(99, 100) == pytest.approx((0.99, 0.9455, 0.9982), abs=1e-4)


def test_bootstrap():
    rng = np.random.default_rng(1)
    small, large = (rng.random(40) < 0.5).astype(float), (rng.random(4000) < 0.9).astype(float)
    assert bootstrap([np.ones(7)]) == (1.0, 1.0, 1.0)
    one = bootstrap([large])
    deviation = large.std() / np.sqrt(len(large))
    assert one.value == pytest.approx(large.mean())
    assert (one.high - one.low) / 2 == pytest.approx(1.96 * deviation, rel=0.1)
    both = bootstrap([small, large])  # benchmarks count alike, however many problems they have
    assert both.value == pytest.approx((small.mean() + large.mean()) / 2)
    assert (both.high - both.low) / 2 == pytest.approx(1.96 * small.std() / np.sqrt(40) / 2, rel=0.15)
