"""A run goes on on another number of ranks: the same weights and AdamW states, to the bit, and the same steps after."""

import shutil
import sys
from types import SimpleNamespace

import processes
import pytest
import torch
from safetensors import safe_open
from test_trainer import run
from transformers import AutoModelForCausalLM

from prime_fast.engine import shards
from prime_fast.engine.writing import write
from prime_fast.metrics import read_metrics

SAME = ("outcome", "groups_kept", "groups", "rows", "surplus", "response_length", "rollouts", "policy_updates")
CLOSE = ("prm_loss", "prm_grad_norm", "policy_grad_norm", "entropy", "process_over_outcome")


@pytest.mark.parametrize("before", [1, 2, 3, 5])
@pytest.mark.parametrize("now", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(before, now, tmp_path):
    """Of parameters that no number divides, or that have fewer elements than there are ranks."""
    for size in (1, 3, 30, 101):
        whole, parameter = torch.randn(size), SimpleNamespace(ds_numel=size)
        for rank in range(before):
            start, stop = shards._range(parameter, rank, before)
            write(tmp_path, {shards.file_name(rank): {"weight/x": whole[start:stop]}})
        files = [safe_open(tmp_path / shards.file_name(rank), "pt") for rank in range(before)]
        read = []
        for rank in range(now):
            start, stop = shards._range(parameter, rank, now)
            read.append(torch.full((stop - start,), torch.nan))
            shards._read(files, "weight/x", parameter, start, read[-1])
        assert torch.cat(read).equal(whole)


@pytest.fixture(scope="module")
def straight(workspace, tmp_path_factory):
    """Three steps on one rank."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    run(workspace, run_dir, "steps=3", *SETTINGS)
    return run_dir


SETTINGS = ["log.checkpoint_every=1", "log.keep=4", "log.eval_every=0", "rollout.prompts=5"]


def go_on(ranks: int, source, step: int, run_dir, workspace):
    """Copy a run, and make one more step after `step` on so many ranks."""
    shutil.copytree(source, run_dir)
    (run_dir / "checkpoints" / "latest").write_text(f"step-{step:06d}")
    words = [f"steps={step + 1}", *SETTINGS]
    if ranks == 1:
        run(workspace, run_dir, *words, resume=True)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        command += ["prime_fast", "train", str(workspace / "config.yaml"), f"run_dir={run_dir}", *words, "--resume"]
        result = processes.run(command, env=processes.environment(OMP_NUM_THREADS="1"))
        assert result.returncode == 0, result.stderr[-3000:]
    return run_dir


def same_step(one, two, step: int) -> None:
    """The updates of all weights agree to 0.1% in norm, as those of runs on different numbers of ranks do."""
    left, right = (next(r for r in read_metrics(run_dir) if r["step"] == step) for run_dir in (one, two))
    assert {key: left[key] for key in SAME} == {key: right[key] for key in SAME}
    for key in CLOSE:
        assert right[key] == pytest.approx(left[key], rel=1e-3), key
    for name in ("policy", "prm"):
        start, left, right = (
            AutoModelForCausalLM.from_pretrained(run_dir / f"checkpoints/step-{number:06d}" / name).state_dict()
            for run_dir, number in ((one, step - 1), (one, step), (two, step))
        )
        update = sum((left[key] - start[key]).square().sum() for key in start) ** 0.5
        assert sum((left[key] - right[key]).square().sum() for key in start) ** 0.5 / update < 1e-3, name


def test_a_run_goes_on_on_other_ranks(straight, workspace, tmp_path):
    """1 -> 2 ranks, then 2 -> 4 and 2 -> 1."""
    two = go_on(2, straight, 1, tmp_path / "two", workspace)
    same_step(straight, two, 2)
    one = go_on(1, two, 2, tmp_path / "one", workspace)
    same_step(one, go_on(4, two, 2, tmp_path / "four", workspace), 3)
    assert sorted(path.name for path in (two / "checkpoints/step-000002/state/prm").iterdir()) == [
        shards.file_name(0),
        shards.file_name(1),
    ]
