"""The LM-head ops as PyTorch operators: autograd, fake tensors, torch.compile, products made and memory held."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from prime_kernels import dispatch, linear_logprob, linear_policy_loss, linear_prm_loss
from prime_kernels.linear_logprob import _logprob, _logprob_backward
from prime_kernels.linear_loss import _policy_loss, _prm_loss

H, V, CUTS = 12, 37, [0, 3, 10, 11, 23]


@pytest.fixture(params=["torch", "cpu"])
def backend(request):
    return request.param


def make(n=CUTS[-1], h=H, v=V):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((n, h), (v, h)))
    return hidden, weight, torch.randint(0, v, (n,), generator=generator)


def losses(hidden, weight, targets, cu_seqlens, backend):
    old = torch.zeros(len(targets), device=hidden.device)
    rows = old.new_ones(len(cu_seqlens) - 1)
    logprob, entropy = linear_logprob(hidden, weight, targets, entropy=True, backend=backend)
    yield logprob.sum() + entropy.sum()
    yield linear_policy_loss(hidden, weight, targets, old - 5, old + 1, old + 0.1, backend=backend).loss
    for intercept in (None, rows):
        prm = {"intercept": intercept, "every_prefix": intercept is not None, "backend": backend}
        yield linear_prm_loss(hidden, weight, targets, old - 5, rows, cu_seqlens, **prm).loss


def test_opcheck(backend):
    hidden, weight, targets = make(n=5)
    bias, vector = torch.randn(V, requires_grad=True), torch.randn(5)
    rows, cuts = torch.rand(2), torch.tensor([0, 2, 5])
    for b, cap, grads in ((None, None, [True, True, False]), (bias, 2.0, [False, True, True])):
        x = hidden if grads[0] else hidden.detach()
        for entropy in (True, False):
            torch.library.opcheck(_logprob, (x, weight, b, targets, 0.7, cap, entropy, backend))
        for upstream in ((vector, None), (None, vector), (vector, vector)):
            args = x.detach(), weight.detach(), None if b is None else b.detach(), targets, *upstream
            torch.library.opcheck(_logprob_backward, (*args, 0.7, cap, grads, backend))
        for old, sampling in ((vector - 4, None), (None, vector - 4)):
            args = x, weight, b, targets, old, vector, vector, vector - 4, sampling, 1.5, 0.2, 0.2, 0.7, cap, 0.1, 0.1
            torch.library.opcheck(_policy_loss, (*args, grads, backend))
        for intercept in (None, rows):
            args = x, weight, b, targets, vector, rows, cuts, rows, intercept, 0.1, cap, intercept is not None
            torch.library.opcheck(_prm_loss, (*args, grads, backend))


def test_compile_makes_one_graph(backend):
    hidden, weight, targets = make()
    cuts = torch.tensor(CUTS)

    def run(hidden, weight):
        return torch.stack(list(losses(hidden, weight, targets, cuts, backend)))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = compiled(hidden, weight), run(hidden, weight)
    assert torch.equal(got, want)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for a, b in zip(*(torch.autograd.grad(x, [hidden, weight], upstream) for x in (got, want)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fake_tensors_on_a_gpu(dtype):
    """What torch.compile sees of CUDA inputs; autograd itself would need a CUDA build of torch."""
    with FakeTensorMode(), torch.no_grad():
        hidden, weight = (torch.empty(n, H, dtype=dtype, device="cuda") for n in (23, V))
        targets = torch.empty(23, dtype=torch.int64, device="cuda")
        vector, rows = torch.empty(23, device="cuda"), torch.empty(4, device="cuda")
        policy = linear_policy_loss(hidden, weight, targets, vector, vector, vector)
        cuts = torch.tensor(CUTS)  # on the CPU: no synchronisation
        prm = linear_prm_loss(hidden, weight, targets, vector, rows, cuts)
        logprob = linear_logprob(hidden, weight, targets)
        grads = [True, True, False]
        back = _logprob_backward(hidden, weight, None, targets, vector, None, 1.0, None, grads, None)
        *_, dhidden, dweight, dbias = _prm_loss(
            hidden, weight, None, targets, vector, rows, cuts, rows, None, 0.1, None, False, grads, None
        )
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in (*policy, *prm, logprob)} == {computed}
    assert [tuple(x.shape) for x in policy] == [(), (23,), (23,), (), ()]
    assert [tuple(x.shape) for x in prm] == [(), (23,), (4,)] and policy.logprob.device.type == "cuda"
    assert [tuple(x.shape) for x in back] == [(23, H), (V, H), (0,)] and {x.dtype for x in back} == {dtype}
    assert dhidden.shape == hidden.shape and dweight.shape == weight.shape and dbias.shape == (0,)
    assert dweight.dtype == (torch.float32 if dtype == torch.float16 else dtype)  # float16 would underflow


class Watch(TorchDispatchMode):
    """The largest tensor and the number of matrix products."""

    largest = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return out


def watched(hidden, weight, targets, cu_seqlens, backend, grads):
    """What the implementations do; a mode does not see into an operator."""
    old, rows = torch.zeros(len(targets)), torch.ones(len(cu_seqlens) - 1)
    forward, backward = dispatch.resolve("linear_logprob", backend)
    policy, prm = (dispatch.resolve(f"linear_{name}_loss", backend) for name in ("policy", "prm"))
    head, clip = {"temperature": 1.0, "softcap": None}, {"clip_low": 0.2, "clip_high": 0.2}
    rest = hidden, weight, None, targets, old, rows, cu_seqlens, rows
    calls = [
        lambda: forward(hidden, weight, None, targets, entropy=True, **head),
        lambda: backward(hidden, weight, None, targets, old, old, grads=grads, **head),
        lambda: policy(
            hidden,
            weight,
            None,
            targets,
            None,
            old,
            old,
            None,
            old,
            importance_cap=2.0,
            entropy_coef=0.1,
            kl_coef=0.0,
            grads=grads,
            **head,
            **clip,
        ),
        *(partial(prm, *rest, rows, beta=0.1, softcap=None, every_prefix=x, grads=grads) for x in (False, True)),
    ]
    for call in calls if any(grads) else calls[:1] + calls[2:]:
        with torch.no_grad(), Watch() as seen:
            call()
        yield seen


def test_logits_are_never_built(backend, monkeypatch):
    monkeypatch.setenv("PRIME_KERNELS_CHUNK_ROWS", "20")
    n, h, v = 200, 4, 600
    seen = list(watched(*make(n, h, v), torch.tensor([0, 5, 18, 150, 200]), backend, (True, True, False)))
    assert all(20 * v <= x.largest < n * v / 4 for x in seen)


def test_matrix_products_are_only_those_needed(backend, monkeypatch):
    def products(*grads):  # of linear_logprob, its backward, the policy loss, the PRM's and that of prefixes
        return [x.products for x in watched(*make(), torch.tensor(CUTS), backend, (*grads, False))]

    monkeypatch.setenv("PRIME_KERNELS_CHUNK_ROWS", "30")
    assert products(True, True) == [1, 3, 3, 3, 3]
    assert products(True, False) == products(False, True) == [1, 2, 2, 2, 2]
    assert products(False, False) == [1, 1, 1, 1]
    monkeypatch.setenv("PRIME_KERNELS_CHUNK_ROWS", "11")
    both, *one = (products(*grads)[3] for grads in ((True, True), (True, False), (False, True)))
    logits = sum(one) - both  # each has them, and one of the two products that follow
    if backend == "torch":  # 11 + 12 rows: the last row's logits twice, the others' once
        assert (logits, both) == (5, 5 + 2 * 3)
    else:  # 11 at a time, and the rows before the last, then the last
        assert (logits, both) == (3, 3 + 2 * 2)


def test_a_row_of_any_length_has_its_logits_computed_once(backend, monkeypatch):
    """Of a longer one than a chunk twice by the torch back-end, and for the loss of prefixes."""
    monkeypatch.setenv("PRIME_KERNELS_CHUNK_ROWS", "4")
    problem = *make(60), torch.tensor([0, 3, 40, 41, 60]), backend
    twice = 1 + 2 * 10 + 1 + 2 * 5
    for which, logits in ((-2, 60 // 4 if backend != "torch" else twice), (-1, twice)):
        both, *one = (
            list(watched(*problem, (*grads, False)))[which].products
            for grads in ((True, True), (True, False), (False, True))
        )
        assert sum(one) - both == logits


def test_a_frozen_weight_gets_no_gradient(backend):
    hidden, weight, targets = make()
    for loss in losses(hidden, weight.detach(), targets, torch.tensor(CUTS), backend):
        loss.backward()
    assert hidden.grad.any()
    for loss in losses(hidden.detach(), weight, targets, torch.tensor(CUTS), backend):
        loss.backward()
    assert weight.grad.any()
    with torch.no_grad():
        assert not any(loss.requires_grad for loss in losses(hidden, weight, targets, torch.tensor(CUTS), backend))


def test_a_tied_weight_gets_both_gradients(backend):
    _, weight, targets = make()
    hidden, head = (2 * weight[targets]), weight
    apart = [x.detach().requires_grad_() for x in (hidden, head)]
    cuts = torch.tensor(CUTS)
    for tied, loss in zip(
        losses(hidden, head, targets, cuts, backend), losses(*apart, targets, cuts, backend), strict=True
    ):
        dhidden, dhead = torch.autograd.grad(loss, apart)
        want = dhead.index_add(0, targets, 2 * dhidden)
        torch.testing.assert_close(torch.autograd.grad(tied, weight, retain_graph=True)[0], want)


def test_loss_backward_needs_no_weight_and_logprob_saves_the_parameter(backend):
    hidden, _, targets = make()
    parameter = torch.nn.Parameter(torch.randn(V, H))
    want = [
        torch.autograd.grad(loss, parameter)[0]
        for loss in losses(hidden, parameter, targets, torch.tensor(CUTS), backend)
    ]
    values = parameter.data
    logprob, *others = losses(hidden, parameter, targets, torch.tensor(CUTS), backend)
    parameter.data = torch.full_like(values, float("nan"))  # as a partitioned parameter: gone after forward
    for loss, grad in zip(others, want[1:], strict=True):
        assert torch.equal(torch.autograd.grad(loss, parameter)[0], grad)
    parameter.data = values.clone()  # gathered again before backward
    assert torch.equal(torch.autograd.grad(logprob, parameter)[0], want[0])
    logprob = linear_logprob(hidden, parameter, targets, backend=backend)
    assert logprob.grad_fn.saved_tensors[1].data_ptr() == parameter.data_ptr()


def test_backward_twice_over_a_retained_graph(backend):
    hidden, weight, targets = make()
    for loss in losses(hidden, weight, targets, torch.tensor(CUTS), backend):
        first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(loss, weight)[0])


def test_second_derivatives_are_refused(backend):
    hidden, weight, targets = make()
    for loss in losses(hidden, weight, targets, torch.tensor(CUTS), backend):
        (first,) = torch.autograd.grad(loss * loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula|once_differentiable"):
            first.sum().backward()


def test_autocast_changes_nothing(backend):
    hidden, weight, targets = make()
    plain = list(losses(hidden, weight, targets, torch.tensor(CUTS), backend))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = list(losses(hidden, weight, targets, torch.tensor(CUTS), backend))
        got = [torch.autograd.grad(loss, weight)[0] for loss in mixed]
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
    want = [torch.autograd.grad(loss, weight)[0] for loss in plain]
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
