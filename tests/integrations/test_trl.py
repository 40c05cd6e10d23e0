"""PrimeTrainer in the real TRL, against our own trainer on the same rows."""

from dataclasses import replace

import pytest
import torch
from test_trainer import make_trainer
from trl_step import make, rollouts

from prime_fast import passes
from prime_fast.engine.batch import Batch
from prime_fast.engine.zero import deepspeed

safe_get_full_optimizer_state = deepspeed.utils.safe_get_full_optimizer_state


def gradients(engine):
    """{name: AdamW's first moment}: a tenth of the clipped gradient after one step."""
    return {name: safe_get_full_optimizer_state(p, "exp_avg") for name, p in engine.lm.named_parameters()}


def test_the_numbers_are_those_of_our_own_trainer(workspace, configure, other_prm, device, tmp_path, monkeypatch):
    settings = [other_prm, "policy.lr=1e-4", "policy.mini_batch=24", "prm.lr=1e-4", "prm.mini_batch=12"]
    own = make_trainer(configure(*settings), device)
    groups = rollouts()
    batch, told = Batch.of(groups), {}
    sampled = passes.score(own.policy, batch, passes.split(batch, 24, 120))
    combine = own.credit.advantage
    monkeypatch.setattr(own.credit, "advantage", lambda *given: told.setdefault("advantage", combine(*given)))
    own.record = {}
    assert own._update(1, replace(batch, engine_logprob=sampled), [], own._given(1, groups)) is None

    library = make(str(workspace / "model"), other_prm.partition("=")[2], tmp_path, prm_learning_rate=1e-4)
    given = library._advantages
    monkeypatch.setattr(library, "_advantages", lambda *rows: told.setdefault("theirs", given(*rows)))
    library.train()
    logged = library.state.log_history[0]

    lengths = batch.cu_seqlens.diff().tolist()
    flat = torch.cat([row[:length] for row, length in zip(told["theirs"], lengths, strict=True)])
    torch.testing.assert_close(flat, told["advantage"][0], rtol=1e-4, atol=1e-4)
    for mine, theirs in {
        "prm_loss": "prm/loss",
        "prm_grad_norm": "prm/grad_norm",
        "prm_accuracy": "prm/accuracy",
        "prm_pair_accuracy": "prm/pair_accuracy",
        "process_reward_std": "prm/token_reward_std",
        "policy_loss": "loss",
        "policy_grad_norm": "grad_norm",
        "entropy": "entropy",
        "outcome": "reward",
    }.items():
        want = float(batch.outcome.mean()) if mine == "outcome" else own.record[mine]
        print(mine, want, logged[theirs])
    for name, parameter in library.prm.module.named_parameters():
        got, want = library.prm.adam.state[parameter]["exp_avg"], gradients(own.prm)[name]
        print(name, ((got-want).norm()/want.norm()).item())
    for name, parameter in library.model.named_parameters():
        got, want = library.optimizer.optimizer.state[parameter]["exp_avg"], gradients(own.policy)[name]
        print(name, ((got-want).norm()/want.norm()).item())
    own.close()
