"""What a step learns from its groups, whatever the loop around it does."""

from dataclasses import replace

import pytest
import torch
from test_trainer import make_trainer

from prime_fast import passes
from prime_fast.engine.batch import Batch
from prime_fast.engine.distributed import Stop
from prime_fast.engine.lora import Trunk
from prime_fast.engine.zero import deepspeed  # imported there after the accelerator is chosen

safe_get_full_optimizer_state = deepspeed.utils.safe_get_full_optimizer_state


def groups_of(trainer):
    groups, _, _ = trainer.collector.collect(trainer.phases)
    return groups


def collected(trainer):
    return Batch.of(groups_of(trainer))


def models_of(trainer):
    return trainer.learner.policy, trainer.learner.prm, trainer.learner.reference


def streamed(trainer, groups):
    """The reference's and the PRM's passes over these groups, a mini-batch at a time."""
    return trainer.learner.stream_of(1, groups).finish()


def test_dropped_groups_train_the_prm_where_none_is_kept(configure, device):
    settings = ["prm.rows=all", "prm.warmup_steps=1", "rollout.keep=[0.6, 0.7]", "rollout.max_rounds=1"]
    trainer = make_trainer(configure(*settings), device)
    policy = {name: tensor.clone() for name, tensor in trainer.learner.policy.weights()}
    for step, skipped in ((1, 0), (2, 1)):  # the first trains the PRM alone in any case
        before = {name: tensor.clone() for name, tensor in trainer.learner.prm.weights()}
        record = trainer.step(step)
        assert record["groups"] == 0 and record["prm_applied"] == 2 and record["skipped"] == skipped
        assert trainer.work.moved == {"prm"} and trainer.counts["updates"] == 0
        assert any(not torch.equal(before[name], tensor) for name, tensor in trainer.learner.prm.weights())
    assert "no group has a mean outcome" in record["skip_reason"] and trainer.counts["empty_in_a_row"] == 1
    assert all(torch.equal(policy[name], tensor) for name, tensor in trainer.learner.policy.weights())
    assert trainer.rollout.version == 0
    trainer.close()


def test_truncated_groups_that_are_filtered_train_nothing(configure, device):
    trainer = make_trainer(configure("prm.rows=all", "rollout.filter_truncated=true", "rollout.max_rounds=1"), device)
    groups, record, fresh = trainer.collector.collect(trainer.phases)
    others = trainer.learner.for_the_prm_alone(groups, fresh, trainer.collector.surplus)
    truncated = [group.id for group in fresh if any(sample.truncated for sample in group.samples)]
    assert truncated and not set(truncated) & {group.id for group in others}
    assert len(fresh) == len(groups) + len(trainer.collector.surplus) + len(truncated) + len(others)
    trainer.close()


@pytest.mark.parametrize(
    "overrides", [[], ["prm.lora={}"], ["policy.lora={}"], ["prm.lora={}", "model.dtype=bfloat16"]], ids=" ".join
)
def test_equal_prm_and_reference_reward_exactly_nothing(overrides, configure, device):
    trainer = make_trainer(configure("prm.lr=0", *overrides), device)
    assert isinstance(trainer.learner.reference, Trunk) == bool(overrides)  # no weights of its own
    groups = groups_of(trainer)
    minis = passes.split(Batch.of(groups), 12, 120)
    assert len(minis) > 1 and max(map(len, minis)) > 1
    result = streamed(trainer, groups)
    assert torch.equal(result.logprob, result.ref_logprob[1.0])
    assert (result.score == 0).all()
    assert result.updates.loss == pytest.approx(0.6931472, abs=1e-6)
    trainer.close()


def shuffled(groups, generator):
    """The groups in another order, their rows too; and the place of each row before."""
    count, found, order = len(groups[0].samples), [], []
    for i in torch.randperm(len(groups), generator=generator).tolist():
        rows = torch.randperm(count, generator=generator).tolist()
        samples, outcomes = ([values[k] for k in rows] for values in (groups[i].samples, groups[i].outcomes))
        found.append(replace(groups[i], samples=tuple(samples), outcomes=tuple(outcomes)))
        order += [i * count + k for k in rows]
    return found, order


