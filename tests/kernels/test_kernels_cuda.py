"""The LM-head ops and the advantages on a real chip: skipped where there is no NVIDIA GPU.

What every back-end must do (linear_backend_cases.py), and what only a chip shows: bfloat16 and float16 at the heads of
real models, every head size, more tokens than a chunk, streams, graphs, another device than the current one.
`python -m benchmarks.gpu` runs this file and keeps its results. PRIME_KERNELS_TEST_DEVICE=cpu rehearses it with the
CPU's back-ends at small sizes.
"""

import os
from functools import partial

import linear_backend_cases
import pytest
import torch
from linear_backend_cases import *  # noqa: F403
from linear_backend_cases import HEADS
from on_device import on_device

import prime_kernels
from prime_kernels import linear_logprob, linear_policy_loss, linear_prm_loss, prime_advantage
from prime_kernels.reference_credit import CREDITS

DEVICE = os.environ.get("PRIME_KERNELS_TEST_DEVICE") or "cuda"
ON_GPU = DEVICE == "cuda"
if ON_GPU and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

only_gpu = pytest.mark.skipif(not ON_GPU, reason="of a GPU")
LINEAR = ["triton"] if ON_GPU else ["cpu", "torch"]
ADVANTAGE = [name for name in ("cuda", "triton", "cpu") if prime_kernels.backends()["prime_advantage"][name] == "ok"]
ADVANTAGE = [name for name in ADVANTAGE if (name != "cpu") == ON_GPU]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# smaller ones in float32 only, in linear_backend_cases.py: sums of few numbers cancel too often for a bound by rows
SIZES = [16, 33, 64, 100, 128, 576, 896, 1000, 1536, 2048, 2056, 3584, 4096, 8192] if ON_GPU else [16, 33, 64, 576]
# (tokens, H, V): more than a chunk of tokens, and the heads of SmolLM2, Qwen2.5-1.5B and 7B
REAL = [(5000, 576, 49152), (600, 1536, 151936), (600, 3584, 152064)] if ON_GPU else [(90, 40, 3001)]


