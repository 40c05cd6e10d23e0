import json
import os
import pty
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import processes
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prime_kernels
from prime_fast import preflight
from prime_fast.cli import main
from prime_fast.engine import checkpoint, parking, zero
from prime_fast.engine.distributed import Stop
from prime_fast.engine.zero import deepspeed  # imported there after the accelerator is chosen
from prime_fast.memory.plan import Plan
from prime_fast.metrics import read_metrics
from prime_fast.rollout.fleet import Fleet
from prime_fast.trainer import Trainer

HAS_LIBAIO = deepspeed.ops.__compatible_ops__["async_io"]

VOLATILE = ("seconds", "tokens_per_second", "peak_memory_gib", "memory")
EXPECTED = """
step rollouts outcome groups_kept groups rows surplus response_length length_correlation truncated
reward_errors reward_timeouts reward_crashes
prm_loss prm_accuracy prm_pair_accuracy prm_grad_norm process_over_outcome process_reward_mean process_reward_std
policy_loss entropy clip_fraction approx_kl policy_grad_norm skipped packing_efficiency tokens_per_second
mismatch_kl mismatch_ratio mismatch_max importance_cut peak_memory_gib seconds
seconds/generate seconds/reward seconds/reference seconds/prm seconds/old_logprobs
seconds/advantage seconds/policy seconds/sync
memory/generate memory/reference memory/prm memory/old_logprobs memory/policy memory/sync
memory_plan/generate memory_plan/reference memory_plan/prm memory_plan/old_logprobs memory_plan/policy memory_plan/sync
"""


def run(workspace, run_dir, *overrides, resume=False):
    arguments = ["train", str(workspace / "config.yaml"), f"run_dir={run_dir}", *overrides]
    assert main([*arguments, "--resume"] if resume else arguments) == 0
    return read_metrics(run_dir)


def stable(records):
    return [{k: v for k, v in record.items() if not k.startswith(VOLATILE)} for record in records]


def weights(run_dir, model="policy"):
    directory = checkpoint.latest(Path(run_dir)) / model
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


