"""PrimeTrainer in the real TRL: against our own trainer on the same rows, TRL's own losses, and in a learning run."""

import json
import random
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_trainer import make_trainer
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl_step import K, make, prompts, rollouts

from prime_fast import passes
from prime_fast.engine import checkpoint
from prime_fast.engine.batch import Batch
from prime_fast.engine.zero import deepspeed
from prime_fast.integrations.trl import PrimeConfig, PrimeTrainer
from prime_fast.integrations.trl_config import ONLY
from prime_fast.learner import Work

safe_get_full_optimizer_state = deepspeed.utils.safe_get_full_optimizer_state
OURS_AND_THEIRS = {
    "prm_loss": "prm/loss",
    "prm_grad_norm": "prm/grad_norm",
    "prm_accuracy": "prm/accuracy",
    "prm_pair_accuracy": "prm/pair_accuracy",
    "process_reward_std": "prm/token_reward_std",
    "policy_grad_norm": "grad_norm",
}


def gradients(engine):
    """{name: AdamW's first moment}: a tenth of the clipped gradient after one step."""
    return {name: safe_get_full_optimizer_state(p, "exp_avg") for name, p in engine.lm.named_parameters()}


def flat(rows, batch):
    """(T,) of (B, C)."""
    return torch.cat([row[:length] for row, length in zip(rows, batch.cu_seqlens.diff().tolist(), strict=True)])


