"""Which checkpoints stay, which is the best, and how one is named."""

import hashlib
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from prime_fast.engine import checkpoint
from prime_fast.engine.distributed import Stop
from prime_fast.engine.writing import Checkpoints, write
from prime_fast.evaluation.evaluate import find_model


class Nothing:
    """An engine whose weights are of no interest."""

    def exported(self, tokenizer):
        return {"config.json": b"{}"}

    def states(self):
        return {"weight/x": torch.arange(8.0)}


def save(run_dir, step, score=None, keep=2):
    checkpoints = Checkpoints(run_dir, keep)
    checkpoints.save(step, {"policy": Nothing(), "prm": Nothing()}, None, {}, score)
    checkpoints.finish()


def kept(run_dir):
    return [int(path.name[5:]) for path in sorted((run_dir / "checkpoints").glob("step-*"))]


def test_the_newest_and_the_best_stay(tmp_path):
    for step, score in ((1, None), (2, 0.5), (3, 0.25), (4, None), (5, 0.375)):
        save(tmp_path, step, score)
    assert kept(tmp_path) == [2, 4, 5]
    assert checkpoint.best(tmp_path).name == "step-000002" and checkpoint.latest(tmp_path).name == "step-000005"
    save(tmp_path, 6, 0.5)  # as good, and newer
    assert kept(tmp_path) == [5, 6] and checkpoint.best(tmp_path).name == "step-000006"
    save(tmp_path, 7, float("nan"), keep=1)
    assert kept(tmp_path) == [6, 7] and checkpoint.best(tmp_path).name == "step-000006"
    save(tmp_path, 1_000_000, keep=1)  # sorts before the others as text
    assert kept(tmp_path) == [6, 1_000_000]


def test_without_an_evaluation_there_is_no_best(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step, keep=3)
    assert kept(tmp_path) == [2, 3, 4] and checkpoint.best(tmp_path) is None
    assert not (tmp_path / "checkpoints" / "best").exists()


def test_a_best_one_that_someone_deleted_is_not_named(tmp_path):
    save(tmp_path, 1, 0.9)
    save(tmp_path, 2, 0.1)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000001")
    save(tmp_path, 3)
    assert checkpoint.best(tmp_path).name == "step-000002"


def test_a_model_is_named_by_its_run_or_as_the_best(tmp_path):
    save(tmp_path, 1, 0.9)
    save(tmp_path, 2, 0.1)
    root = tmp_path / "checkpoints"
    assert find_model(str(tmp_path), "policy") == str(root / "step-000002" / "policy")
    assert find_model(str(root / "best"), "policy") == str(root / "step-000001" / "policy")
    assert find_model(str(root / "latest"), "prm") == str(root / "step-000002" / "prm")
    assert find_model("some/best", "policy") == "some/best"


def test_a_checkpoint_of_another_version_is_told(tmp_path):
    save(tmp_path, 1)
    path = checkpoint.latest(tmp_path) / "state" / "trainer.pt"
    state = checkpoint.read(checkpoint.latest(tmp_path))
    for other in ({"format": 1}, {}):
        torch.save({key: value for key, value in state.items() if key != "format"} | other, path)
        with pytest.raises(ValueError, match=r"step-000001 was written by another version.*model.policy=.*policy"):
            checkpoint.read(checkpoint.latest(tmp_path))


def test_a_copy_under_a_name_of_its_own_is_left_alone(tmp_path):
    save(tmp_path, 1, 0.9)
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "step-000001", root / "step-000001-good")
    for step in (2, 3):
        save(tmp_path, step, 0.5, keep=1)
    assert sorted(os.listdir(root)) == ["best", "latest", "step-000001", "step-000001-good", "step-000003"]
    assert checkpoint.best(tmp_path).name == "step-000001"


def test_who_goes_back_keeps_what_is_written_then(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "latest").write_text("step-000001")
    save(tmp_path, 2, keep=1)
    assert checkpoint.latest(tmp_path).name == "step-000002" and kept(tmp_path) == [2, 3]


