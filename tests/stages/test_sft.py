"""SFT through the same code as RL: checkpoints, resuming to the same bits, validation loss, failures."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from transformers import AutoModelForCausalLM

from prime_fast.cli import main
from prime_fast.engine import checkpoint, manifest
from prime_fast.metrics import read_metrics

OPTIONS = ["sft.steps=6", "sft.lr=3e-3", "sft.schedule=cosine", "sft.warmup=0.4", "sft.mini_batch=8"]
OPTIONS += ["log.eval_every=2", "log.checkpoint_every=1"]
VOLATILE = ("seconds", "tokens_per_second", "peak_memory_gib")


def command(workspace, run_dir, *more):
    return ["sft", str(workspace / "config.yaml"), f"run_dir={run_dir}", f"sft.eval={workspace}/rows.jsonl", *more]


def stable(records):
    return [{k: v for k, v in record.items() if k not in VOLATILE} for record in records]


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


@pytest.fixture(scope="module")
def straight(workspace, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("sft") / "run"
    assert main(command(workspace, run_dir, *OPTIONS)) == 0
    return run_dir, read_metrics(run_dir)


def test_a_run_leaves_what_it_promises(straight):
    run_dir, records = straight
    assert [record["step"] for record in records] == list(range(7))
    losses = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    assert list(losses) == [0, 2, 4, 6] and losses[6] < losses[0]
    rates = [record["lr"] / 3e-3 for record in records[1:]]
    assert rates[:2] == pytest.approx([0.5, 1.0]) and rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] < 0.2
    best = min((2, 4, 6), key=lambda step: (losses[step], -step))
    assert checkpoint.best(run_dir).name == f"step-{best:06d}"
    kept = {path.name for path in (run_dir / "checkpoints").glob("step-*")}
    assert kept == {f"step-{step:06d}" for step in (best, 5, 6)}
    last = weights(checkpoint.latest(run_dir) / "policy")
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights(run_dir / "model").items())


def test_the_validation_loss_is_that_of_a_plain_forward(straight, workspace):
    """8 rows by data.eval_rows; one row at a time, through the whole model's own logits."""
    from prime_fast.data.models import load_tokenizer
    from prime_fast.data.rows import load_demonstrations
    from prime_fast.preflight import sample_evenly

    run_dir, records = straight
    rows = load_demonstrations([workspace / "rows.jsonl"], load_tokenizer(run_dir / "model"), max_tokens=28)
    model, nll, tokens = AutoModelForCausalLM.from_pretrained(run_dir / "model"), 0.0, 0
    for row in sample_evenly([rows], 8)[0]:
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.no_grad():
            logprob = model(input_ids=ids).logits[0].log_softmax(-1)
        count = len(row["response_ids"])
        nll -= float(logprob[-count - 1 : -1].gather(1, ids[0, -count:, None]).sum())
        tokens += count
    assert records[-1]["eval_loss"] == pytest.approx(nll / tokens, rel=1e-5)


def test_a_killed_run_resumes_to_the_same_bits(straight, workspace, tmp_path, capsys):
    run_dir, records = straight
    killed = tmp_path / "run"
    words = command(workspace, killed, *OPTIONS)
    process = processes.start([sys.executable, "-m", "prime_fast", *words], stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (killed / "checkpoints" / "step-000003").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    processes.end(process)
    assert not (killed / "model").exists()
    assert main(words) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert main([*words, "sft.lr=1", "--resume"]) == 2
    assert "sft.lr was 0.003 and is 1" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert stable(read_metrics(killed)) == stable(records)
    assert checkpoint.best(killed).name == checkpoint.best(run_dir).name
    expected, got = weights(run_dir / "model"), weights(killed / "model")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_the_run_of_another_stage_is_not_continued(straight, workspace, capsys):
    run_dir, _ = straight
    words = command(workspace, run_dir, *OPTIONS)
    assert main(["train", *words[1:], "--resume"]) == 2
    assert "is of a run of `prime-fast sft`; continue it with that command" in capsys.readouterr().err


def test_steps_that_are_not_finite_are_skipped_and_stop_the_run_with_a_checkpoint(
    workspace, tmp_path, capsys, monkeypatch
):
    from prime_fast.engine import zero

    healthy, calls = zero.Engine.backward, []

    def backward(engine, loss):
        calls.append(engine)
        healthy(engine, loss * (math.nan if len(calls) in (2, 4, 5, 6) else 1.0))

    monkeypatch.setattr(zero.Engine, "backward", backward)
    run_dir = tmp_path / "run"
    words = command(
        workspace, run_dir, *OPTIONS, "log.checkpoint_every=0", "log.eval_every=0", "engine.micro_tokens=1000"
    )
    assert main(words) == 1
    message = capsys.readouterr().err
    assert "3 steps in a row were skipped" in message and "step-000006 with --resume" in message
    assert [record["skipped"] for record in read_metrics(run_dir)] == [0, 1, 1, 2, 3, 4]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["grad_norm"] is None and lines[2]["grad_norm"] > 0
    assert all(torch.isfinite(tensor).all() for tensor in weights(checkpoint.latest(run_dir) / "policy").values())
    assert main([*words, "sft.steps=8", "--resume"]) == 0
    assert [record["skipped"] for record in read_metrics(run_dir)][-2:] == [4, 4] and Path(run_dir, "model").is_dir()


def test_other_rows_are_told_and_can_be_accepted(workspace, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((workspace / "rows.jsonl").read_text())
    words = [*command(workspace, tmp_path / "run", *OPTIONS), f"sft.data={rows}", f"sft.eval={rows}", "log.keep=9"]
    assert main([*words, "sft.steps=3"]) == 0
    scored = [path for path in (tmp_path / "run/checkpoints").glob("step-*") if manifest.score(path) is not None]
    assert scored and checkpoint.best(tmp_path / "run")
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[::-1]))
    capsys.readouterr()
    assert main([*words, "--resume"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "data, where sft was 40 rows" in error and error.endswith("--accept data")
    assert all(manifest.score(path) is not None for path in scored)
    assert main([*words, "--resume", "--accept", "data"]) == 0
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(7))
    assert not any(map(manifest.score, scored))  # the loss on other rows says nothing about these
    assert checkpoint.best(tmp_path / "run").name in ("step-000004", "step-000006")