# where logits come from, in bfloat16 from FUSED on; smaller heads and other dtypes have the one way
FUSED, PATHS = 128, ["fused", "gemm"] if ON_GPU else ["gemm"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv("PRIME_KERNELS_LOGITS", request.param)
    return request.param


@pytest.fixture
def backend(monkeypatch):
    """Of the cases for every back-end: their ops run on the device, wherever the case made its tensors."""
    for op in (linear_logprob, linear_policy_loss, linear_prm_loss):
        monkeypatch.setattr(linear_backend_cases, op.__name__, on_device(op, DEVICE))
    return "triton" if ON_GPU else "cpu"


def problem(n, h, v, dtype, seed=0):
    """hidden, weight (logits of deviation 3), targets, and float32 vectors: old, advantage, token_weight, ref."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    hidden, weight = normal(n, h).to(dtype), (3 / h**0.5 * normal(v, h)).to(dtype)
    targets = torch.randint(0, v, (n,), generator=generator).to(DEVICE)
    noise = normal(4, n)
    with torch.no_grad():
        logprob = linear_logprob(hidden.float(), weight.float(), targets, backend="torch")
    vectors = logprob + 0.1 * noise[0], noise[1], noise[2].abs() / n, logprob + 0.1 * noise[3]
    return hidden.requires_grad_(), weight.requires_grad_(), targets, vectors


def doubled(*tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def logit_bound(hidden, weight):
    """Largest error of a logit that is summed in float32: in steps of 16 products that are cut off, as tensor cores do
    with bfloat16, or product by product, rounded, which grows with the root of their number."""
    size, peak = hidden.shape[1], float((hidden.detach().double() @ weight.detach().double().T).abs().max())
    steps = size / 16 + 8 if hidden.dtype == torch.bfloat16 else 2 * size**0.5
    return 2**-23 * max(1.0, peak) * steps


# of a gradient, relative to the length of its row. bfloat16: dlogits, the operand that carries a PRM row's scale, and
# the result are rounded once each, to 2**-9 of themselves; the signs of what is summed are random.
ROUNDED = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}


def check(got, want, hidden, weight):
    """Log-probs (and entropies), then the gradients of hidden and weight, row by row."""
    bound = logit_bound(hidden, weight)
    for g, w in zip(got[:-2], want[:-2], strict=True):
        assert (g.double() - w).abs().max() <= 4 * bound + 2**-20 * w.abs().max()
    for g, w in zip(got[-2:], want[-2:], strict=True):
        assert g.dtype == hidden.dtype and g.isfinite().all()
        error, length = ((x.double()).norm(dim=1) for x in (g.double() - w, w))
        smallest = 1e-2 * length.max() if hidden.dtype == torch.float16 else 0.0  # what float16 cannot hold
        assert (error <= (ROUNDED[hidden.dtype] + 4 * bound) * length.clamp(min=smallest)).all()


def policy(hidden, weight, targets, vectors, backend=None, **head):
    old, advantage, token_weight, ref = (x.to(hidden.dtype) if hidden.dtype == torch.float64 else x for x in vectors)
    loss, logprob, entropy, *_ = linear_policy_loss(
        hidden, weight, targets, old, advantage, 1024 * token_weight, ref_logprob=ref, kl_coef=0.1, backend=backend,
        **head,
    )  # fmt: skip
    return logprob, entropy, *torch.autograd.grad(loss, [hidden, weight])


def prm(hidden, weight, targets, vectors, backend=None, prefix=False, **head):
    """Rows of which some share a chunk, and one, where there are tokens enough, is longer than a chunk."""
    n = len(targets)
    cuts = torch.tensor([0, *sorted({n // 9, n // 8, n // 7, n} - {0})], dtype=torch.int32)
    outcome = (torch.arange(len(cuts) - 1, device=DEVICE) % 2).to(vectors[3].dtype)
    ref = vectors[3].to(hidden.dtype if hidden.dtype == torch.float64 else torch.float32)
    outcome = outcome.to(ref.dtype)
    head |= {"intercept": 2 * outcome - 0.7, "every_prefix": prefix}
    loss, logprob, score = linear_prm_loss(hidden, weight, targets, ref, outcome, cuts, backend=backend, **head)
    return logprob, *torch.autograd.grad(1024 * loss, [hidden, weight])


def logprob(hidden, weight, targets, vectors, backend=None, **head):
    values = linear_logprob(hidden, weight, targets, backend=backend, **head)
    upstream = vectors[1].to(values.dtype)
    return values, *torch.autograd.grad((upstream * values).sum(), [hidden, weight])


OPS = {"policy": policy, "prm": prm, "prefix": partial(prm, prefix=True), "logprob": logprob}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("n", "h", "v"), REAL, ids=str)
def test_bfloat16_heads_of_real_models(path, name, op, n, h, v):
    hidden, weight, targets, vectors = problem(n, h, v, torch.bfloat16)
    got = OPS[op](hidden, weight, targets, vectors, backend=name)
    check(got, OPS[op](*doubled(hidden, weight), targets, vectors), hidden, weight)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("h", SIZES)
def test_every_dtype_and_head_size(path, name, dtype, h):
    if path == "fused" and (dtype != torch.bfloat16 or h < FUSED):
        pytest.skip("these heads take the other path alone")
    hidden, weight, targets, vectors = problem(67, h, 1003, dtype, seed=h)
    for op in OPS.values():
        got = op(hidden, weight, targets, vectors, backend=name)
        check(got, op(*doubled(hidden, weight), targets, vectors), hidden, weight)


@pytest.mark.parametrize("name", LINEAR if ON_GPU else ["cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "h", "v"), REAL, ids=str)
def test_bits_depend_on_neither_op_nor_neighbours_nor_run(path, name, dtype, n, h, v):
    """So a PRM with the reference's weights scores exactly 0, and an on-policy ratio is exactly 1."""
    if path == "fused" and dtype != torch.bfloat16:
        pytest.skip("these heads take the other path alone")
    hidden, weight, targets, vectors = problem(n, h, v, dtype)
    with torch.no_grad():
        want = linear_logprob(hidden, weight, targets, backend=name)
        for cut in (1, n // 2 + 3):
            assert torch.equal(linear_logprob(hidden[cut:], weight, targets[cut:], backend=name), want[cut:])
    for op in OPS.values():
        first, second = (op(hidden, weight, targets, vectors, backend=name) for _ in range(2))
        assert torch.equal(first[0], want)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("option", [name for name in HEADS if name != "plain"])
def test_head_options_in_bfloat16(path, name, option):
    """Bias and softcap take registers, and so another tile."""
    hidden, weight, targets, vectors = problem(67, 192, 1003, torch.bfloat16)
    head = dict(HEADS[option])
    if head.pop("bias", False):
        head["bias"] = weight.detach()[:, 0].clone()
    exact = {key: value.double() if key == "bias" else value for key, value in head.items()}
    for op in (policy, logprob):
        got = op(hidden, weight, targets, vectors, backend=name, **head)
        check(got, op(*doubled(hidden, weight), targets, vectors, **exact), hidden, weight)
    head.pop("temperature", None), exact.pop("temperature", None)
    got = prm(hidden, weight, targets, vectors, backend=name, **head)
    check(got, prm(*doubled(hidden, weight), targets, vectors, **exact), hidden, weight)


@only_gpu
@pytest.mark.parametrize("target", [-1, 37])
def test_a_target_outside_the_vocabulary_gives_nan(path, target):
    hidden, weight, targets, _ = problem(23, 128, 37, torch.bfloat16)
    targets[7] = target
    found = linear_logprob(hidden, weight, targets, backend="triton")
    assert found.isnan().nonzero().tolist() == [[7]]


def rows(lengths, seed=0, device=DEVICE):
    """prm, ref, outcome, cu_seqlens, group of two rows a group."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    prm, ref = -3 * torch.rand(2, int(lengths.sum()), generator=generator)
    outcome = torch.rand(len(lengths), generator=generator)
    cuts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return [x.to(device) for x in (prm, ref, outcome, cuts, torch.arange(len(lengths)) // 2)]


CREDIT = {"slope": 0.3, "drift": 0.02, "shrink": 1.5, "gamma": 0.95}
FORMS = [{}, *({"credit": name} | CREDIT for name in CREDITS)]
LENGTHS = [5000, 1, 700, 1024, 513, 64] if ON_GPU else [50, 1, 7, 11]


@pytest.mark.parametrize("name", ADVANTAGE)
def test_advantages_of_a_large_batch(name):
    """Many more rows than resident blocks, and one row as long as a whole batch."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 4000 if ON_GPU else 40, (2000,), generator=generator).tolist()
    batch = rows([*lengths, 70_000 if ON_GPU else 700, 1])
    for options in (*FORMS, {"gamma": 0.999, "form": "paper"}):
        got = prime_advantage(*batch, backend=name, **options)
        want = prime_advantage(*(x.double() if x.is_floating_point() else x for x in batch), **options)
        for g, w in zip(got, want, strict=True):
            assert (g.double() - w).abs().max() <= 3e-6 * w.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("name", LINEAR)
def test_small_linear_set(name):
    """What compute-sanitizer watches: every op once a dtype, on ragged shapes; in bfloat16 with and without the
    vocabulary kernel, which writes whole blocks."""
    for dtype, h in ((torch.bfloat16, 40), (torch.bfloat16, 192), (torch.float32, 40)):
        hidden, weight, targets, vectors = problem(19, h, 203, dtype)
        for op in OPS.values():
            got = op(hidden, weight, targets, vectors, backend=name)
            check(got, op(*doubled(hidden, weight), targets, vectors), hidden, weight)


@pytest.mark.parametrize("name", ADVANTAGE)
def test_small_advantage_set(name):
    batch = rows([50, 1, 600, 11])
    for options in FORMS:
        want = prime_advantage(*(x.double() if x.is_floating_point() else x for x in batch), **options).advantage
        got = prime_advantage(*batch, backend=name, **options).advantage
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


# ---- what only a GPU has


@only_gpu
@pytest.mark.parametrize("op", OPS)
def test_linear_ops_follow_the_current_stream(op):
    """Their inputs appear late, on that stream: work put on another would read NaN."""
    hidden, weight, targets, vectors = problem(300, 128, 5003, torch.bfloat16)
    want = OPS[op](hidden, weight, targets, vectors, backend="triton")
    late = torch.full_like(hidden, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # clock cycles: some 25 ms
        late.copy_(hidden.detach())
        got = OPS[op](late.requires_grad_(), weight, targets, vectors, backend="triton")
        torch.cuda.current_stream().synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@only_gpu
@pytest.mark.parametrize("name", ADVANTAGE)
@pytest.mark.parametrize("options", [FORMS[0], FORMS[-1]], ids=["published", "credit"])
def test_advantages_follow_the_current_stream(name, options):
    batch = rows(LENGTHS)
    want = prime_advantage(*batch, backend=name, **options)
    late = torch.full_like(batch[0], torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(batch[0])
        got = prime_advantage(late, *batch[1:], backend=name, **options)
        torch.cuda.current_stream().synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@only_gpu
@pytest.mark.parametrize("name", ADVANTAGE)
@pytest.mark.parametrize("options", [{"gamma": 0.99}, *FORMS[1:]], ids=["published", *CREDITS])
def test_advantages_in_a_graph(name, options):
    """A replay computes with what the inputs hold then; a bad value leaves no number to use."""
    first, second = rows(LENGTHS, seed=1), rows(LENGTHS, seed=2)
    want = prime_advantage(*second, backend=name, **options)
    prime_advantage(*first, backend=name, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = prime_advantage(*first, backend=name, **options)
    for held, new in zip(first, second, strict=True):
        held.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    first[0][3] = torch.nan
    graph.replay()
    torch.cuda.synchronize()
    assert got.advantage.isnan().all()


@only_gpu
@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    hidden, weight, targets, vectors = problem(300, 128, 5003, torch.bfloat16)
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    for op in OPS.values():
        want = op(hidden, weight, targets, vectors, backend="triton")
        there = [x.detach().to(other).requires_grad_() for x in (hidden, weight)]
        found = linear_logprob(*there, targets.to(other), backend="triton")
        assert found.device == other and torch.equal(found.cpu(), want[0].cpu())
    for name in ADVANTAGE:
        want, got = (prime_advantage(*rows(LENGTHS, device=at), backend=name) for at in (DEVICE, other))
        assert all(b.device == other and torch.equal(a.cpu(), b.cpu()) for a, b in zip(want, got, strict=True))
