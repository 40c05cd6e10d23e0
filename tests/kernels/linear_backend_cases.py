"""What every back-end of the LM-head ops must do, against the float64 reference. Collected where a `backend` fixture
is: test_kernels_linear_cpu.py, and interpreted_linear.py under Triton's interpreter."""

import random
from itertools import accumulate

import pytest
import torch

from prime_kernels import linear_logprob, linear_policy_loss, linear_prm_loss

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 1.5},
    "all": {"bias": True, "temperature": 1.3, "softcap": 2.0},
}
ODDS = torch.tensor([0.5, -2.0, 0.0, 1.5])
LOSSES = {"response": {}, "centered": {"intercept": ODDS}, "prefix": {"intercept": ODDS, "every_prefix": True}}
LOSSES["every prefix"] = {"every_prefix": True}
PRMS = [(head, weighted, "response") for head in ("plain", "bias", "softcap") for weighted in (False, True)]
PRMS += [("plain", True, "centered"), ("softcap", False, "centered"), ("bias", True, "prefix")]
PRMS += [("plain", False, "prefix"), ("softcap", True, "prefix"), ("plain", False, "every prefix")]
CUTS = [0, 3, 10, 11, 23]  # with chunks of 7: two rows in one, a row that just fits, a row that needs two


@pytest.fixture(params=["7", "100"])
def rows_of_a_chunk(request, monkeypatch):
    """Some rows of CUTS share a chunk, one just fits, one does not; or all of them fit."""
    monkeypatch.setenv("PRIME_KERNELS_CHUNK_ROWS", request.param)


def make(n=23, h=12, v=37, dtype=torch.float32, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    targets = torch.randint(0, v, (n,), generator=generator)
    return normal(n, h), normal(v, h), normal(v) if bias else None, targets


def vectors(n=23, seed=1):
    """old_logprob, advantage, token_weight, ref_logprob around log-probs of -5."""
    noise = torch.randn(4, n, generator=torch.Generator().manual_seed(seed))
    return noise[0] - 5, noise[1], noise[2].abs() * (noise[2] > -1), noise[3] - 5


def grads(value, *inputs):
    return torch.autograd.grad(value, [x for x in inputs if x is not None], retain_graph=True)


def close(got, want, atol=4e-6, rtol=2e-6):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=rtol, atol=atol)


def close_grads(got, want, bound=2e-6):
    """Relative to the largest entry: what float32 sums of terms that cancel can promise."""
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).abs().max() <= bound * w.abs().max().clamp(min=1)


