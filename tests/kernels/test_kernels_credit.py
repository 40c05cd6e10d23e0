"""Credit forms of prime_advantage against their meaning, step by step."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_advantage import batches, permute, repack

from prime_kernels import prime_advantage
from prime_kernels.reference_credit import CREDITS

RAW = {"whiten": False, "beta": 0.7, "slope": 1.3, "drift": 0.2, "shrink": 1.5, "prior": 0.4}
VALUES = ("critic", "pav", "lookahead")


def steps_of(cu_seqlens, seed):
    """Random steps of one token or more, numbered within each row."""
    rise = torch.rand(int(cu_seqlens[-1]), generator=torch.Generator().manual_seed(seed)) < 0.4
    rise[cu_seqlens[:-1].long()] = False
    total = rise.long().cumsum(0)
    return (total - total[cu_seqlens[:-1].long()].repeat_interleave(cu_seqlens.diff())).int()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def naive(batch, step, credit, *, beta, slope, drift, shrink, prior, gamma=1.0, outcome_gamma=1.0, weights=(1.0, 1.0)):
    """The docstring in plain Python."""
    prm, ref, outcome, cu_seqlens, group = batch
    cuts, q, outcome = cu_seqlens.tolist(), (prm - ref).tolist(), outcome.tolist()
    token_steps = [
        step[a:b].tolist() if step is not None else range(b - a) for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    sums = []
    for a, numbers in zip(cuts, token_steps, strict=False):
        sums.append([sum(q[a + t] for t in range(len(numbers)) if numbers[t] == j) for j in range(numbers[-1] + 1)])
    centered = [
        [x - sum(s[j] for s in sums if len(s) > j) / sum(len(s) > j for s in sums) for j, x in enumerate(row)]
        for row in sums
    ]
    every = [x for row in centered for x in row]
    spread = math.sqrt(sum(x * x for x in every) / len(every)) + 1e-6
    result = []
    for i, numbers in enumerate(token_steps):
        peers = [outcome[j] for j in range(len(outcome)) if group[j] == group[i] and j != i]
        b = (sum(peers) + shrink * prior) / (len(peers) + shrink)
        m = max(shrink, 1)
        p = (sum(peers) + m * prior) / (len(peers) + m)
        u, last = math.log(p / (1 - p)), numbers[-1]

        def value(j, u=u, row=sums[i]):
            return sigmoid(u + slope * (beta * sum(row[: j + 1]) - drift * (j + 1)))

        def known(k, b=b, last=last, value=value, o=outcome[i]):
            return o if k == last else b + value(k) - value(-1)

        for t, j in enumerate(numbers):
            process = {
                "critic": value(-1) - value(j - 1),
                "pav": value(j) - value(j - 1),
                "lookahead": value(min(j + 1, last)) - value(j - 1),
                "odds": min(3, max(-3, centered[i][j] / spread)),
                "td": sum(gamma ** (k - j) * (known(k) - known(k - 1)) for k in range(j, last + 1)),
            }[credit]
            discount = outcome_gamma ** (len(numbers) - 1 - t)
            result.append(weights[1] * discount * (outcome[i] - b) + weights[0] * process)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("segment", [False, True])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_meaning(credit, segment, data):
    batch = data.draw(batches())
    step = steps_of(batch[3], data.draw(st.integers(0, 1000))) if segment else None
    draw = lambda low, high: data.draw(st.floats(low, high))  # noqa: E731
    options = {"beta": draw(0.01, 2), "slope": draw(0, 3), "drift": draw(-1, 1), "shrink": draw(0, 3)}
    options |= {"prior": draw(0.05, 0.95)}
    weights, discounts = (draw(0.1, 2), draw(0, 2)), {"gamma": draw(0, 1), "outcome_gamma": draw(0, 1)}
    result = prime_advantage(
        *batch, credit=credit, step=step, whiten=False, process_weight=weights[0], outcome_weight=weights[1],
        **options, **discounts,
    )  # fmt: skip
    expected = naive(batch, step, credit, weights=weights, **options, **discounts)
    torch.testing.assert_close(result.advantage, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.token_reward, options["beta"] * (batch[0] - batch[1]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("credit", CREDITS)
@given(batch=batches(), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_same_bits_for_any_order_of_rows(credit, batch, seed):
    step = steps_of(batch[3], seed)
    for whiten in (False, True):
        here = prime_advantage(*batch, credit=credit, step=step, **RAW | {"whiten": whiten}).advantage
        order = torch.randperm(len(batch[2]), generator=torch.Generator().manual_seed(seed))
        lengths = batch[3].diff().tolist()
        there = prime_advantage(
            *repack(batch, order), credit=credit, step=permute(step, lengths, order), **RAW | {"whiten": whiten}
        ).advantage
        assert torch.equal(there, permute(here, lengths, order))


@pytest.mark.parametrize("credit", [*VALUES, "odds"])
@given(batch=batches())
@settings(max_examples=10, deadline=None)
def test_a_prm_that_says_nothing_leaves_rloo(credit, batch):
    rloo = prime_advantage(*batch, process_weight=0.0, whiten=False).advantage
    equal = (batch[1], *batch[1:])
    options = RAW | {"shrink": 0.0, "drift": 0.0}
    torch.testing.assert_close(prime_advantage(*equal, credit=credit, **options).advantage, rloo, rtol=0, atol=1e-12)
    if credit != "odds":
        none = prime_advantage(*batch, credit=credit, **options | {"slope": 0.0, "drift": 0.7}).advantage
        torch.testing.assert_close(none, rloo, rtol=0, atol=1e-12)
    off = prime_advantage(*batch, credit=credit, **options | {"process_weight": 0.0}).advantage
    torch.testing.assert_close(off, rloo, rtol=0, atol=1e-12)


@given(batch=batches(), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_td_of_lambda_1_is_the_critic(batch, seed):
    """The sum of all differences is the outcome minus the value before: once as a whole, once beside the outcome."""
    step = steps_of(batch[3], seed)
    td = prime_advantage(*batch, credit="td", step=step, outcome_weight=0.0, **RAW).advantage
    critic = prime_advantage(*batch, credit="critic", step=step, **RAW).advantage
    torch.testing.assert_close(td, critic, rtol=0, atol=1e-9)


def test_value_terms_sum_to_what_the_row_changed():
    """pav telescopes: over a row's steps to the last value minus the first; its expectation adds no bias there."""
    generator = torch.Generator().manual_seed(torch.seed() % 1000)
    cu_seqlens = torch.tensor([0, 5, 9])
    prm, ref = -torch.rand(2, 9, dtype=torch.float64, generator=generator)
    outcome = torch.tensor([1.0, 0.0], dtype=torch.float64)
    pav = prime_advantage(
        prm, ref, outcome, cu_seqlens, torch.zeros(2, dtype=torch.int64), credit="pav", outcome_weight=0.0, **RAW
    )
    for i, (a, b) in enumerate([(0, 5), (5, 9)]):
        p = (outcome[1 - i].item() + 1.5 * 0.4) / 2.5
        u = math.log(p / (1 - p))
        change = sigmoid(u + 1.3 * (0.7 * float((prm - ref)[a:b].sum()) - 0.2 * (b - a))) - sigmoid(u)
        assert math.isclose(float(pav.advantage[a:b].sum()), change, abs_tol=1e-9)


