import shutil
import sys
from pathlib import Path

import processes
import pytest

SPACES = ["unshare", "--user", "--map-root-user", "--mount"]


def test_a_full_disk_costs_what_was_not_written_yet(workspace, tmp_path):
    """A tmpfs that a second checkpoint, then a line of metrics, does not fit on; with room made the run goes on."""
    if not shutil.which("unshare") or processes.run([*SPACES, "true"]).returncode:
        pytest.skip("a small disk is mounted in namespaces of its own, which this machine does not allow")
    program = Path(__file__).with_name("full_disk.py")
    script = 'mount -t tmpfs -o size=96m none "$1" && shift && exec "$@"'
    command = [*SPACES, "sh", "-c", script, "sh", str(tmp_path)]
    result = processes.run([*command, sys.executable, str(program), str(tmp_path), str(workspace / "config.yaml")])
    assert result.returncode == 0, result.stderr[-3000:]
    told = {part: [line for line in text.splitlines() if "prime-fast:" in line] for part, text in parts(result.stderr)}
    assert any("rank 0 cannot tell the others where it is" in line for line in told["3"])
    (checkpoint,), (config,) = ([line for line in told[part] if "could not be written" in line] for part in "13")
    assert "checkpoint step-000003 could not be written (" in checkpoint and "No space left on device" in checkpoint
    assert checkpoint.endswith("step-000002 with --resume")
    assert "could not be written (No space left on device)" in config and config.endswith("step-000002 with --resume")


def parts(text: str):
    marked = text.splitlines()
    for start, end in (("1", "2"), ("3", "4")):
        yield start, "\n".join(marked[marked.index(start) : marked.index(end)])