def doubled(*tensors):
    return [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


@pytest.mark.parametrize("head", HEADS)
def test_logprob_and_entropy(backend, rows_of_a_chunk, head):
    options = dict(HEADS[head])
    hidden, weight, bias, targets = make(bias=options.pop("bias", False))
    got = linear_logprob(hidden, weight, targets, bias=bias, entropy=True, backend=backend, **options)
    hidden_, weight_, bias_ = doubled(hidden, weight, bias)
    want = linear_logprob(hidden_, weight_, targets, bias=bias_, entropy=True, **options)
    close(got, want)
    assert (got[0] <= 0).all() and (got[1] >= 0).all()
    alone = linear_logprob(hidden, weight, targets, bias=bias, backend=backend, **options)
    assert torch.equal(alone, got[0])
    upstream = vectors()[:2]
    for a, b in ((1, 1), (1, 0), (0, 1)):
        totals = [sum((x * y.to(x.dtype) * c).sum() for x, y, c in zip(z, upstream, (a, b))) for z in (got, want)]  # noqa: B905
        close_grads(grads(totals[0], hidden, weight, bias), grads(totals[1], hidden_, weight_, bias_))
    close_grads(grads(alone.sum(), hidden, weight), grads(want[0].sum(), hidden_, weight_))
    close_grads(grads(got[1].sum(), hidden, weight), grads(want[1].sum(), hidden_, weight_))


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("variant", ["ppo", "on-policy", "entropy", "kl", "all", "capped", "capped on-policy"])
def test_policy_loss(backend, rows_of_a_chunk, head, variant):
    options = dict(HEADS[head])
    hidden, weight, bias, targets = make(bias=options.pop("bias", False))
    hidden_, weight_, bias_ = doubled(hidden, weight, bias)
    old, advantage, token_weight, ref = vectors()
    logprob = linear_logprob(hidden_, weight_, targets, bias=bias_, **options).detach()
    on_policy = variant.endswith("on-policy")
    sampling = (logprob + torch.linspace(-1.5, 1.5, 23)).float() if variant.startswith("capped") else None
    old = None if on_policy else (logprob + 0.5 * (old + 5)).float()  # on both sides of the clip
    ref = (logprob + ref + 5).float()
    kwargs = options | {
        "clip_low": 0.1,
        "clip_high": 0.3,
        "entropy_coef": 0.3 if variant in ("entropy", "all", "capped on-policy") else 0.0,
        "kl_coef": 0.7 if variant in ("kl", "all", "capped on-policy") else 0.0,
        "importance_cap": 1.7,
    }
    rest = old, advantage, token_weight
    per_token = {"ref_logprob": ref, "sampling_logprob": sampling}
    got = linear_policy_loss(hidden, weight, targets, *rest, bias=bias, backend=backend, **per_token, **kwargs)
    if sampling is not None:  # by hand, from log-probs known beforehand
        base = logprob if on_policy else old.double()
        weights = token_weight.double() * (base - sampling).exp().clamp(max=1.7)
        assert 0.1 < (weights == 1.7 * token_weight).double().mean() < 0.9
        rest = old, advantage, weights
    want = linear_policy_loss(
        hidden_, weight_, targets, *doubled(*rest), bias=bias_, ref_logprob=ref.double(), **kwargs
    )
    close(got, want)
    assert on_policy or 0.1 < got.clip_fraction < 0.9
    close_grads(grads(got.loss * -3.0, hidden, weight, bias), grads(want.loss * -3.0, hidden_, weight_, bias_), 4e-6)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("old", [-1e4, 1e4])
def test_extreme_ratios(backend, sign, old):
    hidden, weight, _, targets = make()
    constant = torch.full((23,), old)
    result = linear_policy_loss(
        hidden, weight, targets, constant, sign * torch.ones(23), torch.ones(23), ref_logprob=-constant, kl_coef=0.1,
        backend=backend,
    )  # fmt: skip
    assert all(x.isfinite().all() for x in result)
    assert not any(g.any() for g in grads(result.loss, hidden, weight))  # both terms are beyond their limits: constant


@pytest.mark.parametrize(("head", "weighted", "kind"), PRMS)
def test_prm_loss(backend, rows_of_a_chunk, head, weighted, kind):
    options = dict(HEADS[head])
    hidden, weight, bias, targets = make(bias=options.pop("bias", False))
    ref, outcome = vectors()[3], torch.tensor([0.0, 1.0, 0.25, 1.0])
    row_weight = torch.tensor([0.5, 0.0, 2.0, 1.0]) if weighted else None
    cuts = torch.tensor(CUTS, dtype=torch.int32)
    options |= {"beta": 0.1} | LOSSES[kind]
    got = linear_prm_loss(
        hidden, weight, targets, ref, outcome, cuts, bias=bias, row_weight=row_weight, backend=backend, **options
    )
    hidden_, weight_, bias_, ref_, outcome_, row_weight_ = doubled(hidden, weight, bias, ref, outcome, row_weight)
    (options["intercept"],) = doubled(options.get("intercept"))
    want = linear_prm_loss(
        hidden_, weight_, targets, ref_, outcome_, cuts, bias=bias_, row_weight=row_weight_, **options
    )
    close(got, want)
    close_grads(grads(got.loss * 2.5, hidden, weight, bias), grads(want.loss * 2.5, hidden_, weight_, bias_))


@pytest.mark.parametrize(("head", "kind"), [("plain", "response"), ("bias", "centered"), ("bias", "prefix")])
def test_prm_loss_of_rows_of_any_length(backend, head, kind, monkeypatch):
    """Buffers far smaller than a row, far larger, and all between: fresh lengths in every run."""
    rng = random.Random()
    for _ in range(4 if backend != "triton" else 2):
        monkeypatch.setenv("PRIME_KERNELS_CHUNK_ROWS", str(rng.randint(1, 12)))
        longest = 200 if backend != "triton" else 40  # an interpreter is slow
        lengths = [rng.choice((1, 2, 3, 5, 9, 30, longest)) for _ in range(rng.randint(1, 6))]
        cuts = torch.tensor([0, *accumulate(lengths)])
        hidden, weight, bias, targets = make(n=sum(lengths), bias=head == "bias")
        ref, outcome = vectors(sum(lengths))[3], torch.rand(len(lengths)).round(decimals=1)
        odds = None if kind == "response" else torch.randn(len(lengths))
        rest = {"bias": bias, "beta": 0.3, "intercept": odds, "every_prefix": kind == "prefix"}
        got = linear_prm_loss(hidden, weight, targets, ref, outcome, cuts, **rest, backend=backend)
        hidden_, weight_, bias_, ref_, outcome_, odds_ = doubled(hidden, weight, bias, ref, outcome, odds)
        rest |= {"bias": bias_, "intercept": odds_}
        want = linear_prm_loss(hidden_, weight_, targets, ref_, outcome_, cuts, **rest)
        close(got, want)
        close_grads(grads(got.loss, hidden, weight, bias), grads(want.loss, hidden_, weight_, bias_))


@pytest.mark.parametrize(("n", "h", "v"), [(1, 1, 2), (1, 5, 3), (2, 16, 64), (5, 9, 65), (33, 7, 129), (17, 40, 203)])
def test_odd_shapes(backend, n, h, v):
    hidden, weight, _, targets = make(n, h, v)
    old, advantage, token_weight, _ = vectors(n)
    hidden_, weight_ = doubled(hidden, weight)
    got = linear_policy_loss(hidden, weight, targets, old, advantage, token_weight, backend=backend)
    want = linear_policy_loss(hidden_, weight_, targets, *doubled(old, advantage, token_weight))
    close(got[:3], want[:3], atol=1e-5, rtol=1e-5)
    close_grads(grads(got.loss, hidden, weight), grads(want.loss, hidden_, weight_), 1e-5)


def test_no_rows(backend):
    hidden, weight, _, targets = make(n=0)
    none = torch.zeros(0)
    policy = linear_policy_loss(hidden, weight, targets, none, none, none, backend=backend)
    rows = none, none, torch.tensor([0])
    prm = linear_prm_loss(hidden, weight, targets, *rows, backend=backend)
    prefix = linear_prm_loss(hidden, weight, targets, *rows, **LOSSES["every prefix"], backend=backend)
    for result in (policy, prm, prefix):
        assert result.loss == 0 and result.logprob.shape == (0,)
        assert [tuple(g.shape) for g in grads(result.loss, hidden, weight)] == [(0, 12), (37, 12)]
    assert linear_logprob(hidden, weight, targets, backend=backend).shape == (0,)


@pytest.mark.parametrize("offset", [-1e4, 1e4, -300.0])
def test_all_logits_far_from_zero(backend, offset):
    hidden, weight, _, targets = make()
    hidden = torch.cat([hidden, torch.full((23, 1), offset)], 1)
    weight = torch.cat([weight, torch.ones(37, 1)], 1)
    got = linear_logprob(hidden, weight, targets, entropy=True, backend=backend)
    want = linear_logprob(hidden.double(), weight.double(), targets, entropy=True)
    assert (got[0] <= 0).all() and (got[1] >= 0).all()
    close(got, want, atol=2e-2, rtol=0)  # the logits themselves are float32: 1e-3 apart at 1e4


def test_tokens_that_a_bias_of_minus_infinity_forbids(backend):
    hidden, weight, bias, targets = make(bias=True)
    bias = bias.detach()
    bias[::3] = -torch.inf
    targets = torch.where(targets % 3 == 0, targets + 1, targets).clamp(max=35)
    got = linear_logprob(hidden, weight, targets, bias=bias, entropy=True, backend=backend)
    allowed = bias.isfinite()
    place = (allowed.cumsum(0) - 1)[targets]
    hidden_, weight_, bias_ = doubled(hidden, weight, bias)
    want = linear_logprob(hidden_, weight_[allowed], place, bias=bias_[allowed], entropy=True)
    close(got, want)
    close_grads(grads(sum(x.sum() for x in got), hidden, weight), grads(sum(x.sum() for x in want), hidden_, weight_))


def test_certain_tokens(backend):
    """log-prob and 1 - p keep their digits where p rounds to 1."""
    weight = torch.tensor([[0.0], [1.0]])
    for gap in (10.0, 20.0, 50.0):
        hidden = torch.full((1, 1), gap, requires_grad=True)
        logprob = linear_logprob(hidden, weight, torch.tensor([1]), backend=backend)
        exact = -torch.log1p(torch.tensor(-gap, dtype=torch.float64).exp())
        torch.testing.assert_close(logprob.double(), exact[None], rtol=1e-5, atol=0)
        torch.testing.assert_close(grads(logprob, hidden)[0].double()[0, 0], -exact.expm1(), rtol=1e-5, atol=0)
    weight = torch.eye(5, requires_grad=True)
    hidden = (200 * torch.eye(5)).requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, torch.arange(5), entropy=True, backend=backend)
    assert not logprob.any() and not entropy.any() and not logprob.signbit().any()
    assert not any(g.any() for g in grads(logprob.sum() + entropy.sum(), hidden, weight))


