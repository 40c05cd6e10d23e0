"""--profile: where every percent of a step goes, and nothing else changed."""

import gzip
import json
from contextlib import nullcontext

import pytest
import torch

from prime_fast import profile
from prime_fast.cli import main
from prime_fast.metrics import Phases, read_metrics
from prime_fast.profile import BETWEEN, COLUMNS, COMMUNICATION, GEMM, HOST, OTHER, STEP, Profile, timeline

PHASES = {"generate", "reference", "prm", "advantage", "policy", "sync"}
VOLATILE = ("seconds", "tokens_per_second", "peak_memory_gib", "memory")


def records(run_dir):
    return [{k: v for k, v in record.items() if not k.startswith(VOLATILE)} for record in read_metrics(run_dir)]


def test_a_profiled_run_is_the_same_run_and_tells_where_its_time_went(workspace, tmp_path, capsys):
    def train(name, *options):
        words = [f"run_dir={tmp_path / name}", "steps=2", "log.eval_every=0", "rollout.prompts=3"]
        assert main(["train", str(workspace / "config.yaml"), *words, *options]) == 0

    train("plain")
    train("profiled", "--profile", "1")  # and the step after it
    assert records(tmp_path / "profiled") == records(tmp_path / "plain")
    assert not (tmp_path / "plain/profile").exists()
    left = sorted(path.name for path in (tmp_path / "profiled/profile").iterdir())
    assert left == ["step-000001.json.gz", "step-000001.txt"]
    with gzip.open(tmp_path / "profiled/profile/step-000001.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    segments = timeline(events)
    spent = profile.by_phase_and_group(segments)
    step = next(event for event in events if event["name"] == STEP)
    assert sum(spent.values()) == pytest.approx(step["dur"], rel=1e-6)  # every percent, none twice
    phases = {phase for phase, _ in spent}
    assert phases >= PHASES and sum(spent[key] for key in spent if key[0] == BETWEEN) < 0.1 * step["dur"]
    for phase in ("prm", "policy"):
        for group in (GEMM, "attention", "LM head", "optimizer", OTHER, HOST):
            assert spent[phase, group] > 0, (phase, group)
    assert ("reference", "LM head") in spent and ("reference", "optimizer") not in spent
    text, said = (tmp_path / "profiled/profile/step-000001.txt").read_text(), capsys.readouterr().out
    assert "Step 1: where its" in text and "What takes most, by itself" in text and "aten::" in text
    assert "Step 1: where its" in said and "perfetto" in said
    line = next(line for line in text.splitlines() if line.startswith("│ step "))
    assert float(line.split("│")[2]) == 100.0


def ran(name, start, end, cat="cpu_op", tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid, "args": args}


def shares(events):
    step = ran(STEP, 0, 100, "user_annotation")
    return profile.by_phase_and_group(timeline([step, {"ph": "i", "name": "mark"}, *events]))


def test_the_innermost_operator_counts_and_its_owner_names_it():
    policy = ran("phase: policy", 10, 90, "user_annotation")
    events = [
        policy,
        ran("aten::linear", 20, 40),
        ran("aten::mm", 25, 40),
        ran("prime_kernels::linear_policy_loss", 40, 60),
        ran("aten::mm", 45, 55),  # the LM head's
        ran("optimizer", 60, 80, "user_annotation"),
        ran("aten::mul", 65, 70),  # AdamW's
        ran("PostBackwardFunctionModuleBackward", 80, 84),
        ran("aten::add", 81, 82),
        ran("gloo:all_reduce", 84, 95, tid=2),  # another thread's: waited for
        ran("gloo:all_reduce", 20, 30, tid=2),  # hidden behind work
        ran("aten::mm", 84, 90, tid=3),
    ]
    assert shares(events) == {
        ("policy", GEMM): 20,
        ("policy", "LM head"): 20,
        ("policy", "optimizer"): 20,
        ("policy", OTHER): 1,
        ("policy", HOST): 10 + 3,
        ("policy", COMMUNICATION): 6,
        (BETWEEN, COMMUNICATION): 5,
        (BETWEEN, HOST): 15,
    }


def test_on_a_gpu_the_kernel_that_runs_counts():
    """Kernels belong to what launched them, run later than it, and hide communication and the host."""
    gpu = {"cat": "kernel", "tid": 7}
    backward = ran("aten::mm", 30, 31, tid=2, **{"External id": 3})  # launched by the backward's thread
    events = [
        ran("phase: prm", 0, 80, "user_annotation"),
        ran("prime_kernels::linear_prm_loss", 1, 5, **{"External id": 1}),
        ran("aten::mm", 2, 3, **{"External id": 2}),
        backward,
        ran("nvjet_gemm", 10, 30, **gpu, **{"External id": 2}),
        ran("triton_rows", 25, 40, **gpu, **{"External id": 1}),
        ran("nvjet_gemm", 50, 60, **gpu, **{"External id": 3}),
        ran("ncclDevKernel_AllGather", 55, 70, cat="kernel", tid=8),
        ran("vectorized_elementwise_kernel", 70, 75, **gpu),
        ran("phase: prm", 0, 80, "gpu_user_annotation"),
    ]
    assert shares(events) == {
        ("prm", HOST): 10 + 10 + 5,
        ("prm", "LM head"): 20 + 10,
        ("prm", GEMM): 10,
        ("prm", COMMUNICATION): 10,
        ("prm", OTHER): 5,
        (BETWEEN, HOST): 20,
    }


def test_every_group_has_a_column():
    assert set(COLUMNS) == {*profile.GROUPS, OTHER, HOST}
    assert profile.group_of("ampere_bf16_s16816gemm_bf16_128x128") == GEMM
    assert profile.group_of("void flash_bwd_kernel") == "attention"
    assert profile.group_of("aten::mul") is None


def chosen(first, last, wanted=None, rank=0):
    made = Profile("-", last, wanted)
    return [step for step in range(first, last + 1) if not isinstance(made(step, Phases()), nullcontext)]


def test_which_step_is_profiled(monkeypatch):
    assert chosen(1, 10) == [3] and chosen(8, 10) == [10] and chosen(1, 2) == [2] and chosen(1, 1) == [1]
    assert chosen(1, 10, 7) == [7] and chosen(8, 10, 7) == []
    with pytest.raises(ValueError, match=r"--profile 11 is a step after the last one; give one up to steps=10"):
        Profile("-", 10, 11)
    monkeypatch.setattr(profile.distributed, "rank", lambda: 1)
    assert chosen(1, 10) == []


def test_a_failing_step_leaves_the_stopwatch_as_it_was(tmp_path):
    phases = Phases()
    with pytest.raises(RuntimeError, match="broken"), Profile(str(tmp_path), 1)(1, phases), phases("policy"):
        torch.ones(2).sum()
        raise RuntimeError("broken")
    assert phases.mark is nullcontext and not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--profile", "9"], "a step after the last one; give one up to steps=2"),
        (["--profile", "--dry-run"], "a dry run makes none"),
        (["--profile", "third"], "third is no step to profile"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(words, said, workspace, tmp_path, capsys):
    command = ["train", str(workspace / "config.yaml"), f"run_dir={tmp_path / 'run'}", *words]
    try:
        code = main(command)
    except SystemExit as end:
        code = end.code
    assert code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
