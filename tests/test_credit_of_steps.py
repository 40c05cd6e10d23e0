"""Credit as the trainer gives it: calibrated on the steps before, the same after a resume, and nothing from noise."""

import pytest
import torch

from prime_fast import credit
from prime_fast.calibration import Fit
from prime_fast.config import PrimeConfig, load_config
from prime_fast.credit import Credit, separators, step_numbers
from prime_fast.data.models import load_tokenizer
from prime_fast.engine.batch import Batch, Group, Sample
from prime_kernels import prime_advantage

CPU = torch.device("cpu")
CREDITS = ["critic", "pav", "lookahead", "odds"]


def batch_of(groups=12, samples=4, longest=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(groups):
        lengths = torch.randint(1, longest + 1, (samples,), generator=generator).tolist()
        tokens = [torch.randint(18, (length,), generator=generator) for length in lengths]
        outcomes = tuple(torch.randint(2, (samples,), generator=generator).double().tolist())
        rows = tuple(Sample(ids, -torch.rand(len(ids), generator=generator), False) for ids in tokens)
        made.append(Group(number, 0, (1, 2), rows, outcomes))
    return Batch.of(made)


def logprobs(batch, effect=0.0, seed=0):
    """PRM and reference; effect: what the outcome adds to a token's log-ratio."""
    generator = torch.Generator().manual_seed(seed)
    ref, noise = -torch.rand(2, len(batch.engine_logprob), generator=generator)
    sign = (2 * batch.outcome - 1).repeat_interleave(batch.cu_seqlens.diff())
    return ref + 0.3 * (noise + 0.5) + effect * sign, ref


def outcome_only(batch, **options):
    return prime_advantage(None, None, batch.outcome, batch.cu_seqlens, batch.group, process_weight=0.0, **options)


@pytest.mark.parametrize("name", CREDITS)
def test_the_first_step_is_rloo(name):
    """Nothing is known of the PRM yet, whatever it says."""
    batch = batch_of()
    made = Credit(PrimeConfig(credit=name), None)
    found, record = made.advantage(batch, *logprobs(batch, 1.0), CPU)
    torch.testing.assert_close(found, outcome_only(batch).advantage, rtol=0, atol=1e-6)
    assert record["prm_slope"] == record["process_over_outcome"] == 0 and record["prm_explained_50"] == 0


@pytest.mark.parametrize("name", CREDITS)
@pytest.mark.parametrize("gate", ["none", "evidence"])
def test_a_prm_that_knows_changes_advantages_and_one_that_does_not_hardly_does(name, gate):
    for effect in (0.5, 0.0):
        made = Credit(PrimeConfig(credit=name, gate=gate, beta=0.5, whiten=False), None)
        for seed in range(4):
            batch = batch_of(60, seed=seed)
            found, record = made.advantage(batch, *logprobs(batch, effect, seed), CPU)
        change = float((found - outcome_only(batch, whiten=False).advantage).square().mean().sqrt())
        if effect:
            assert change > 0.1 and record["prm_explained_75"] > 0.3 and record["prm_gate"] > 0.9, (name, record)
            assert record["prm_explained_25"] < record["prm_explained_75"]
        elif gate == "evidence":
            assert change < 0.1


def test_the_present_step_is_not_in_its_own_calibration():
    """Its outcomes have moved nothing but their own reward: others see the same calibration whatever they are."""
    made = [Credit(PrimeConfig(credit="pav", gate="none", whiten=False, beta=0.5), None) for _ in range(2)]
    first, second = batch_of(seed=1), batch_of(seed=2)
    flipped = Batch(**vars(second) | {"outcome": torch.where(second.group > 0, 1 - second.outcome, second.outcome)})
    for one in made:
        one.advantage(first, *logprobs(first, 0.5), CPU)
    fits = [one.fit for one in made]
    found = [one.advantage(last, *logprobs(second), CPU)[0] for one, last in zip(made, (second, flipped), strict=True)]
    assert fits[0] == fits[1] and fits[0].slope > 0
    same = int(second.cu_seqlens[(second.group > 0).long().argmax()])
    assert torch.equal(found[0][:same], found[1][:same]) and not torch.equal(found[0], found[1])
    assert made[0].fit != made[1].fit


def test_only_the_last_steps_count():
    made = Credit(PrimeConfig(credit="pav"), None)
    for seed in range(credit.WINDOW):
        made.advantage(batch_of(seed=seed), *logprobs(batch_of(seed=seed), 0.5), CPU)
    assert made.fit.slope > 0
    for seed in range(credit.WINDOW):
        made.advantage(batch_of(seed=seed), *logprobs(batch_of(seed=seed), -0.5), CPU)
    assert made.fit.slope == 0


def test_shrunk_baselines():
    """prime.credit=critic without a PRM is RLOO with the shrunk baseline of earlier outcomes."""
    made = Credit(PrimeConfig(credit="critic", process_weight=0, shrink=1.5, whiten=False), None)
    batch = batch_of()
    found, record = made.advantage(batch, None, None, CPU)
    others = (
        torch.stack(
            [batch.outcome[batch.group == g].sum() - o for g, o in zip(batch.group, batch.outcome, strict=True)]
        )
        + 1.5 * 0.5
    ) / 4.5
    torch.testing.assert_close(found, (batch.outcome - others).repeat_interleave(batch.cu_seqlens.diff()))
    prior = credit._prior(made.fit)
    assert record == {} and prior != 0.5 and abs(prior - float(batch.outcome.mean())) < 0.1


def test_steps_end_with_a_separator(workspace):
    tokenizer = load_tokenizer(str(workspace / "model"))
    ids = tokenizer("1+2=3,3*4=2,", return_tensors="pt").input_ids[0]
    samples = (Sample(ids, torch.zeros(len(ids)), True), Sample(ids[:7], torch.zeros(7), True))
    batch = Batch.of([Group(0, 0, (1,), samples, (0.0, 1.0))])
    expected = [0] * 6 + [1] * 6 + [0] * 6 + [1]
    for given in (",", [tokenizer.convert_tokens_to_ids(",")], r"[,;]$"):
        assert step_numbers(batch, separators(given, tokenizer)).tolist() == expected
    with pytest.raises(ValueError, match="matches no token of this vocabulary"):
        separators("\n", tokenizer)
    with pytest.raises(ValueError, match="prime.separators=18 is not in the vocabulary of 18 tokens"):
        separators([18], tokenizer)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["prime.shrink=1"], "prime.shrink=1.0 is not a part of prime.credit=published"),
        (["prime.segment=step"], "prime.segment=step is not a part of prime.credit=published"),
        (["prime.credit=pav", "prime.estimator=grpo"], "prime.credit=pav needs prime.estimator=rloo, not grpo"),
        (["prime.credit=td", "prime.granularity=whole"], "prime.credit=td needs prime.granularity=token"),
        (["prime.rebase=true"], "prime.normalize=batch would blow up"),
        (["prime.rebase=true", "prime.credit=pav", "rollout.temperature=0.6"], "not 0.6 and 1"),
        (["prime.separators='['"], "this is no regular expression"),
        (["prime.separators=[]"], "give a regular expression, or a list of token ids"),
    ],
)
def test_settings_that_do_nothing_are_refused(words, told, workspace):
    with pytest.raises(ValueError) as error:
        load_config(workspace / "config.yaml", words)
    assert told in str(error.value)


