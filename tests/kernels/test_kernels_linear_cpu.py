import pytest
import torch
from linear_backend_cases import *  # noqa: F403
from linear_backend_cases import CUTS, LOSSES, close, close_grads, doubled, grads, make, vectors

import prime_kernels
from prime_kernels import linear_logprob, linear_policy_loss, linear_prm_loss


@pytest.fixture
def backend():
    assert prime_kernels.backends()["linear_logprob"]["cpu"] == "ok", "build prime_kernels._C: pip install -e ."
    return "cpu"


def policy(hidden, weight, bias, targets, **options):
    """In the dtype of the vectors: that of hidden, or float32."""
    vector = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    old, advantage, token_weight, _ = (x.to(vector) for x in vectors())
    return linear_policy_loss(hidden, weight, targets, old, advantage, token_weight, bias=bias, **options)


def prefix(hidden, weight, bias, targets, **options):
    vector = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = vectors()[3].to(vector), torch.tensor([0, 1, 0.25, 1], dtype=vector), torch.tensor(CUTS)
    odds = LOSSES["prefix"]["intercept"].to(vector)
    return linear_prm_loss(hidden, weight, targets, *rows, bias=bias, intercept=odds, every_prefix=True, **options)


@pytest.mark.parametrize("op", [policy, prefix])
def test_bfloat16_inputs(backend, rows_of_a_chunk, op):
    *inputs, targets = make(dtype=torch.bfloat16, bias=True)
    got = op(*inputs, targets, backend=backend)
    inputs_ = doubled(*inputs)
    want = op(*inputs_, targets)
    close(got, want, atol=1e-5)
    for g, w in zip(grads(got.loss, *inputs), grads(want.loss, *inputs_), strict=True):
        assert g.dtype == torch.bfloat16
        assert ((g.double() - w).abs() <= 2**-8 * w.abs() + 2e-5 * w.abs().max()).all()


@pytest.mark.parametrize("target", [-1, 37])
def test_a_target_outside_the_vocabulary_is_refused(backend, target):
    hidden, weight, _, targets = make()
    targets[7] = target
    with pytest.raises(ValueError, match=f"targets holds {target}, needs 0 <= id < 37"):
        linear_logprob(hidden, weight, targets, backend=backend)


@pytest.mark.parametrize("exact", [True, False])
def test_a_full_vocabulary(backend, exact):
    """V = 151936, logits of deviation 3.1 and every other target the likeliest token, as a trained model's.

    One-hot hidden states make the GEMM exact: what is left is the row kernel's own error, half an ulp of the result.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.eye(48) if exact else torch.randn(48, 48, generator=generator) / 48**0.5
    weight = torch.randn(151936, 48, generator=generator) * 3.1
    targets = torch.where(torch.arange(48) % 2 == 0, (hidden @ weight.T).argmax(1), torch.arange(48) * 3000)
    want = linear_logprob(hidden.double(), weight.double(), targets, entropy=True)
    got = linear_logprob(hidden, weight, targets, entropy=True, backend=backend)
    reference = linear_logprob(hidden, weight, targets, entropy=True, backend="torch")
    error, baseline = ([(a - b).abs().max() for a, b in zip(x, want, strict=True)] for x in (got, reference))
    assert error[0] <= (1e-6 if exact else 5e-6) and error[0] <= 1.1 * baseline[0]
    assert error[1] <= 5e-6 and error[1] <= 1.1 * baseline[1]


def test_the_number_of_threads_does_not_matter(backend):
    hidden, weight, _, targets = make(n=60, v=5001)
    old, advantage, token_weight, _ = vectors(60)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(linear_policy_loss(hidden, weight, targets, old, advantage, token_weight, backend=backend))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    close_grads(*(doubled(*grads(x.loss, hidden, weight)) for x in results), 1e-6)