def test_identical_rows_have_identical_bits(backend, rows_of_a_chunk):
    hidden, weight, _, targets = make(n=40)
    hidden, targets = hidden.detach()[torch.arange(40) % 5], targets[torch.arange(40) % 5]
    for x in linear_logprob(hidden, weight, targets, entropy=True, backend=backend):
        assert torch.equal(x, x[torch.arange(40) % 5])


def test_all_ops_agree_in_every_bit(backend, rows_of_a_chunk, monkeypatch):
    """So a PRM with the reference's weights scores exactly 0, and an on-policy ratio is exactly 1."""
    hidden, weight, _, targets = make(v=203)
    outcome, cuts = torch.tensor([0.0, 1.0, 0.25, 1.0]), torch.tensor(CUTS)
    ref, entropy = linear_logprob(hidden, weight, targets, entropy=True, backend=backend)
    prm = linear_prm_loss(hidden, weight, targets, ref.detach(), outcome, cuts, backend=backend)
    assert torch.equal(prm.logprob, ref) and not prm.score.any()
    torch.testing.assert_close(prm.loss, torch.tensor(2.0).log())
    prior = torch.nn.functional.binary_cross_entropy_with_logits(ODDS, outcome)
    for kind in ("centered", "prefix"):
        other = linear_prm_loss(hidden, weight, targets, ref.detach(), outcome, cuts, **LOSSES[kind], backend=backend)
        assert torch.equal(other.logprob, ref) and not other.score.any()
        torch.testing.assert_close(other.loss, prior)
    advantage, token_weight = vectors()[1:3]
    policy = linear_policy_loss(hidden, weight, targets, ref.detach(), advantage, token_weight, backend=backend)
    assert torch.equal(policy.logprob, ref) and torch.equal(policy.entropy, entropy)
    assert policy.approx_kl == 0 and policy.clip_fraction == 0
    with torch.no_grad():
        frozen = linear_policy_loss(hidden, weight, targets, None, advantage, token_weight, backend=backend)
        assert torch.equal(frozen.logprob, ref)
        for cut in (1, 5, 22):  # and a row's bits do not depend on its neighbours
            assert torch.equal(linear_logprob(hidden[cut:], weight, targets[cut:], backend=backend), ref[cut:])


