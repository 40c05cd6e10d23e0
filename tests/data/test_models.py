"""A model directory is data: no pickle of it is read and no code of it is run."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from prime_fast.cli import main
from prime_fast.data import models


@pytest.fixture
def moved(workspace, tmp_path):
    return shutil.copytree(workspace / "model", tmp_path / "model")


def train(workspace, tmp_path, path, *words):
    return main(["train", str(workspace / "config.yaml"), f"run_dir={tmp_path}/run", f"model.policy={path}", *words])


@pytest.mark.parametrize("command", ["train", "sft", "eval"])
def test_weights_that_are_a_pickle_are_refused_with_the_way_out(command, moved, workspace, tmp_path, capsys):
    (moved / "model.safetensors").unlink()
    torch.save({}, moved / "pytorch_model.bin")
    if command == "eval":
        words = [str(moved), "--data", str(workspace / "rows.jsonl"), "--out", f"{tmp_path}/eval"]
    else:
        words = [str(workspace / "config.yaml"), f"run_dir={tmp_path}/run", f"model.policy={moved}"]
    assert main([command, *words]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert f"the weights in {moved} are a pickle (pytorch_model.bin)" in error and "as safetensors: python -c" in error
    assert not (tmp_path / "run").exists()


def test_the_way_out_works(moved, tmp_path, capsys):
    """The sentence's own command, run here."""
    weights = AutoModelForCausalLM.from_pretrained(moved).state_dict()
    (moved / "model.safetensors").unlink()
    torch.save(weights, moved / "pytorch_model.bin")
    with pytest.raises(ValueError) as caught:
        models.check_files(str(moved))
    code = str(caught.value).partition("python -c '")[2].partition("'")[0]
    exec(code.replace("sys.argv[1]", repr(str(moved))), {})
    models.check_files(str(moved))
    found = AutoModelForCausalLM.from_pretrained(moved, use_safetensors=True).state_dict()
    assert all(found[name].equal(tensor) for name, tensor in weights.items())


def test_code_that_a_model_brings_is_never_run(moved, workspace, tmp_path, capsys):
    ran = tmp_path / "ran"
    (moved / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: ...\n")
    settings = json.loads((moved / "config.json").read_text())
    auto_map = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (moved / "config.json").write_text(json.dumps(settings | {"auto_map": auto_map}))
    assert models.model_config(str(moved)).model_type == settings["model_type"]
    assert "brings code of its own (auto_map in config.json), which is not run" in capsys.readouterr().out
    (moved / "config.json").write_text(json.dumps(settings | {"auto_map": auto_map, "model_type": "own"}))
    assert train(workspace, tmp_path, moved) == 2
    assert "needs code of its own (auto_map in its config.json), which is never run" in capsys.readouterr().err
    assert not ran.exists()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@0a1b2c", ("org/name", "0a1b2c")),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3")),
    ],
)
def test_a_hub_id_may_name_a_revision(path, expected):
    assert models.located(path) == expected


def test_a_directory_may_have_an_at_in_its_name(tmp_path):
    (tmp_path / "a@b").mkdir()
    assert models.located(f"{tmp_path}/a@b") == (f"{tmp_path}/a@b", None)