@pytest.fixture(scope="module")
def straight(workspace, tmp_path_factory):
    """Four steps without interruption."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    return run_dir, run(workspace, run_dir, "steps=4")


def make_trainer(config, device):
    Path(config.run_dir).mkdir(exist_ok=True)
    return Trainer(config, device, preflight.load_inputs(config))


def test_a_run_leaves_everything_it_promises(straight):
    run_dir, records = straight
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert set(EXPECTED.split()) <= set(records[1])
    assert records[0]["eval_reward_failures"] == records[4]["eval_reward_failures"] == 0
    assert "eval_accuracy" in records[0] and "eval_accuracy" in records[4] and "eval_accuracy" not in records[1]
    outputs = [json.loads(line) for line in (run_dir / "eval" / "step-000004.jsonl").read_text().splitlines()]
    solved = [outcome for output in outputs for outcome in output["outcomes"]]
    assert len(solved) == 8 and records[4]["eval_accuracy"] == sum(solved) / 8
    assert records[4]["eval_low"] < records[4]["eval_accuracy"] < records[4]["eval_high"] or not 0 < sum(solved) < 8
    finite = [v for record in records for v in record.values() if isinstance(v, float)]
    assert all(map(torch.isfinite, torch.tensor(finite)))
    ops = {key.removeprefix("kernel/"): value for key, value in records[1].items() if key.startswith("kernel/")}
    usable = prime_kernels.backends().items()
    assert ops == {op: next(name for name, state in table.items() if state == "ok") for op, table in usable}
    assert (run_dir / "config.yaml").is_file() and (run_dir / "report" / "curves.png").stat().st_size > 10_000
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert {"step", "prompt", "response", "outcome"} <= set(samples[0])
    kept = [json.loads(line)["step"] for line in (run_dir / "tokens.jsonl").read_text().splitlines()]
    assert kept == sorted(4 * [1, 1, 2, 2, 3, 3, 4, 4])
    newest = checkpoint.latest(run_dir)
    model = AutoModelForCausalLM.from_pretrained(newest / "policy")
    tokenizer = AutoTokenizer.from_pretrained(newest / "policy")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "1+2:"}], return_tensors="pt", return_dict=True)
    assert model.generate(**ids, max_new_tokens=4, pad_token_id=0).shape[1] > 4
    assert set(os.listdir(newest)) == {"policy", "prm", "state", "manifest.json"}


def test_both_models_moved_and_the_steps_count_the_rollouts(straight, workspace):
    run_dir, records = straight
    start = AutoModelForCausalLM.from_pretrained(workspace / "model").state_dict()
    for name in ("policy", "prm"):
        moved = weights(run_dir, name)
        assert all(not torch.equal(start[key], moved[key]) for key in start), name
    assert records[-1]["rollouts"] % 4 == 0 and records[-1]["rollouts"] >= 4 * 24


def test_parking_changes_no_bit_of_a_run(straight, workspace, tmp_path, monkeypatch):
    """As beside a vLLM on the same GPU: whenever the engine gets work, states are parked, and saved so."""
    run_dir, records = straight
    lots, seen = [], []
    make, submit, copy = parking.Parking.__init__, Fleet.submit, zero.Engine.states

    def note(there):
        seen.append([lot.parked for lot in there])

    plan = Plan.__init__
    monkeypatch.setattr(Plan, "__init__", lambda made, *rest: plan(made, *rest) or setattr(made, "parks", True))
    monkeypatch.setattr(parking.Parking, "__init__", lambda lot, *rest: lots.append(lot) or make(lot, *rest))
    monkeypatch.setattr(Fleet, "submit", lambda fleet, requests: note(lots) or submit(fleet, requests))
    monkeypatch.setattr(zero.Engine, "states", lambda made: note([made.parking]) or copy(made))
    run(workspace, tmp_path / "run", "steps=2")
    assert len(lots) == 2
    lots.clear()
    resumed = run(workspace, tmp_path / "run", "steps=4", resume=True)
    assert stable(resumed) == stable(records) and {"seconds/park", "seconds/unpark"} <= resumed[-1].keys()
    assert len(seen) > 8 and all(all(parked) for parked in seen)
    for name in ("policy", "prm"):
        expected, got = weights(run_dir, name), weights(tmp_path / "run", name)
        assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_killed_run_resumes_to_the_same_bits(straight, workspace, tmp_path):
    """It ran on a terminal, where each line stands alone though phases told how far they were before it."""
    run_dir, records = straight
    killed = tmp_path / "run"
    command = [sys.executable, "-m", "prime_fast", "train", str(workspace / "config.yaml"), f"run_dir={killed}"]
    command += ["steps=4", "log.checkpoint_every=1"]
    screen, terminal = pty.openpty()
    process = processes.start(command, stdout=terminal)
    deadline = time.time() + 120
    while (
        not (killed / "checkpoints" / "step-000001").exists()
        or '"step": 2' not in (killed / "metrics.jsonl").read_text()
    ):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    processes.end(process)
    os.close(terminal)
    shown = ""
    with suppress(OSError):  # the end of a terminal without a program
        while True:
            shown += os.read(screen, 1 << 16).decode()
    phases = ("loading the policy model", "self-check", "rollouts", "reference and PRM 0/")
    for phase in (*phases, "policy update 0/", "evaluating 0/8 problems", "checkpoint 0/4"):
        assert f"\x1b[K{phase}" in shown, phase
    lines = [line.split("\x1b[K")[-1] for line in shown.splitlines()]
    assert [line[:8] for line in lines if "step" in line][:2] == ["step 0/4", "step 1/4"]
    resumed = run(workspace, killed, "steps=4", "log.checkpoint_every=1", resume=True)
    assert stable(resumed) == stable(records)
    assert (killed / "tokens.jsonl").read_bytes() == (run_dir / "tokens.jsonl").read_bytes()
    expected, got = weights(run_dir), weights(killed)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    best = max((2, 4), key=lambda step: (records[step]["eval_accuracy"], step))
    assert checkpoint.best(killed).name == f"step-{best:06d}"
    kept = sorted(path.name for path in (killed / "checkpoints").glob("step-*"))
    assert kept == sorted({"step-000003", "step-000004", checkpoint.best(killed).name})


RANKS = {
    "one row a step, so that a rank idles": ["policy.mini_batch=1", "prm.mini_batch=1"],
    "several rows": [*("prm.loss=prefix", "prm.rows=all", "prm.passes=2", "prm.lora={}"), "rollout.keep=[0.3, 0.5]"],
}


@pytest.mark.parametrize("case", RANKS)
def test_two_ranks_do_the_same_as_one(case, workspace, tmp_path):
    """All weights' updates agree to 0.1% in norm: float32 sums in another order, amplified by AdamW's division."""
    overrides = ["steps=1", *RANKS[case]]
    records = run(workspace, tmp_path / "one", *overrides)
    words = ["train", workspace / "config.yaml", f"run_dir={tmp_path / 'two'}", *overrides]
    result = processes.torchrun(2, "-m", "prime_fast", *words)
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = records[1], read_metrics(tmp_path / "two")[1]
    kept = [[json.loads(line) for line in (tmp_path / name / "tokens.jsonl").open()] for name in ("one", "two")]
    assert [record["tokens"] for record in kept[0]] == [record["tokens"] for record in kept[1]]
    for key in ("outcome", "groups_kept", "groups", "rows", "response_length", "rollouts"):
        assert one[key] == two[key], key
    for key in ("prm_loss", "prm_grad_norm", "policy_grad_norm", "entropy", "process_over_outcome"):
        assert two[key] == pytest.approx(one[key], rel=1e-3), key
    start = AutoModelForCausalLM.from_pretrained(workspace / "model").state_dict()
    for name in ("policy", "prm"):
        left, right = weights(tmp_path / "one", name), weights(tmp_path / "two", name)
        update = sum((left[key] - start[key]).square().sum() for key in start) ** 0.5
        difference = sum((left[key] - right[key]).square().sum() for key in start) ** 0.5
        assert difference / update < 1e-3, name


def even_is_right(prompt, response):
    return [(place, int(character) % 2 == 0) for place, character in enumerate(response) if character.isdigit()]


def test_a_prm_that_warms_up_and_trains_on_all_resumes_to_the_same_bits(workspace, tmp_path):
    """Amid the steps that train it alone. These count as steps; the policy's schedule begins after them."""
    settings = ["steps=3", "prm.warmup_steps=2", "prm.loss=prefix", "prm.rows=all", "prm.passes=2"]
    settings += ["rollout.keep=[0.3, 0.5]", "policy.schedule=linear", "log.checkpoint_every=1", "log.keep=3"]
    settings += ["prime.credit=pav", "prime.gate=none", "prime.segment=step", "prime.separators='[0-4]'"]
    settings += ["prime.shrink=1.5", "prime.rebase=true"]  # those steps calibrate it
    settings += [f"prime.step_labels={__file__}:even_is_right", "prm.lora={rank: 4}", "prm.lr=1e-2", "policy.lora={}"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    _, *records = run(workspace, whole, *settings)
    start = AutoModelForCausalLM.from_pretrained(workspace / "model").state_dict()

    def moved(model, step):
        now = AutoModelForCausalLM.from_pretrained(whole / "checkpoints" / f"step-{step:06d}" / model).state_dict()
        return any(not torch.equal(now[key], start[key]) for key in start)

    for step, record in enumerate(records, 1):
        assert record["step"] == step and record["skipped"] == 0 and record["prm_applied"] == record["prm_updates"]
        assert ("policy_loss" in record) == moved("policy", step) == (step == 3) and moved("prm", step)
        assert record["prm_updates"] >= 2 * (1 + (record["groups"] < record["rollouts"] / 4))
    assert [record["rollouts"] for record in records] == sorted({record["rollouts"] for record in records})
    assert any(record["prm_slope"] > 0 for record in records)  # the credit has learnt from the steps before
    assert records[2]["policy_lr"] == 1e-3 and records[0]["prm_pair_accuracy"] is not None
    assert all(0 <= record["prm_step_auc"] <= 1 for record in records[1:]) and records[0]["prm_step_auc"] != 0.5
    shutil.copytree(whole, again)
    (again / "checkpoints" / "latest").write_text("step-000001")
    assert stable(run(workspace, again, *settings, resume=True))[1:] == stable(records)
    assert (whole / "tokens.jsonl").read_bytes() == (again / "tokens.jsonl").read_bytes()
    for name in ("policy", "prm"):
        expected, got = weights(whole, name), weights(again, name)
        assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize(
    "place", ["cpu", pytest.param("disk", marks=pytest.mark.skipif(not HAS_LIBAIO, reason="libaio"))]
)
def test_offloading_changes_nothing(place, straight, workspace, tmp_path, monkeypatch):
    _, records = straight
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # look again
    offloaded = run(workspace, tmp_path / "run", "steps=2", f"engine.offload={place}")
    for left, right in zip(offloaded[1:], records[1:3], strict=True):
        for key in ("prm_loss", "policy_grad_norm", "entropy", "process_reward_std"):
            assert left[key] == pytest.approx(right[key], rel=1e-5), key


def test_a_frozen_prm_scores_and_does_not_move(straight, configure, device):
    prm = checkpoint.latest(straight[0]) / "prm"
    trainer = make_trainer(configure("prime.update=none", f"model.prm={prm}"), device)
    before = {name: tensor.clone() for name, tensor in trainer.learner.prm.weights()}
    record = trainer.step(1)
    assert record["process_over_outcome"] > 0 and "prm_loss" not in record
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.learner.prm.weights())
    trainer.close()


