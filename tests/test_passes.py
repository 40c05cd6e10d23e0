"""The passes of a step against their plain meaning."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_learner import collected
from test_trainer import make_trainer
from transformers import AutoModelForCausalLM

from prime_fast import passes
from prime_fast.engine.batch import Batch, Group, Sample


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 60), st.booleans())
@settings(max_examples=100, deadline=None)
def test_parts_cover_every_row_once_and_cut_no_group_of_the_prm(sizes, mini_batch, shuffled):
    sample = Sample(torch.tensor([3, 1]), torch.zeros(2), False)
    groups = [Group(7 * i, i, (2,), (sample,) * size, (0.0,) * size) for i, size in enumerate(sizes)]
    batch = Batch.of(groups)
    minis = passes.split(batch, mini_batch, 100, torch.Generator().manual_seed(0) if shuffled else None)
    parts = [[row for ranks in mini for share in ranks for row in share] for mini in minis]
    assert sorted(row for part in parts for row in part) == list(range(sum(sizes))) and all(parts)
    if shuffled:
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert len(parts) == max(1, min(sum(sizes), round(sum(sizes) / mini_batch)))
    else:
        seen = [{int(batch.group[row]) for row in part} for part in parts]
        assert sum(map(len, seen)) == len(sizes)


def plain_logprob(model, batch, temperature):
    """(T,) float64, row by row."""
    found = []
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        with torch.no_grad():
            logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1] / temperature
        found.append(logits.log_softmax(-1).gather(1, response[:, None])[:, 0])
    return torch.cat(found)


def hf_model(engine, path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    model.load_state_dict({name: tensor.double() for name, tensor in engine.weights()}, strict=False)
    return model


def update(trainer, batch, advantage, minis=None, **changes):
    minis = minis or passes.split(batch, len(batch.responses), 120)
    temperature = trainer.config.rollout.temperature
    options = {
        "old_logprob": None,
        "own_first": True,
        "ref_logprob": passes.score(trainer.learner.reference, batch, minis, temperature),
        "importance_cap": 2.0,
        "temperature": temperature,
        "top_p": 1.0,
        "config": trainer.config.policy,
        "lr": 0.0,
    }
    return passes.train_policy(trainer.learner.policy, batch, minis, advantage, **options | changes)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_kl_to_equal_weights_is_zero_and_pulls_nowhere_at_any_temperature(temperature, configure, device):
    trainer = make_trainer(configure("policy.kl_coef=0.3", f"rollout.temperature={temperature}"), device)
    batch = collected(trainer)
    result = update(trainer, batch, torch.zeros(int(batch.cu_seqlens[-1])))
    assert result.reference_kl == 0 and result.updates.grad_norm == 0
    trainer.close()


@pytest.mark.parametrize("kl_coef", [0, 0.2])
def test_the_kl_to_the_reference_is_that_of_plain_forwards(kl_coef, workspace, configure, device):
    trainer = make_trainer(configure(f"policy.kl_coef={kl_coef}", "rollout.temperature=0.7"), device)
    trainer.step(1)
    trainer.collector.surplus.clear()  # sampled by the policy before the step
    batch = collected(trainer)
    models = [hf_model(engine, workspace / "model") for engine in (trainer.learner.policy, trainer.learner.reference)]
    policy, reference = (plain_logprob(model, batch, 0.7) for model in models)
    want = ((reference - policy).exp() - 1 - (reference - policy)).mean()
    result = update(trainer, batch, torch.zeros(int(batch.cu_seqlens[-1])))
    assert result.reference_kl == pytest.approx(float(want), rel=1e-3) and want > 1e-4
    assert result.entropy > 0 and (result.updates.grad_norm > 0) == (kl_coef > 0)
    trainer.close()


def test_later_epochs_compare_with_the_policy_before_the_first(configure, device):
    """One mini-batch's own forward gives its rows' old log-probs for all epochs: the same as a pass of their own."""
    moved = []
    for own_first in (True, False):
        trainer = make_trainer(configure(), device)
        start = {name: tensor.clone() for name, tensor in trainer.learner.policy.weights()}
        batch = collected(trainer)
        shuffle = torch.Generator().manual_seed(1)
        epochs = [passes.split(batch, 12, 120, shuffle) for _ in range(3)]
        rest = epochs[0][1:] if own_first else epochs[0]
        old = passes.score(trainer.learner.policy, batch, rest)
        advantage = (batch.outcome - 0.5).repeat_interleave(batch.cu_seqlens.diff())
        options = {"ref_logprob": None, "importance_cap": 0.0, "lr": 3e-3}
        minis = [mini for minis in epochs for mini in minis]
        result = update(trainer, batch, advantage, minis, old_logprob=old, own_first=own_first, **options)
        assert result.updates.applied == result.updates.made == sum(map(len, epochs))
        assert abs(result.approx_kl) > 1e-4 and result.clip_fraction > 0
        moved.append(torch.cat([(tensor - start[name]).flatten() for name, tensor in trainer.learner.policy.weights()]))
        trainer.close()
    assert (moved[0] - moved[1]).norm() / moved[0].norm() < 1e-3


def test_whole_rewards_come_with_the_last_token(configure, device):
    options = ["prime.granularity=whole", "prime.normalize=none", "prime.whiten=false", "prime.outcome_weight=0"]
    trainer = make_trainer(configure(*options), device)
    batch = collected(trainer)
    draw = torch.Generator().manual_seed(0)
    prm, reference = -torch.rand(2, int(batch.cu_seqlens[-1]), generator=draw)
    got, _ = trainer.learner.credit.advantage(batch, prm, reference, device)
    lengths = batch.cu_seqlens.diff().tolist()
    totals = [float(q.double().sum()) for q in (prm - reference).split(lengths)]
    means = [total / length for total, length in zip(totals, lengths, strict=True)]
    k = trainer.config.rollout.samples
    want = []
    for row, length in enumerate(lengths):
        first = row // k * k
        baseline = sum(means[first : first + k]) / (k - 1)
        reward = [-baseline] * (length - 1) + [totals[row] * k / (k - 1) - baseline]
        want += [sum(reward[t:]) for t in range(length)]
    ratio = got.double() / torch.tensor(want)
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.mean()), rtol=1e-4, atol=0)
    trainer.close()