def test_without_a_pointer_the_last_one_is_the_newest(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "latest").unlink()
    assert checkpoint.latest(tmp_path).name == "step-000002"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run with two checkpoints."""
    run_dir = tmp_path_factory.mktemp("two")
    save(run_dir, 1, 0.5)
    save(run_dir, 2, 0.25)
    return run_dir


def truncated(path):
    os.truncate(path, path.stat().st_size - 1)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = [
    "policy/config.json",
    "prm/config.json",
    "state/policy/rank-00000.safetensors",
    "state/prm/rank-00000.safetensors",
    "state/trainer.pt",
    "manifest.json",
]
DAMAGE = {
    truncated: ("{} has [0-9]+ bytes instead of", "manifest.json is damaged"),
    flipped: ("{} holds other bytes than were written", "manifest.json is damaged"),
    os.remove: ("{} is missing", "manifest.json is missing"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_one_is_told_and_the_one_before_is_taken(damage, file, two, tmp_path, capsys):
    run_dir = shutil.copytree(two, tmp_path / "run")
    root = run_dir / "checkpoints"
    damage(root / "step-000002" / file)
    told = DAMAGE[damage][file == "manifest.json"].format(file)
    assert checkpoint.intact(run_dir) == root / "step-000001"
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"prime-fast: .*/step-000002 is damaged: {told}.*", first)
    assert second == f"prime-fast: continuing from {root}/step-000001, though step-000002 is newer"
    if file.startswith("policy/") or (file == "manifest.json" and damage is not os.remove):
        with pytest.raises(ValueError, match=f"step-000002 is damaged: {told}.*name another checkpoint of"):
            find_model(str(run_dir), "policy")
    else:
        assert find_model(str(run_dir), "policy") == str(root / "step-000002/policy")
        assert ("so its files are not checked" in capsys.readouterr().err) == (file == "manifest.json")
    damage(root / "step-000001" / file)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    with pytest.raises(ValueError, match=rf"no checkpoint in .* is intact \(step-000002: {told}.*step-000001: {told}"):
        checkpoint.intact(run_dir)
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}


def test_a_file_that_is_none_of_it_is_damage(two, tmp_path, capsys):
    run_dir = shutil.copytree(two, tmp_path / "run")
    (run_dir / "checkpoints/step-000002/policy/adapter_config.json").write_text("{}")
    (run_dir / "checkpoints/step-000001/policy/.nfs0001").write_text("left behind by a file system")
    assert checkpoint.intact(run_dir).name == "step-000001"
    assert "policy/adapter_config.json is none of its files" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"step-00000", b"step-000007", b"\xff\x00", b"../../elsewhere"])
def test_a_damaged_pointer_is_told(content, two, tmp_path, capsys):
    run_dir = shutil.copytree(two, tmp_path / "run")
    for name in ("latest", "best"):
        (run_dir / "checkpoints" / name).write_bytes(content)
    assert checkpoint.intact(run_dir) == checkpoint.latest(run_dir) == run_dir / "checkpoints/step-000002"
    assert "checkpoints/latest is damaged: it names no checkpoint that is there" in capsys.readouterr().err
    assert checkpoint.best(run_dir) is None
    with pytest.raises(ValueError, match="checkpoints/best is damaged"):
        find_model(str(run_dir / "checkpoints/best"), "policy")


def test_a_failure_in_the_background_is_raised_in_its_own_words(two, tmp_path):
    run_dir = shutil.copytree(two, tmp_path / "run")
    checkpoints = Checkpoints(run_dir, keep=2)
    root = run_dir / "checkpoints"
    (root / ".partial-step-000003").write_text("in the way")
    with pytest.raises(Stop, match="checkpoint step-000003 could not be written .*Not a directory"):
        checkpoints.save(3, {"policy": Nothing()}, None, {})
    (root / ".partial-step-000003").unlink()
    checkpoints.save(3, {"policy": Strange()}, None, {})
    with pytest.raises(Stop, match=r"checkpoint step-000003 could not be written \(KeyError: torch.complex64\)"):
        checkpoints.finish()
    checkpoints.poll()  # told once
    checkpoints.close()
    assert sorted(os.listdir(root)) == ["best", "latest", "step-000001", "step-000002"]
    assert checkpoint.intact(run_dir) == root / "step-000002"


class Strange(Nothing):
    def states(self):
        return {"weight/x": torch.zeros(2, dtype=torch.complex64)}


def test_what_lies_in_a_file_is_what_safetensors_reads(tmp_path):
    tensors = {
        "b": torch.randn(3, 5, dtype=torch.bfloat16),
        "a": torch.randn(7),
        "step": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "mask": torch.tensor([True, False]),
        "ids": torch.arange(3),
    }
    written = write(tmp_path, {"x/all.safetensors": tensors})["x/all.safetensors"]
    found = load_file(tmp_path / "x/all.safetensors")
    assert found.keys() == tensors.keys() and all(found[name].equal(tensors[name]) for name in tensors)
    content = (tmp_path / "x/all.safetensors").read_bytes()
    assert written == (len(content), hashlib.sha256(content).hexdigest())