def test_the_numbers_are_those_of_our_own_trainer(workspace, configure, other_prm, device, tmp_path, monkeypatch):
    """On 6 groups, in two updates of the PRM, the second of which scores with what the first has trained."""
    settings = [other_prm, "policy.lr=1e-4", "policy.mini_batch=24", "prm.lr=1e-4", "prm.mini_batch=12"]
    trainer, groups = make_trainer(configure(*settings), device), rollouts(6)
    own = trainer.learner
    batch, told = Batch.of(groups), {}
    sampled = passes.score(own.policy, batch, passes.split(batch, 24, 120))
    combine = own.credit.advantage
    monkeypatch.setattr(own.credit, "advantage", lambda *given: told.setdefault("ours", combine(*given)))
    work = Work(1, stream=own.stream_of(1, groups))
    assert own.learn(work, replace(batch, engine_logprob=sampled)) is None

    prm = other_prm.partition("=")[2]
    library = make(str(workspace / "model"), prm, tmp_path, groups, prm_batch_size=12)
    given = library._advantages
    monkeypatch.setattr(library, "_advantages", lambda *rows: told.setdefault("theirs", given(*rows)))
    library.train()
    logged = library.state.log_history[0]

    torch.testing.assert_close(flat(told["theirs"], batch), told["ours"][0], rtol=1e-4, atol=1e-4)
    assert logged["loss"] == pytest.approx(work.record["policy_loss"], abs=1e-6)
    for ours, theirs in OURS_AND_THEIRS.items():
        assert logged[theirs] == pytest.approx(work.record[ours], rel=1e-5), ours
    trained = (own.prm, library.prm.module, library.prm.adam), (own.policy, library.model, library.optimizer.optimizer)
    for engine, model, adam in trained:
        wanted = gradients(engine)
        for name, parameter in model.named_parameters():
            got = adam.state[parameter]["exp_avg"]
            assert (got - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name

    trainer.save(1)  # a checkpoint of ours is a model for TRL; vLLM loads one in tests/evaluation/test_evaluate.py
    trainer.checkpoints.finish()
    saved = checkpoint.latest(tmp_path / "run") / "policy"
    args = GRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    loaded = GRPOTrainer(str(saved), lambda **_: [], args, prompts(groups))
    for name, weight in own.policy.weights():
        assert torch.equal(loaded.model.get_parameter(name), weight), name
    trainer.close()


def test_a_loss_is_that_of_trl_and_so_are_its_metrics(workspace, tmp_path, monkeypatch):
    """For every loss_type, off-policy, with a KL term, an entropy bonus and weights that correct for an engine."""
    groups = rollouts(6)
    trainer = make(str(workspace / "model"), None, tmp_path, groups, process_weight=0.0, beta=0.1, temperature=0.7)
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": str(g.id)} for g in groups for _ in range(K)])
    draw = torch.Generator().manual_seed(3)
    shape = inputs["completion_mask"].shape
    trainer.current_gradient_accumulation_steps = 2
    own = inputs["ref_per_token_logps"]  # the policy is its reference as yet
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        inputs[name] = own + 0.2 * torch.randn(shape, generator=draw)
    inputs["advantages"] = torch.randn(shape, generator=draw)
    inputs["importance_sampling_ratio"] = torch.rand(shape, generator=draw) + 0.5
    inputs["tool_mask"] = (torch.rand(shape, generator=draw) > 0.2).int().index_fill(1, torch.tensor([0]), 1)
    trainer.use_vllm = True  # whose ratios GRPOTrainer looks at then alone

    def made(loss_type):
        trainer.loss_type, trainer.entropy_coef = loss_type, 0.05 * (loss_type == "bnpo")
        trainer._entropy_bonus_enabled = trainer.entropy_coef > 0
        trainer._metrics["train"].clear()
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
        return loss.detach(), [p.grad.clone() for p in trainer.model.parameters()], metrics

    with monkeypatch.context() as patched:
        for name in ("_compute_loss", "_get_per_token_logps_and_entropies"):
            patched.setattr(PrimeTrainer, name, getattr(GRPOTrainer, name))
        wanted = {loss_type: made(loss_type) for loss_type in ("dapo", "grpo", "bnpo", "dr_grpo")}
    for loss_type, (loss, grads, metrics) in wanted.items():
        got_loss, got_grads, got_metrics = made(loss_type)
        torch.testing.assert_close(got_loss, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got_grads, grads, rtol=1e-4, atol=1e-6)
        for extra in ("policy_loss", "entropy_coef"):
            metrics.pop(extra, None)
        assert got_metrics == pytest.approx(metrics, rel=1e-4) and metrics["clip_ratio/high_max"] > 0
        assert metrics["kl"] > 0


def test_two_ranks_under_deepspeed_do_the_same_as_one(workspace, other_prm, tmp_path):
    """With a group of rows on both; the PRM that they save is a model, and trains on from there."""
    model, prm, groups = str(workspace / "model"), other_prm.partition("=")[2], rollouts(5)
    words = [model, prm, tmp_path / "two", len(groups)]
    result = processes.torchrun(2, Path(__file__).with_name("trl_step.py"), *words)
    assert result.returncode == 0, result.stderr[-2000:]
    saving = {"save_strategy": "steps", "save_steps": 1}
    one = make(model, prm, tmp_path / "one", groups, **saving)
    one.train()
    folders = [tmp_path / name / "checkpoint-1" for name in ("one", "two")]
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"][0] for folder in folders]
    for name in OURS_AND_THEIRS.values():
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4), name
    for start, part in ((model, "."), (prm, "prm")):
        paths = (start, *(folder / part for folder in folders))
        before, left, right = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in paths)
        moved = sum((left[name] - before[name]).square().sum() for name in left) ** 0.5
        apart = sum((left[name] - right[name]).square().sum() for name in left) ** 0.5
        assert apart < 1e-3 * moved, part
    again = make(model, prm, tmp_path / "one", groups, max_steps=2)
    again.train(resume_from_checkpoint=str(folders[0]))
    straight = make(model, prm, tmp_path / "straight", groups, max_steps=2)
    straight.train()
    for name, parameter in straight.prm.module.named_parameters():
        torch.testing.assert_close(again.prm.module.get_parameter(name), parameter, rtol=0, atol=0)
        moments = (t.prm.adam.state[t.prm.module.get_parameter(name)]["exp_avg"] for t in (again, straight))
        torch.testing.assert_close(*moments, rtol=0, atol=0)