def test_a_fit_knows_what_it_does_not_know():
    made = Credit(PrimeConfig(credit="odds"), None)
    assert made.fit == Fit() and credit.trusted(made.fit, "evidence", "odds") == (0.0, 0.0)
    other = Credit(PrimeConfig(credit="odds"), None)
    other.load_state_dict(made.state_dict())
    assert other.fit == made.fit


@pytest.mark.parametrize("by_step", [False, True])
def test_the_value_of_a_prefix_is_that_of_the_steps_before_its_end(by_step):
    """By hand; nothing of the step that a token stands in, until it ends."""
    batch = batch_of(3, seed=5)
    made = Credit(PrimeConfig(credit="pav", gate="none", beta=0.5, shrink=2), None)
    if by_step:
        made.separators = torch.zeros(18, dtype=torch.bool)
        made.separators[:6] = True
    ratio, fit = torch.randn(len(batch.engine_logprob)), Fit(slope=2.0, drift=0.1, mean=0.6)
    found = made.value(batch, ratio, fit)
    for row, (start, end) in enumerate(zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True)):
        others = [o for o, g in zip(batch.outcome.tolist(), batch.group.tolist(), strict=True) if g == batch.group[row]]
        others.remove(batch.outcome[row].item())
        chance = torch.tensor((sum(others) + 2 * 0.6) / (len(others) + 2)).double()
        value, total, ended = chance, 0.0, 0
        for place in range(start, end):
            total += 0.5 * ratio[place].item()
            if not by_step or batch.responses[row][place - start] < 6 or place == end - 1:
                ended += 1
                value = torch.sigmoid(chance.logit() + 2 * (total - 0.1 * ended))
            assert found[place] == pytest.approx(value.item(), abs=1e-6)
