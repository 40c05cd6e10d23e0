import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_backend_cases import CUTS, HEADS, LOSSES

from prime_kernels import linear_logprob, linear_policy_loss, linear_prm_loss
from prime_kernels.linear_torch import chunk_rows, whole_rows
from prime_kernels.reference import (
    kl_token_gradient,
    kl_token_loss,
    policy_token_gradient,
    policy_token_loss,
    prm_prefix_gradient,
    prm_prefix_logit,
    prm_prefix_loss,
    prm_row_gradient,
    prm_row_loss,
)

N, H, V = 23, 12, 37


@pytest.fixture(autouse=True, params=["1", "7", "100"])
def rows_of_a_chunk(request, monkeypatch):
    monkeypatch.setenv("PRIME_KERNELS_CHUNK_ROWS", request.param)


def make(n=N, h=H, v=V, dtype=torch.float64, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(0, v, (n,), generator=generator)
    return normal(n, h), normal(v, h), normal(v) if bias else None, targets


def extras(n=N, seed=1):
    """old_logprob, advantage, token_weight, ref_logprob: ratios on both sides of the clip, some weights 0."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(4, n, generator=generator, dtype=torch.float64)
    weight = torch.rand(n, generator=generator, dtype=torch.float64)
    return noise[0] - 5, noise[1], weight * (noise[2] > -1), noise[3] - 5


def dense(hidden, weight, bias, targets, temperature=1.0, softcap=None):
    """log-prob and entropy from all logits at once, in float64."""
    z = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    logp = F.log_softmax(z / temperature, -1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def grads(loss, *inputs):
    return torch.autograd.grad(loss, [x for x in inputs if x is not None])


def close(got, want, atol=1e-9, rtol=1e-9):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("head", HEADS)
def test_logprob_equals_dense(head):
    options = dict(HEADS[head])
    hidden, weight, bias, targets = make(bias=options.pop("bias", False))
    upstream, upstream_entropy = extras()[:2]
    got = linear_logprob(hidden, weight, targets, bias=bias, entropy=True, **options)
    want = dense(hidden, weight, bias, targets, **options)
    close(got, want)
    for u, v in ((upstream, upstream_entropy), (upstream, 0 * upstream), (0 * upstream, upstream_entropy)):
        got_loss = (got[0] * u).sum() + (got[1] * v).sum()
        want_loss = (want[0] * u).sum() + (want[1] * v).sum()
        inputs = [x for x in (hidden, weight, bias) if x is not None]
        close(
            torch.autograd.grad(got_loss, inputs, retain_graph=True),
            torch.autograd.grad(want_loss, inputs, retain_graph=True),
        )
    close(grads(got[1].sum(), hidden, weight), torch.autograd.grad(want[1].sum(), [hidden, weight]))


def test_logprob_alone_and_gradcheck():
    hidden, weight, bias, targets = make(n=4, h=3, v=5, bias=True)
    alone = linear_logprob(hidden, weight, targets, bias=bias)
    assert torch.equal(alone, linear_logprob(hidden, weight, targets, bias=bias, entropy=True)[0])
    torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, targets, bias=b, temperature=0.8, softcap=3.0, entropy=True),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("variant", ["ppo", "asymmetric", "on-policy", "entropy", "kl", "all"])
def test_policy_loss_equals_dense(head, variant):
    options = dict(HEADS[head])
    hidden, weight, bias, targets = make(bias=options.pop("bias", False))
    old, advantage, token_weight, ref = extras()
    logprob, entropy = dense(hidden, weight, bias, targets, **options)
    old = None if variant == "on-policy" else logprob.detach() + 0.1 * (old + 5)
    ref = logprob.detach() + (ref + 5)
    kwargs = {
        "clip_low": 0.1 if variant == "asymmetric" else 0.2,
        "clip_high": 0.3 if variant == "asymmetric" else 0.2,
        "entropy_coef": 0.3 if variant in ("entropy", "all") else 0.0,
        "kl_coef": 0.7 if variant in ("kl", "all") else 0.0,
    }
    got = linear_policy_loss(
        hidden, weight, targets, old, advantage, token_weight, bias=bias, ref_logprob=ref, **options, **kwargs
    )
    ratio = (logprob - (logprob.detach() if old is None else old)).exp()
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - kwargs["clip_low"], 1 + kwargs["clip_high"])
    k3 = (ref - logprob).exp() - (ref - logprob) - 1
    loss = torch.maximum(plain, clipped) - kwargs["entropy_coef"] * entropy + kwargs["kl_coef"] * k3
    loss = (token_weight * loss).sum()
    active = token_weight != 0
    close([got.loss, got.logprob, got.entropy], [loss, logprob, entropy])
    close([got.clip_fraction], [(clipped > plain)[active].double().mean()])
    close([got.approx_kl], [torch.zeros(()) if old is None else (old - logprob)[active].mean()])
    assert [x.requires_grad for x in got] == [True, False, False, False, False]
    close(grads(got.loss * -3.0, hidden, weight, bias), grads(loss * -3.0, hidden, weight, bias))


@pytest.mark.parametrize("head", ["plain", "bias", "softcap"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_prm_loss_equals_dense(head, weighted, kind):
    options = dict(HEADS[head])
    hidden, weight, bias, targets = make(bias=options.pop("bias", False))
    ref = extras()[3]
    outcome = torch.tensor([0.0, 1.0, 0.25, 1.0], dtype=torch.float64)
    row_weight = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64) if weighted else None
    cu_seqlens = torch.tensor(CUTS, dtype=torch.int32)
    rows = {"row_weight": row_weight} | LOSSES[kind]
    odds = LOSSES[kind].get("intercept", torch.zeros(4)).double()
    got = linear_prm_loss(hidden, weight, targets, ref, outcome, cu_seqlens, bias=bias, **rows, beta=0.1, **options)
    logprob, _ = dense(hidden, weight, bias, targets, **options)
    score = torch.stack([0.1 * q.sum() for q in (logprob - ref).split(cu_seqlens.diff().tolist())])
    bce = -outcome * F.logsigmoid(odds + score) - (1 - outcome) * F.logsigmoid(-odds - score)
    if "every_prefix" in LOSSES[kind]:
        bce = torch.stack(prefix_losses(logprob - ref, outcome, odds, cu_seqlens, 0.1))
    loss = bce.mean() if row_weight is None else (row_weight * bce).sum()
    close(got, [loss, logprob, score])
    assert [x.requires_grad for x in got] == [True, False, False]
    close(grads(got.loss * 2.5, hidden, weight, bias), grads(loss * 2.5, hidden, weight, bias))


def prefix_losses(log_ratio, outcome, intercept, cu_seqlens, beta):
    """One after the other, by the formula."""
    rows = zip(log_ratio.split(cu_seqlens.diff().tolist()), outcome, intercept.double(), strict=True)
    return [F.binary_cross_entropy_with_logits(a + beta * q.cumsum(0), o.expand(len(q)).double()) for q, o, a in rows]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(2, 50), st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_odd_shapes(n, h, v, seed):
    hidden, weight, _, targets = make(n, h, v, seed=seed)
    old, advantage, token_weight, _ = extras(n, seed)
    logprob, _ = dense(hidden, weight, None, targets)
    got = linear_policy_loss(hidden, weight, targets, old, advantage, token_weight)
    loss = (token_weight * policy_token_loss(logprob, old, advantage, 0.2, 0.2)[0]).sum()
    close([got.loss, got.logprob], [loss, logprob])
    close(grads(got.loss, hidden, weight), grads(loss, hidden, weight), atol=1e-8, rtol=1e-8)
    logprob, _ = dense(hidden, weight, None, targets)
    cu_seqlens = torch.tensor([0, *sorted({n // 3, n // 2, n} - {0})])
    outcome = (torch.arange(len(cu_seqlens) - 1) % 2).double()
    got = linear_prm_loss(hidden, weight, targets, old, outcome, cu_seqlens)
    score = torch.stack([0.05 * q.sum() for q in (logprob - old).split(cu_seqlens.diff().tolist())])
    loss = F.binary_cross_entropy_with_logits(score, outcome)
    close([got.loss, got.score], [loss, score])
    close(grads(got.loss, hidden, weight), grads(loss, hidden, weight))


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2**-20), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_low_precision_inputs(dtype, eps):
    """Results are float32-accurate for the rounded inputs; gradients lose one rounding to the input dtype."""
    hidden, weight, bias, targets = make(dtype=dtype, bias=True)
    old, advantage, token_weight, _ = extras()
    got = linear_policy_loss(
        hidden, weight, targets, old.float(), advantage.float(), token_weight.float(), bias=bias, entropy_coef=0.1
    )
    inputs = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    want = linear_policy_loss(*inputs[:2], targets, old, advantage, token_weight, bias=inputs[2], entropy_coef=0.1)
    assert {x.dtype for x in got} == {torch.float32}
    close(got, want, atol=2e-5, rtol=1e-5)
    for g, w, x in zip(grads(got.loss, hidden, weight, bias), grads(want.loss, *inputs), inputs, strict=True):
        assert g.dtype == dtype and g.shape == x.shape
        assert ((g.double() - w).abs() <= eps * w.abs() + 2e-5 * w.abs().max()).all()

    got = linear_logprob(hidden, weight, targets, bias=bias)
    want = linear_logprob(*inputs[:2], targets, bias=inputs[2])
    close([got], [want], atol=5e-6, rtol=0)
    for g, w in zip(grads(got.sum(), hidden, weight, bias), grads(want.sum(), *inputs), strict=True):
        assert g.dtype == dtype
        assert ((g.double() - w).abs() <= eps * w.abs() + 2e-5 * w.abs().max()).all()


def test_autocast_changes_nothing():
    hidden, weight, _, targets = make(dtype=torch.float32)
    _, advantage, token_weight, _ = (x.float() for x in extras())
    plain = linear_policy_loss(hidden, weight, targets, None, advantage, token_weight)
    want = grads(plain.loss, hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = linear_policy_loss(hidden, weight, targets, None, advantage, token_weight)
        assert torch.equal(linear_logprob(hidden, weight, targets), plain.logprob)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(want, grads(mixed.loss, hidden, weight), strict=True))


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_logits_far_from_zero(offset):
    hidden, weight, _, targets = make(dtype=torch.float32)
    shifted = torch.cat([hidden, torch.full((N, 1), offset)], 1)
    weight = torch.cat([weight, torch.ones(V, 1)], 1)
    logprob, entropy = linear_logprob(shifted, weight, targets, entropy=True)
    want = dense(shifted, weight, None, targets)
    assert (logprob <= 0).all() and (entropy >= 0).all()
    close([logprob, entropy], want, atol=2e-2, rtol=0)  # the logits themselves are float32: 1e-3 apart at 1e4


def test_certain_tokens_have_logprob_zero_and_no_gradient():
    weight = torch.eye(5, requires_grad=True)
    hidden = (200 * torch.eye(5)).requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, torch.arange(5), entropy=True)
    assert not logprob.any() and not entropy.any()
    assert not any(g.any() for g in grads(logprob.sum() + entropy.sum(), hidden, weight))


def test_a_row_has_the_same_bits_wherever_it_stands():
    hidden, weight, _, targets = make(n=64, dtype=torch.float32)
    hidden, targets = hidden.detach()[torch.arange(64) % 5], targets[torch.arange(64) % 5]
    logprob = linear_logprob(hidden, weight, targets)
    assert torch.equal(logprob, logprob[torch.arange(64) % 5])


def test_prm_equal_to_reference_scores_exactly_zero():
    hidden, weight, _, targets = make(dtype=torch.float32)
    outcome = torch.tensor([0.0, 1.0, 0.25, 1.0])
    ref = linear_logprob(hidden, weight, targets).detach()
    result = linear_prm_loss(hidden, weight, targets, ref, outcome, torch.tensor(CUTS))
    assert not result.score.any()
    torch.testing.assert_close(result.loss, torch.tensor(2.0).log())


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("old", [-1e4, 1e4])
def test_extreme_ratios_stay_finite(sign, old):
    hidden, weight, _, targets = make(dtype=torch.float32)
    constant = torch.full((N,), old)
    result = linear_policy_loss(
        hidden, weight, targets, constant, sign * torch.ones(N), torch.ones(N), ref_logprob=-constant, kl_coef=0.1
    )
    assert all(x.isfinite().all() for x in result)
    assert all(g.isfinite().all() for g in grads(result.loss, hidden, weight))


def test_no_active_token():
    hidden, weight, _, targets = make(dtype=torch.float32)
    old, advantage, _, _ = (x.float() for x in extras())
    result = linear_policy_loss(hidden, weight, targets, old, advantage, torch.zeros(N))
    assert result.loss == 0 and result.clip_fraction == 0 and result.approx_kl == 0
    assert not any(g.any() for g in grads(result.loss, hidden, weight))


def test_no_rows():
    hidden, weight, _, targets = make(n=0, dtype=torch.float32)
    none = torch.zeros(0)
    policy = linear_policy_loss(hidden, weight, targets, none, none, none)
    prm = linear_prm_loss(hidden, weight, targets, none, none, torch.tensor([0]))
    for result in (policy, prm):
        assert result.loss == 0 and result.logprob.shape == (0,)
        assert [tuple(g.shape) for g in grads(result.loss, hidden, weight)] == [(0, H), (V, H)]
    assert linear_logprob(hidden, weight, targets).shape == (0,)


@given(st.lists(st.integers(1, 12), max_size=12), st.integers(1, 20))
def test_chunks_hold_whole_rows_up_to_the_limit(lengths, limit):
    cuts = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
    chunks = list(whole_rows(cuts, limit))
    assert [row for first, last, _, _ in chunks for row in range(first, last)] == list(range(len(lengths)))
    for first, last, start, stop in chunks:
        assert (start, stop) == (cuts[first], cuts[last])
        assert stop - start <= limit or last - first == 1


def test_the_default_chunk_is_bounded(monkeypatch):
    monkeypatch.delenv("PRIME_KERNELS_CHUNK_ROWS")
    assert chunk_rows(151_936) == 441 and chunk_rows(2**30) == 1


def test_layout_does_not_matter():
    hidden, weight, _, targets = make(dtype=torch.float32)
    old, advantage, token_weight, _ = (x.float() for x in extras())
    want = linear_policy_loss(hidden, weight, targets, old, advantage, token_weight)
    strided = [x.detach().repeat_interleave(2, 0)[::2] for x in (targets, old, advantage, token_weight)]
    transposed = [x.detach().T.contiguous().T for x in (hidden, weight)]
    assert not strided[0].is_contiguous() and not transposed[0].is_contiguous()
    close(linear_policy_loss(*transposed, *strided), want, atol=1e-5, rtol=1e-5)
    x = hidden.detach().T.contiguous().T.requires_grad_()
    logprob = linear_logprob(x, transposed[1], strided[0])
    close(torch.autograd.grad(logprob.sum(), x), grads(linear_logprob(hidden, weight, targets).sum(), hidden), 1e-5)


def test_micro_batch_split_changes_nothing():
    hidden, weight, _, targets = make()
    ref, outcome = extras()[3], torch.tensor([0.0, 1.0, 0.25, 1.0], dtype=torch.float64)
    cuts, quarter = torch.tensor(CUTS), torch.full((4,), 0.25, dtype=torch.float64)
    whole = linear_prm_loss(hidden, weight, targets, ref, outcome, cuts).loss
    parts = [
        linear_prm_loss(
            hidden[cuts[a] : cuts[b]], weight, targets[cuts[a] : cuts[b]], ref[cuts[a] : cuts[b]], outcome[a:b],
            cuts[a : b + 1] - cuts[a], row_weight=quarter[a:b],
        ).loss
        for a, b in ((0, 1), (1, 3), (3, 4))
    ]  # fmt: skip
    close([whole], [sum(parts)])
    close(grads(whole, hidden, weight), grads(sum(parts), hidden, weight))


def test_loss_gradients_are_those_of_autograd():
    """At kinks autograd takes the mean of both sides or the inner one; no random log-prob lies on a kink."""
    generator = torch.Generator().manual_seed(0)
    logprob, old, advantage = (3 * torch.randn(3, 999, dtype=torch.float64, generator=generator)).unbind()
    logprob[::50] += 40  # beyond the limit of the exponent
    x = logprob.requires_grad_()
    token_loss, clipped = policy_token_loss(x, old, advantage, 0.2, 0.3)
    close([policy_token_gradient(x, old, advantage, 0.2, 0.3)], torch.autograd.grad(token_loss.sum(), x))
    assert clipped.any() and not clipped.all()
    close([policy_token_gradient(x, x, advantage, 0.2, 0.3)], [-advantage])
    close([kl_token_gradient(x, old)], torch.autograd.grad(kl_token_loss(x, old).sum(), x))
    outcome = torch.rand(999, dtype=torch.float64, generator=generator)
    close([prm_row_gradient(x, outcome)], torch.autograd.grad(prm_row_loss(x, outcome).sum(), x))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.floats(0.01, 2), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_prefix_loss_and_its_gradient(lengths, beta, seed):
    """The loss by its formula; the gradient by autograd through the loss itself."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    x, (outcome, intercept) = (
        3 * torch.randn(sum(lengths), dtype=torch.float64, generator=generator).requires_grad_(),
        torch.rand(2, len(lengths), dtype=torch.float64, generator=generator),
    )
    logit = prm_prefix_logit(x, 4 * intercept - 2, cuts, beta)
    loss = prm_prefix_loss(logit, outcome, cuts)
    want = torch.stack(prefix_losses(x, outcome, 4 * intercept - 2, cuts, beta))
    close([loss], [want])
    expected = torch.autograd.grad(want.sum(), x, retain_graph=True)
    close([prm_prefix_gradient(logit, outcome, cuts, beta)], expected)
    close(torch.autograd.grad(loss.sum(), x), expected)


