import pytest
from rich.console import Console

from prime_fast.config import load_config
from prime_fast.memory.advice import card_bytes
from prime_fast.memory.plan import Plan
from prime_fast.views import plan

SHAPE = "model.policy=configs/shapes/qwen2.5-math-7b"


@pytest.fixture
def published(monkeypatch):
    from pathlib import Path

    monkeypatch.chdir(Path(__file__).parents[2])

    def make(*overrides):
        return load_config("configs/eurus2-7b-8xa100.yaml", [SHAPE, *overrides])

    return make


@pytest.mark.parametrize(
    ("overrides", "units"),
    [
        ([], 1 + 4 + 3 / 4 + 4),  # the first of four policy steps needs no pass of its own for the old log-probs
        (["model.recompute=none"], 1 + 3 + 3 / 4 + 3),
        (["model.recompute=7"], 1 + 3.25 + 3 / 4 + 3.25),
        (["model.recompute=attention-saved"], 1 + 4 + 3 / 4 + 4),
        (["rollout.old_logprobs=recompute"], 1 + 4 + 1 + 4),
        (["policy.mini_batch=1024"], 1 + 4 + 4),  # one policy step: its own forward is the old policy
        (["rollout.old_logprobs=engine"], 1 + 4 + 4),
        (["prime.update=before"], 1 + 4 + 1 + 3 / 4 + 4),
        (["prime.reference=policy"], 4 + 1 + 4),  # the policy's forward serves as reference and as old log-probs
        (["prime.process_weight=0"], 3 / 4 + 4),
        (["prm.passes=3"], 1 + 12 + 3 / 4 + 4),
        (["prm.rows=all"], 3 / 4 + 4),  # reference and PRM run over every response
    ],
)
def test_passes_per_step(overrides, units, published):
    made = Plan(published("model.recompute=all", *overrides), 8)
    passes = plan.passes_per_step(made.config, made.recompute)
    assert sum(made.units for made in passes if made.rows == "kept responses") == units


def test_the_dry_run_says_what_fits(published, capsys):
    console = Console(width=200)
    assert plan.print_dry_run(published(), 8, console, "a100-80")
    fits = capsys.readouterr().out
    assert "Tightest phase: load, 75.0 GiB of 79.1 GiB: fits with 4.1 GiB." in fits
    assert "holds 202.7 sequences" in fits
    assert "model.recompute=auto recomputes layers: 22 of 28 (policy), 22 of 28 (prm)." in fits
    assert "rollout.vllm.gpu_memory_utilization is 0.78, by the memory plan." in fits
    assert "198.6 GiB on disk, 794.4 GiB with the newest 2 that are kept, the best and one being" in fits
    for phase in ("load", "resume", "generate", "reference", "prm step", "policy", "sync", "checkpoint"):
        assert f"│ {phase} " in fits
    assert not plan.print_dry_run(published(), 8, console, "a100-40")
    assert "does not fit, over by 14.2 GiB" in (small := capsys.readouterr().out)
    assert "Set engine.offload=cpu: then" in small
    assert plan.print_dry_run(published(), 8, console)
    unknown = capsys.readouterr().out
    assert "Tightest" not in unknown and "left" not in unknown and "0 of 28 (prm), as long as the card" in unknown


def test_the_dry_run_predicts_seconds_of_a_card_that_it_knows(published, capsys):
    console = Console(width=400)
    plan.print_dry_run(published(), 8, console, "A100-80")
    said = capsys.readouterr().out
    assert "for responses of 1229 tokens on average (40% of rollout.max_response, --response-tokens says" in said
    assert "Longest phase: generate, " in said and "trained tokens/s" in said and "prime_fast/speed/rates.py" in said
    for phase in ("generate", "reference", "prm", "old_logprobs", "policy", "sync and other", "step"):
        assert f"│ {phase} " in said.split("Seconds of a step")[1]
    plan.print_dry_run(published("rollout.vllm.enforce_eager=true"), 8, console, "a100-80", 2000)
    said = capsys.readouterr().out
    assert "2000 tokens on average (as given)" in said
    assert "What would help most: rollout.vllm.enforce_eager=false, about " in said
    plan.print_dry_run(published(), 8, console, "80")
    said = capsys.readouterr().out
    assert "No seconds: --gpu 80 does not say which card it is; give one of a100-40, a100-80," in said
    assert "Seconds of a step" not in said
    with pytest.raises(ValueError, match="--response-tokens 4000 is more than rollout.max_response=3072"):
        plan.print_dry_run(published(), 8, console, "h100", 4000)


def test_offloading_is_advised_with_what_the_host_then_holds(published):
    advice = plan.verdict(Plan(published(), 1, card_bytes("a100-40")))[-1]
    assert advice.startswith("Set engine.offload=cpu: then ") and "a node's host holds up to " in advice


def test_there_may_be_no_advice(published):
    assert plan.verdict(Plan(published(), 8, card_bytes("1")))[-1].startswith("No setting mends it")


def test_vllm_without_room_is_said(published):
    lines = plan.verdict(Plan(published("rollout.vllm.gpu_memory_utilization=0.1"), 8, card_bytes("a100-80")))
    assert "fits with" in lines[0] and "refuses to start" in lines[2]
    assert lines[3].startswith("Set rollout.vllm.gpu_memory_utilization=0.25: then ")
