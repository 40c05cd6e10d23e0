"""--resume continues a run only with what it was made with, or with what is accepted in its place."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file, save_file

from prime_fast import durable, identity
from prime_fast.cli import main
from prime_fast.data.models import load_tokenizer
from prime_fast.durable import Written
from prime_fast.engine import checkpoint, manifest
from prime_fast.metrics import read_metrics

REWARD = """
from helper import outcome

def compute_score(data_source, solution_str, ground_truth, extra_info):
    return outcome(solution_str)
"""
HELPER = "def outcome(text):\n    return float(sum(map(ord, text)) % 3 == 0)\n"
SMALL = ["rollout.prompts=4", "rollout.max_rounds=2", "log.eval_every=0"]


def train(folder: Path, *words: str) -> int:
    """A run whose every input lies in `folder`."""
    places = [f"model.policy={folder}/model", f"reward.function={folder}/own_reward.py:compute_score"]
    places += [f"data.train={folder}/rows.jsonl", f"data.eval={folder}/eval.jsonl", f"run_dir={folder}/run"]
    return main(["train", str(folder / "config.yaml"), *places, *SMALL, *words])


@pytest.fixture(scope="module")
def made(workspace, tmp_path_factory) -> Path:
    """A run of one step with its inputs."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(workspace / "model", folder / "model")
    for name, source in (("config.yaml", "config.yaml"), ("rows.jsonl", "rows.jsonl"), ("eval.jsonl", "rows.jsonl")):
        shutil.copy(workspace / source, folder / name)
    (folder / "own_reward.py").write_text(REWARD)
    (folder / "helper.py").write_text(HELPER)
    sys.modules.pop("helper", None)
    assert train(folder, "steps=1") == 0
    return folder


@pytest.fixture
def moved(made, tmp_path) -> Path:
    """The same somewhere else: what was made with it is told by content alone."""
    return shutil.copytree(made, tmp_path / "moved")


def lines(path: Path, change) -> None:
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(rows)))


def permuted(rows):
    return random.Random(1).sample(rows, len(rows))


def one_byte(rows):
    return rows[:-1] + [rows[-1].replace('"ground_truth": "1"', '"ground_truth": "2"')]


def other_weight(folder):
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, path, {"format": "pt"})


def other_template(folder):
    tokenizer = load_tokenizer(str(folder / "model"))
    tokenizer.chat_template += "{# #}"
    tokenizer.save_pretrained(folder / "model")


def older_package(folder):
    path = checkpoint.latest(folder / "run") / "state" / checkpoint.IDENTITY
    known = json.loads(path.read_text())
    known["packages"]["torch"] = "2.4.0"
    path.write_text(json.dumps(known))
    seal_anew(path.parents[1])


