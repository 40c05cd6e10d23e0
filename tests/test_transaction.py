"""A step is a transaction: what was applied is synced, counted and kept, whatever goes wrong and whatever ends the run."""

import sys
from pathlib import Path

import processes
import pytest
from engines import needs_vllm

HERE = Path(__file__).parent
MINIS = ["policy.mini_batch=12", "prm.mini_batch=12"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_trainer_and_engine_agree_after_any_fault(engine, ranks, workspace, tmp_path):
    if engine == "vllm":
        needs_vllm()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if ranks == 2 else []
    script = [str(HERE / "faulty_steps.py"), str(workspace / "config.yaml"), f"run_dir={tmp_path / 'run'}"]
    settings = [*MINIS, f"rollout.engine={engine}", "rollout.vllm={gpu_memory_utilization: 0.2}"]
    result = processes.run([sys.executable, *launch, *script, *settings])
    assert result.returncode == 0, result.stderr[-3000:]
    assert "engine and trainer agree after each" in result.stdout