def test_surplus_groups_open_the_next_step(configure, device):
    trainer = make_trainer(configure("rollout.prompts=5"), device)
    collector = trainer.collector
    first, _, _ = collector.collect(trainer.phases)
    waiting = list(collector.surplus)
    assert len(first) == 5 and waiting
    state = collector.state_dict()
    second, _, _ = collector.collect(trainer.phases)
    assert second[: len(waiting)] == waiting[:5]
    assert not {group.id for group in first} & {group.id for group in second}
    collector.load_state_dict(state)
    again, _, _ = collector.collect(trainer.phases)
    assert [g.id for g in again] == [g.id for g in second]
    for left, right in zip(again, second, strict=True):
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(left.samples, right.samples, strict=True))
    trainer.close()


def overwrite(parameter, value):
    """Set a ZeRO-3 parameter, not its master weights; returns what it was."""
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        before = parameter.data.clone()
        parameter.data.copy_(torch.as_tensor(value).expand_as(parameter))
    return before


def test_non_finite_steps_are_not_applied_and_stop_the_run(configure, device):
    trainer = make_trainer(configure("rollout.max_rounds=3"), device)
    assert trainer.step(1)["skipped"] == 0
    trainer.save(1)
    trainer.checkpoints.finish()
    parameter = next(trainer.learner.policy.lm.parameters())
    healthy = overwrite(parameter, float("nan"))
    record = trainer.step(2)
    assert record["skipped"] == 1 and "finite" in record["skip_reason"]
    served = dict(trainer.rollout.engine.model.named_parameters())
    assert all(torch.isfinite(tensor).all() for tensor in served.values())
    overwrite(parameter, healthy)
    assert trainer.step(3)["skipped"] == 1 and trainer.counts["failed_in_a_row"] == 0
    overwrite(parameter, float("nan"))
    trainer.step(4)
    trainer.step(5)
    with pytest.raises(Stop, match="3 steps in a row were skipped"):
        trainer.step(6)
    assert trainer.restore(checkpoint.latest(Path(trainer.config.run_dir))) == 2
    assert trainer.step(2)["skipped"] == 0
    trainer.close()