def seal_anew(directory):
    """As if it had been written so."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    files.pop(manifest.MANIFEST)
    made = {name: Written(path.stat().st_size, durable.sha256(path)) for name, path in files.items()}
    manifest.seal(directory, made, manifest.score(directory))


CHANGES = {  # what is done, the part to accept, what is told
    "permuted rows": (lambda f: lines(f / "rows.jsonl", permuted), "data", "train was 40 rows"),
    "one byte of a row": (lambda f: lines(f / "rows.jsonl", one_byte), "data", "train was 40 rows"),
    "a row less": (lambda f: lines(f / "rows.jsonl", lambda rows: rows[1:]), "data", "and is 39 rows"),
    "held-out rows": (lambda f: lines(f / "eval.jsonl", permuted), "data", "eval was 8 rows"),
    "other weights": (other_weight, "models", "reference was files"),
    "a setting of the model": (
        lambda f: lines(f / "model/config.json", lambda text: [t.replace("10000.0", "20000.0") for t in text]),
        "models",
        "policy was files",
    ),
    "chat template": (other_template, "tokenizer", "chat template was"),
    "reward": (lambda f: (f / "own_reward.py").write_text(REWARD + "\n"), "reward", "own_reward was"),
    "its helper": (lambda f: (f / "helper.py").write_text(HELPER.replace("3", "2")), "reward", "helper was"),
    "a package": (older_package, "packages", "torch was 2.4.0 and is"),
}


def tree(folder: Path) -> dict:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_told_and_nothing_is_written(name, moved, capsys):
    change, part, told = CHANGES[name]
    change(moved)
    before = tree(moved / "run")
    assert train(moved, "steps=2", "--resume") == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert f"{part}, where" in error and told in error and error.endswith("--accept " + part), error
    others = [other for other in ("data", "models", "tokenizer", "reward", "packages") if other != part]
    assert train(moved, "steps=2", "--resume", "--accept", ",".join(others)) == 2
    assert tree(moved / "run") == before


def state(folder: Path) -> dict:
    return torch.load(checkpoint.latest(folder / "run") / "state" / "trainer.pt", weights_only=True)


def test_moved_inputs_are_the_same_inputs(made, moved, tmp_path):
    """To the same bits as a run that stayed where it was; a finished run has nothing left to do."""
    straight = shutil.copytree(made, tmp_path / "straight", ignore=shutil.ignore_patterns("run"))
    assert train(straight, "steps=2") == 0 and train(moved, "steps=2", "--resume") == 0
    weights = [load_file(checkpoint.latest(f / "run") / "policy/model.safetensors") for f in (straight, moved)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    known = [json.loads((checkpoint.latest(f / "run") / "state/identity.json").read_text()) for f in (straight, moved)]
    assert known[0] == known[1] == state(moved)["identity"]
    before = tree(moved / "run/checkpoints")
    assert train(moved, "steps=2", "--resume") == 0
    assert tree(moved / "run/checkpoints") == before and [r["step"] for r in read_metrics(moved / "run")] == [1, 2]


def test_accepted_rows_start_an_epoch_of_their_own(moved):
    lines(moved / "rows.jsonl", lambda rows: rows[:25])
    assert state(moved)["collector"]["surplus"] and state(moved)["collector"]["sampler"]["epoch"] == 0
    assert train(moved, "steps=2", "--resume", "--accept", "data") == 0
    after = state(moved)["collector"]
    assert after["sampler"]["size"] == 25 and after["sampler"]["epoch"] == 1
    drawn = after["drawn"] - state_of_first(moved)["drawn"]
    assert after["sampler"]["position"] == drawn and all(group[1] < 25 for group in after["surplus"])
    assert train(moved, "steps=3", "--resume") == 0  # what was accepted once is what the run is made with now


def state_of_first(folder: Path) -> dict:
    return torch.load(folder / "run/checkpoints/step-000001/state/trainer.pt", weights_only=True)["collector"]


def test_groups_scored_by_another_reward_do_not_train(moved):
    (moved / "helper.py").write_text(HELPER.replace("3", "2"))
    waiting = {group[0] for group in state(moved)["collector"]["surplus"]}
    assert waiting and train(moved, "steps=2", "--resume", "--accept=models,reward", "--accept", "packages") == 0
    record = read_metrics(moved / "run")[-1]
    assert record["rollouts"] // 4 == state(moved)["collector"]["drawn"]
    assert not waiting & {group[0] for group in state(moved)["collector"]["surplus"]}


def test_a_checkpoint_that_does_not_say_is_accepted_as_a_whole(moved, capsys):
    os.remove(checkpoint.latest(moved / "run") / "state/identity.json")
    seal_anew(checkpoint.latest(moved / "run"))
    assert train(moved, "steps=2", "--resume") == 2  # a path is all there is to go by
    assert "model.policy was" in capsys.readouterr().err
    everything = "data,models,tokenizer,reward,packages"
    assert train(moved, "steps=2", "--resume", "--accept", "data,models,reward") == 2
    assert capsys.readouterr().err.strip().endswith(f"add --accept {everything}")
    assert train(moved, "steps=2", "--resume", "--accept", everything) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.eval_rows=4"], "data.eval_rows was 8 and is 4; put it back, add --accept data, or start"),
        (["data.drop=[broken]"], "data.drop was [] and is ['broken']"),
        (["rollout.vllm.seed=1"], "rollout.vllm.seed was None and is 1; put it back, or start"),
        (["reward.timeout=5"], "add --accept reward, or"),
        (["prm.lora={}"], "prm.lora.rank was None and is 32"),
        (["prm.lora={}", "--accept", "models"], "would put the checkpoint's adapter on other weights"),
        (["--accept", "data, dta"], "--accept 'dta' is none of data, models, tokenizer, reward, packages"),
    ],
)
def test_settings(words, told, moved, capsys):
    assert train(moved, "steps=2", *words, "--resume") == 2
    assert told in capsys.readouterr().err


def test_a_setting_that_is_gone_is_a_change(moved, capsys):
    """Of a free-form section too, whose keys have no default."""
    path = moved / "run/config.yaml"
    path.write_text(path.read_text().replace("vllm: {}", "vllm: {seed: 3}"))
    assert train(moved, "steps=2", "--resume") == 2
    assert "rollout.vllm.seed was 3 and is None" in capsys.readouterr().err


def test_a_key_that_an_older_config_lacks_has_its_default(moved):
    path = moved / "run/config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "max_failures" not in line))
    assert train(moved, "steps=1", "reward.max_failures=0.3", "--resume") == 0


def test_what_an_ended_run_is_told_to_set_may_be_set(moved):
    assert train(moved, "steps=1", "rollout.patience=0", "--resume") == 0


def test_accept_belongs_to_resume(moved, capsys):
    assert train(moved, "--accept", "data") == 2
    assert "add --resume" in capsys.readouterr().err


def test_big_weights_are_sampled(tmp_path, monkeypatch):
    """Any tensor that changed as a whole is seen, in files too big to be read as a whole; so is a changed header."""
    weights = {f"layer.{i}": torch.randn(64, 257) for i in range(5)} | {"norm": torch.ones(16)}

    def digest(changed) -> str:
        save_file(changed, tmp_path / "model.safetensors")
        return identity.model(str(tmp_path))

    whole = digest(weights)
    monkeypatch.setattr(identity, "WHOLE_BYTES", 1000)
    sampled = digest(weights)
    assert sampled == digest(weights) != whole
    for name, tensor in weights.items():
        assert digest(weights | {name: tensor * 1.001}) != sampled
    assert digest({name.replace("layer", "Layer"): tensor for name, tensor in weights.items()}) != sampled


def test_two_ranks_tell_once(moved):
    """Of a change that --resume finds, and, without it, of a reward that cannot score."""
    (moved / "helper.py").write_text("def outcome(text):\n    raise KeyError('no judge')\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["prime_fast", "train", str(moved / "config.yaml"), f"run_dir={moved}/two"]
    command += [f"data.train={moved}/rows.jsonl", f"reward.function={moved}/own_reward.py:compute_score"]
    result = processes.run(command)
    (told,) = [line for line in result.stderr.splitlines() if "prime-fast: " in line]
    assert "rows.jsonl, row 1 " in told and "KeyError: 'no judge'" in told
    assert result.returncode == 1 and not (moved / "two").exists()


def test_a_model_of_the_hub_is_its_commit(made, tmp_path):
    """In a cache as the hub's client leaves it; the weights need not be there yet. A name may be pinned to another."""
    commits = {"main": "0123456789abcdef0123456789abcdef01234567", "v1": "76543210fedcba9876543210fedcba9876543210"}
    home = tmp_path / "hub/models--some--model"
    (home / "refs").mkdir(parents=True)
    settings = json.loads((made / "model/config.json").read_text())
    for length, (name, commit) in enumerate(commits.items(), 64):
        (home / "refs" / name).write_text(commit)
        (home / "snapshots" / commit).mkdir(parents=True)
        changed = json.dumps(settings | {"max_position_embeddings": length})
        (home / "snapshots" / commit / "config.json").write_text(changed)
    names = ["some/model", "some/model@v1", f"some/model@{commits['v1']}"]
    code = "from prime_fast import identity; from prime_fast.data.models import model_config\n"
    code += f"for n in {names}: print(identity.model(n), model_config(n).max_position_embeddings)"
    environment = processes.environment(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    done = processes.run([sys.executable, "-c", code], env=environment)
    told = done.stdout.splitlines()
    assert told == [f"commit {commits['main']} 64", *[f"commit {commits['v1']} 65"] * 2], done.stderr


def test_a_tokenizer_that_was_used_is_the_same(workspace):
    used = load_tokenizer(str(workspace / "model"))
    before = identity.tokens(used)
    used(["1+1:", "1"], padding="max_length", truncation=True, max_length=3)
    assert used.backend_tokenizer.padding and identity.tokens(used) == before