def test_a_policy_with_lora(workspace, tmp_path):
    """Its adapters train alone, and the model without them is the reference of the KL term."""
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = make(str(workspace / "model"), None, tmp_path, rollouts(6), adapters, max_steps=2, beta=0.1)
    trainer.train()
    first, second, *_ = trainer.state.log_history
    assert first["prm/token_reward_std"] == 0 < second["prm/token_reward_std"] and first["grad_norm"] > 0
    assert first["kl"] < 1e-9 < second["kl"]
    base = trainer.model.merge_and_unload(safe_merge=False).state_dict()
    start = AutoModelForCausalLM.from_pretrained(workspace / "model").state_dict()
    moved = {name for name in start if not torch.equal(base[name], start[name])}
    assert moved == {name for name in start if name.endswith(("q_proj.weight", "v_proj.weight"))}


def test_learning(workspace, tmp_path):
    """TRL samples, and the reward rises: for responses that end in an even digit. In bfloat16, TRL's default."""

    def reward(completions, **_):
        return [float(text[-1:] in "02468" and text != "") for text in completions]

    draw = random.Random(0)
    prompts = ["".join(draw.choice("0123456789") for _ in range(4)) + ":" for _ in range(64)]
    args = PrimeConfig(
        output_dir=str(tmp_path), max_steps=10, per_device_train_batch_size=64, num_generations=4,
        max_completion_length=6, learning_rate=1e-3, prm_learning_rate=1e-3, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": prompts})
    trainer = PrimeTrainer(str(workspace / "model"), reward, args, rows, rows.select(range(4)))
    trainer.train()
    before = [parameter.clone() for parameter in trainer.prm.module.parameters()]
    assert trainer.evaluate()["eval_reward"] > 0.4
    assert all(map(torch.equal, before, trainer.prm.module.parameters()))
    log = [record for record in trainer.state.log_history if "reward" in record]
    rewards = [record["reward"] for record in log]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert log[0]["prm/token_reward_std"] == 0 < log[-1]["prm/token_reward_std"]  # it begins as its reference


@pytest.mark.parametrize("option", ONLY)
def test_options_that_cannot_be_honoured_are_refused(option, tmp_path):
    only, _ = ONLY[option]
    other = {"token": "sequence", "none": "group", "sum_then_normalize": "normalize_then_sum"}.get(only, 0.5)
    with pytest.raises(
        ValueError, match=rf"^{option}=.* is not possible with PrimeTrainer: .*; set {option}={only!r}$"
    ):
        PrimeConfig(
            output_dir=str(tmp_path), bf16=False, use_cpu=True, **{option: not only if only is False else other}
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "cispo"}, "loss_type='cispo' is no PPO-clip loss"),
        ({"entropy_coef": 0.1}, "set loss_type='bnpo', or entropy_coef=0.0"),
        ({"prm_batch_size": 7}, "prm_batch_size=7 must be a multiple of the 1 processes and divide"),
        ({"prm_batch_size": 0}, "prm_batch_size=0 must be"),
        ({"prm_update": "never"}, "prm_update is 'never', needs"),
        ({"prm_beta": 0.0}, "prm_beta is 0.0, needs a number above 0"),
        ({"process_weight": -1.0}, "process_weight is -1.0, needs a number that is not below 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        PrimeConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **options)


def test_what_has_no_outcome_is_refused(workspace, byte_tokenizer, tmp_path):
    groups = rollouts(2)
    trainer = make(str(workspace / "model"), None, tmp_path, groups, process_weight=0.0)
    trainer.model.train()
    trainer.reward_weights = torch.tensor([2.0])
    with pytest.raises(ValueError, match="outcome of completion 0 is 2.0: .* scale the rewards with reward_weights"):
        trainer._generate_and_score_completions([{"prompt": str(g.id)} for g in groups for _ in range(K)])
    with pytest.raises(ValueError, match="args is a GRPOConfig, which tells nothing of the PRM; pass a PrimeConfig"):
        PrimeTrainer(str(workspace / "model"), args=GRPOConfig(str(tmp_path), bf16=False, use_cpu=True))
    with pytest.raises(ValueError, match="pass it as prm_model"):
        make(str(workspace / "model"), None, tmp_path, groups, prm_update="none")
    byte_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other' differs from that of the policy, whose tokens a PRM reads"):
        make(str(workspace / "model"), str(tmp_path / "other"), tmp_path, groups)
