"""Which checkpoints stay, which is the best, and how one is named."""

import os
import shutil

import pytest
import torch

from prime_fast.engine import checkpoint
from prime_fast.evaluation.evaluate import find_model


class Nothing:
    """An engine whose weights are of no interest."""

    def save_hf(self, directory, tokenizer):
        directory.mkdir()

    def save_state(self, directory):
        directory.mkdir(parents=True)


def save(run_dir, step, score=None, keep=2):
    checkpoint.save(run_dir, step, {"policy": Nothing()}, None, {}, keep=keep, score=score)


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
    checkpoint.shutil.rmtree(tmp_path / "checkpoints" / "step-000001")
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


def test_a_damaged_one_is_told(tmp_path):
    save(tmp_path, 1)
    state = tmp_path / "checkpoints/step-000001/state/trainer.pt"
    whole = state.read_bytes()
    for size in (0, 10, len(whole) // 2):
        state.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is damaged; to continue from an older checkpoint write its name into"):
            checkpoint.read(state.parents[1])