def test_every_run_gives_the_same_bits(backend, rows_of_a_chunk):
    hidden, weight, bias, targets = make(v=203, bias=True)
    old, advantage, token_weight, ref = vectors()

    def run():
        result = linear_policy_loss(
            hidden, weight, targets, old, advantage, token_weight, bias=bias, ref_logprob=ref, kl_coef=0.1,
            entropy_coef=0.1, backend=backend,
        )  # fmt: skip
        cuts = torch.tensor(CUTS)
        prm = linear_prm_loss(hidden, weight, targets, ref, torch.ones(4), cuts, bias=bias, backend=backend)
        inputs, odds = (hidden, weight, bias), {"bias": bias} | LOSSES["prefix"]
        prefix = linear_prm_loss(hidden, weight, targets, ref, torch.ones(4), cuts, **odds, backend=backend)
        made = result, prm, prefix
        return [x for each in made for x in (*each, *grads(each.loss, *inputs))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_zero_weight_tokens_have_no_gradient(backend):
    hidden, weight, _, targets = make()
    token_weight = (torch.arange(23) % 2).float()
    loss = linear_policy_loss(hidden, weight, targets, None, vectors()[1], token_weight, backend=backend).loss
    dhidden = grads(loss, hidden)[0]
    assert not dhidden[::2].any() and dhidden[1::2].any(1).all()


def test_layout_does_not_matter(backend):
    hidden, weight, bias, targets = make(bias=True)
    rest = vectors()
    want = linear_policy_loss(hidden, weight, targets, *rest[:3], bias=bias, backend=backend)
    strided = [x.detach().repeat_interleave(2, 0)[::2] for x in (bias, targets, *rest[:3])]
    transposed = [x.detach().T.contiguous().T.requires_grad_() for x in (hidden, weight)]
    assert not transposed[0].is_contiguous() and not strided[1].is_contiguous()
    got = linear_policy_loss(*transposed, *strided[1:], bias=strided[0], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(grads(got.loss, *transposed), grads(want.loss, hidden, weight), strict=True)
    )


def test_float16_inputs(backend):
    """Computed in float32; gradients lose one rounding to float16."""
    hidden, weight, bias, targets = make(dtype=torch.float16, bias=True)
    old, advantage, token_weight, _ = vectors()
    inputs = hidden, weight, bias
    got = linear_policy_loss(*inputs[:2], targets, old, advantage, token_weight, bias=bias, backend=backend)
    inputs_ = doubled(*inputs)
    want = linear_policy_loss(*inputs_[:2], targets, *doubled(old, advantage, token_weight), bias=inputs_[2])
    assert {x.dtype for x in got} == {torch.float32}
    close(got, want, atol=1e-5)
    for g, w in zip(grads(got.loss, *inputs), grads(want.loss, *inputs_), strict=True):
        assert g.dtype == torch.float16
        assert ((g.double() - w).abs() <= 2**-11 * w.abs() + 2e-5 * w.abs().max()).all()