@pytest.mark.parametrize("credit", CREDITS)
def test_log_ratios_beyond_the_exponential_function_are_certain(credit):
    """Of a group that always succeeds, and with steps of overwhelming evidence: V is 0 or 1, not NaN."""
    q = torch.tensor([9e4, -9e4, -9e4, 1.0, 9e4], dtype=torch.float64)
    batch = (q, torch.zeros_like(q), torch.ones(2).double(), torch.tensor([0, 2, 5]), torch.zeros(2, dtype=torch.int64))
    options = {"slope": 20.0, "prior": 1 - 1e-6, "beta": 0.05, "whiten": False, "credit": credit}
    assert prime_advantage(*batch, **options).advantage.isfinite().all()


BATCH = (
    torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), torch.tensor([1.0, 0.0]).double(),
    torch.tensor([0, 2, 5]), torch.zeros(2, dtype=torch.int64),
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"credit": "pva"}, "credit is 'pva', needs one of published, critic, pav, lookahead, odds, td"),
        ({"shrink": 1.0}, "of other credits than 'published'"),
        ({"step": torch.zeros(5, dtype=torch.int32)}, "of other credits than 'published'"),
        ({"credit": "pav", "estimator": "grpo"}, "pass estimator='rloo'"),
        ({"credit": "pav", "prior": 1.0}, "prior is 1.0"),
        ({"credit": "pav", "slope": -1.0}, "slope is -1.0, needs 0 <= slope"),
        ({"credit": "pav", "slope": math.inf}, "finite"),
        ({"credit": "pav", "drift": math.nan}, "finite"),
        ({"credit": "pav", "step": torch.zeros(4, dtype=torch.int32)}, "step has shape (4), needs (5)"),
        ({"credit": "pav", "step": torch.zeros(5)}, "step is torch.float32"),
        ({"credit": "pav", "step": torch.tensor([0, 1, 1, 1, 2])}, "step[2] is 1 in row 1"),
        ({"credit": "pav", "step": torch.tensor([0, 2, 0, 1, 2])}, "step[1] is 2 in row 0"),
        ({"credit": "pav", "step": torch.tensor([0, 1, 0, 1, 0])}, "step[4] is 0 in row 1"),
    ],
)
def test_bad_arguments(changes, words):
    with pytest.raises(ValueError) as error:
        prime_advantage(*BATCH, **changes)
    assert words in str(error.value)


def test_outcomes_are_probabilities():
    batch = [*BATCH]
    batch[2] = torch.tensor([1.0, 1.5]).double()
    with pytest.raises(ValueError, match="outcome is 1.5 in row 1: credit 'critic' needs outcomes from 0 to 1"):
        prime_advantage(*batch, credit="critic")