def test_prefix_sums_have_the_same_bits_wherever_a_row_stands():
    """And a row that is not finite spoils no other."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 700, 64, 65, 1, 3, 1000]
    rows = [torch.randn(n, generator=generator) for n in lengths]
    outcome, intercept = torch.rand(2, len(rows), generator=generator)

    def made(order):
        cuts = torch.tensor([0, *(lengths[i] for i in order)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        logit = prm_prefix_logit(torch.cat([rows[i] for i in order]), intercept[order], cuts, 0.3)
        parts = prm_prefix_gradient(logit, outcome[order], cuts, 0.3).split([lengths[i] for i in order])
        loss = prm_prefix_loss(logit, outcome[order], cuts)
        return {i: (loss[k], parts[k]) for k, i in enumerate(order)}

    want = made(list(range(7)))
    rows[3][10] = torch.nan
    for order in ([6, 2, 0, 3, 5, 1, 4], [4, 3, 1, 0, 2, 5, 6]):
        for i, (loss, gradient) in made(order).items():
            assert loss.isnan() if i == 3 else torch.equal(loss, want[i][0]) and torch.equal(gradient, want[i][1])


def test_token_losses_are_consistent_with_their_formulas():
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)
    close([kl_token_loss(x, torch.zeros_like(x))], [(-x).exp() + x - 1])
    assert (kl_token_loss(x, x) == 0).all()
    loss, clipped = policy_token_loss(x, torch.zeros_like(x), torch.ones_like(x), 0.2, 0.2)
    close([loss], [-x.exp().clamp(max=1.2)])
    assert torch.equal(clipped, x.exp() > 1.2)
