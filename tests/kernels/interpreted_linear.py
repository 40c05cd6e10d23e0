"""The Triton kernels of the LM-head ops in Triton's interpreter: run by test_kernels_linear_triton.py, which sets
TRITON_INTERPRET=1 for a process of its own. No timing, race or layout shows here; bfloat16 is computed wrongly."""

import interpreter
import pytest
import torch
import triton
from linear_backend_cases import *  # noqa: F403
from linear_backend_cases import make

from prime_kernels import linear_logprob, tune
from prime_kernels.linear_logprob_triton import vocabulary_stats

assert triton.knobs.runtime.interpret
interpreter.patch_once()


@pytest.fixture(params=["fused", "gemm"])
def backend(request, monkeypatch):
    """Kernel sizes at which every loop runs more than once and every edge is ragged."""
    if request.param == "gemm" and "logprob_and_entropy" in request.node.name and "all" not in request.node.name:
        pytest.skip("slow, and gemm's row kernel is run by the losses")
    monkeypatch.setenv("PRIME_KERNELS_LOGITS", request.param)
    monkeypatch.setattr(tune, "BLOCK_ROWS", 8)
    monkeypatch.setattr(tune, "ROW", tune.Row(block=32, warps=4))
    monkeypatch.setattr(tune, "tile", lambda chip, hidden, *head: tiles(hidden))
    return "triton"


@pytest.fixture
def rows_of_a_chunk(monkeypatch):
    monkeypatch.setenv("PRIME_KERNELS_CHUNK_ROWS", "7")


def tiles(hidden, descriptors=False):
    return tune.Tile(8, 32, 16, 2, 2, 4, 1, descriptors and hidden % 4 == 0)


@pytest.mark.parametrize("target", [-1, 37])
def test_a_target_outside_the_vocabulary_gives_nan(backend, target):
    hidden, weight, _, targets = make()
    targets[7] = target
    logprob = linear_logprob(hidden, weight, targets, backend=backend)
    assert logprob.isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("n", "h", "v"), [(1, 16, 3), (19, 24, 130), (9, 7, 64)])
def test_vocabulary_kernel(monkeypatch, dtype, splits, n, h, v):
    """Its four sums and the logits it keeps, of operands in their own dtype; with more ranges than tiles, too."""
    monkeypatch.setattr(tune, "tile", lambda chip, hidden, *head: tiles(hidden)._replace(splits=splits))
    hidden, weight, _, targets = make(n, h, v, dtype=dtype)
    hidden, weight = hidden.detach(), weight.detach()
    logits = torch.full((-(-n // 8) * 8, v), torch.nan)
    peak, total, weighted, target = vocabulary_stats(
        hidden, weight, None, targets, logits, temperature=0.5, softcap=None, entropy=True
    )
    z = hidden.double() @ weight.double().T
    torch.testing.assert_close(logits[:n].double(), z, rtol=1e-6, atol=2e-6)
    z, highest = 2 * z, peak.max(0).values.double()
    torch.testing.assert_close(highest, z.max(1).values, rtol=1e-6, atol=2e-6)
    fade = (peak - highest).exp().double()
    others = torch.ones_like(z).scatter(1, targets[:, None], 0)
    e = (z - highest[:, None]).exp() * others
    torch.testing.assert_close((total * fade).sum(0), e.sum(1), rtol=1e-5, atol=1e-6)
    spread = (fade * (weighted + total * (peak - highest).clamp(min=-1e4))).sum(0)
    torch.testing.assert_close(spread, (e * (z - highest[:, None])).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target.sum(0).double(), z.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=4e-6)


def test_descriptors_and_pointers_load_the_same(monkeypatch):
    hidden, weight, bias, targets = make(19, 24, 130, bias=True)
    results = []
    for descriptors in (False, True):
        monkeypatch.setattr(tune, "tile", lambda chip, hidden, *head, d=descriptors: tiles(hidden, d))
        head = {"temperature": 0.7, "softcap": 3.0, "entropy": True}
        results.append(vocabulary_stats(hidden.detach(), weight.detach(), bias.detach(), targets, None, **head))
    assert torch.equal(*results)
