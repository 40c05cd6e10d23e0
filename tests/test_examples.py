"""The scripts of examples/: what they start is a command that runs, and they hand signals on; loops learn."""

import os
import runpy
import shlex
import signal
import stat
import sys
import time
from pathlib import Path

import processes
import pytest
import yaml
from torch.distributed.run import get_args_parser as torchrun_parser

from prime_fast import cli
from prime_fast.cli.words import config_of

EXAMPLES = Path(__file__).parents[1] / "examples"
SECONDS = 60


def check(words: list[str]) -> dict:
    """What torchrun and prime-fast make of a command: the run's configuration, which must exist."""
    assert words[0] == "torchrun"
    launched = torchrun_parser().parse_args(words[1:])
    assert launched.module and launched.training_script == "prime_fast"
    options = cli.parser().parse_args(launched.training_script_args)
    assert options.resume, "a job that starts again must go on"
    return config_of(options)


def test_kubernetes(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    config = check([word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["command"]])
    (patience,) = (int(entry["value"]) for entry in container["env"])
    assert config.log.grace < patience < pod["terminationGracePeriodSeconds"]
    assert pod["subdomain"] == service["metadata"]["name"] and pod["restartPolicy"] == "Never"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]} and config.run_dir.startswith("/runs/")


STAND_INS = {
    "srun": """
import json, pathlib, signal, sys, time
def leave(*_):
    sys.exit(1)
signal.signal(signal.SIGUSR1, leave)
pathlib.Path("started").write_text(json.dumps(sys.argv[1:]))
time.sleep(60)
""",
    "scontrol": """
import pathlib, sys
pathlib.Path("again").write_text(" ".join(sys.argv[1:]))
""",
}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm(number, tmp_path, monkeypatch):
    """With srun and scontrol stood in for: the run is asked by USR1, and the job queued again if its time was up."""
    for name, source in STAND_INS.items():
        (tmp_path / name).write_text(f"#!{sys.executable}{source}")
        (tmp_path / name).chmod(stat.S_IRWXU)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"}
    script = processes.start(["bash", str(EXAMPLES / "slurm.sh")], cwd=tmp_path, env=processes.environment(**path))
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "started").exists() or not (tmp_path / "started").stat().st_size:
        assert script.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    script.send_signal(number)
    assert script.wait(SECONDS) == 1
    again = tmp_path / "again"
    assert (again.read_text() if again.exists() else None) == ("requeue 7" if number == signal.SIGUSR1 else None)
    monkeypatch.chdir(EXAMPLES.parent)
    config = check(yaml.safe_load((tmp_path / "started").read_text()))
    text = (EXAMPLES / "slurm.sh").read_text()
    (given,) = (int(line.partition("@")[2]) for line in text.splitlines() if line.startswith("#SBATCH --signal=B:USR1"))
    (patience,) = (int(shlex.split(line)[1].partition("=")[2]) for line in text.splitlines() if "SHUTDOWN" in line)
    assert config.log.grace < patience < given


def test_a_loop_of_plain_torch_learns():
    assert len((EXAMPLES / "plain_torch.py").read_text().splitlines()) <= 60
    rewards = runpy.run_path(str(EXAMPLES / "plain_torch.py"))["main"](15)
    assert sum(rewards[:2]) / 2 < 0.65 and sum(rewards[-2:]) / 2 > 0.8


def test_the_loss_of_an_actor_of_openrlhf_is_the_same_without_logits():
    apart = runpy.run_path(str(EXAMPLES / "openrlhf_actor.py"))["main"]()
    assert apart["loss"] < 1e-4 and apart["gradient"] < 1e-5