def test_the_update_does_not_depend_on_micro_batches_or_row_order(other_prm, configure, device):
    """Gradients are compared, as AdamW's first moments: AdamW itself turns the rounding of a zero into a step of lr."""
    results = []
    for case in range(3):
        settings = "policy.lr=0", "prm.lr=0", "prm.mini_batch=1000", other_prm
        trainer = make_trainer(configure(*settings, f"engine.micro_tokens={10_000 if case == 0 else 60}"), device)
        groups = groups_of(trainer)
        rows = order = list(range(sum(len(group.samples) for group in groups)))
        if case == 2:
            groups, order = shuffled(groups, torch.Generator().manual_seed(5))
        batch = Batch.of(groups)
        minis = passes.split(batch, len(rows), trainer.config.engine.micro_tokens)
        assert (len(minis[0]) == 1) == (case == 0)
        prm = streamed(trainer, groups)
        lengths = batch.cu_seqlens.diff()
        advantage = (batch.outcome - 0.5).repeat_interleave(lengths).to(device)
        policy = passes.train_policy(
            trainer.learner.policy,
            batch,
            minis,
            advantage,
            old_logprob=batch.engine_logprob.to(device),
            own_first=False,
            ref_logprob=None,
            importance_cap=2.0,
            temperature=1.0,
            top_p=1.0,
            config=trainer.config.policy,
            lr=0.0,
        )
        by_row = dict(zip(order, torch.split(prm.logprob, lengths.tolist()), strict=True))
        logprob = torch.cat([by_row[i] for i in rows])
        numbers = torch.tensor([*prm.updates[2:], *policy.updates[2:], policy.entropy])
        moments = first_moments(trainer.learner.prm), first_moments(trainer.learner.policy)
        results.append((logprob.cpu(), numbers, *moments))
        trainer.close()
    expected = results[0]
    for logprob, numbers, *moments in results[1:]:
        torch.testing.assert_close(logprob, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(numbers, expected[1], rtol=1e-4, atol=1e-6)
        for got, want in zip(moments, expected[2:], strict=True):
            assert (got - want).norm() / want.norm() < 1e-5


def first_moments(engine):
    states = [safe_get_full_optimizer_state(p, "exp_avg").flatten() for p in engine.lm.parameters()]
    return torch.cat(states)


OPTIONS = [
    ["rollout.samples=1", "prime.estimator=reinforce", "rollout.keep=[0, 1]"],
    ["rollout.top_p=0.8", 'rollout.stop=["4", 7]'],
    ["prime.update=before"],
    ["prime.reference=policy"],
    ["prime.process_weight=0"],
    ["prime.estimator=grpo", "prime.form=paper", "prime.normalize=none"],
    ["prime.estimator=reinforce", "prime.whiten=false", "prime.gamma=[0.9, 0.99]"],
    ["prime.credit=odds", "prime.gate=size", "prime.segment=step", "prime.separators='[0-4]'"],
    ["policy.kl_coef=0.1", "policy.entropy_coef=0.01", "policy.mean=row", "policy.clip=[0.1, 0.3]"],
    ["rollout.old_logprobs=engine", "rollout.temperature=0.7", "rollout.max_rounds=1"],
    ["rollout.old_logprobs=recompute"],
    ["rollout.importance_cap=0", "policy.mini_batch=1000"],
    ["prm.rows=all", "prm.passes=2", "prime.update=before"],
    ["policy.mini_batch=1000", "prm.mini_batch=1000", "model.recompute=attention-saved"],
    ["prm.lora={rank: 4}", "policy.lora={targets: [q_proj, down_proj]}", "policy.kl_coef=0.1"],
    ["policy.lora={}", "prime.update=before", "policy.mini_batch=1000"],
]


@pytest.mark.parametrize("overrides", OPTIONS, ids=lambda overrides: " ".join(overrides))
def test_every_option_trains(overrides, configure, device):
    trainer = make_trainer(configure(*overrides), device)
    before = {name: tensor.clone() for name, tensor in trainer.learner.policy.weights()}
    for step in (1, 2):
        record = trainer.step(step)
        assert record["skipped"] == 0
        assert torch.isfinite(torch.tensor(record["policy_grad_norm"])) and record["policy_grad_norm"] > 0
    assert ("prm_loss" in record) == ("prime.process_weight=0" not in overrides)
    assert any(not torch.equal(before[name], tensor) for name, tensor in trainer.learner.policy.weights())
    for name, tensor in trainer.learner.policy.weights():
        assert torch.equal(dict(trainer.rollout.engine.model.named_parameters())[name], tensor)
    trainer.close()


def test_outcome_only_loads_no_prm_and_no_reference(configure, device):
    trainer = make_trainer(configure("prime.process_weight=0"), device)
    assert trainer.learner.prm is None and trainer.learner.reference is None
    trainer.close()


def test_a_frozen_parameter_is_named(configure, device):
    trainer = make_trainer(configure("policy.mini_batch=1000"), device)
    trainer.learner.policy.lm.model.layers[1].mlp.down_proj.weight.register_hook(lambda grad: grad * 0)
    with pytest.raises(Stop, match=r"1 parameters of the policy got no gradient.*layers\.1\.mlp\.down_proj\.weight"):
        trainer.step(1)
    trainer.close()
