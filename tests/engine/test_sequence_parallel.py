import json
import shutil

import processes
import pytest
import shared_packs
from test_trainer import stable, weights
from transformers import AutoModelForCausalLM

from prime_fast.cli import main
from prime_fast.config import load_config
from prime_fast.engine import ulysses
from prime_fast.metrics import read_metrics


def torchrun(ranks: int, *words: str):
    result = processes.torchrun(ranks, *words)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("ranks", shared_packs.CASES)
def test_any_number_of_ranks_to_a_pack_gives_the_same(ranks, tmp_path):
    """Log-probs, losses, scores and all gradients of the passes of PRM, policy and SFT: several rows a pack, rows that
    cross ranks and are longer than micro_tokens of one, key-value heads split and copied, a sliding window, with and
    without checkpointing."""
    shared_packs.write_models(tmp_path)
    assert torchrun(ranks, shared_packs.__file__, str(tmp_path), "1").count(f"{ranks} ranks agree") == ranks


BOTH = ["log.eval_every=0", "log.checkpoint_every=1"]
SHARED = ["engine.sequence_parallel=2", "engine.micro_tokens=20"]  # a row: up to 27 tokens


@pytest.fixture(scope="module")
def shared(workspace, other_prm, tmp_path_factory):
    """Two steps on two ranks that hold each pack together."""
    run_dir = tmp_path_factory.mktemp("shared") / "run"
    train(workspace, run_dir, other_prm)
    return run_dir


def train(workspace, run_dir, *more):
    words = ["-m", "prime_fast", "train", str(workspace / "config.yaml"), f"run_dir={run_dir}", *BOTH, *SHARED, *more]
    return torchrun(2, *words)


def test_a_run_is_that_of_one_rank(shared, workspace, other_prm, tmp_path):
    """All weights' updates agree to 0.1% in norm: float32 sums in another order, amplified by AdamW's division."""
    run_dir = tmp_path / "one"
    assert main(["train", str(workspace / "config.yaml"), f"run_dir={run_dir}", *BOTH, other_prm, "steps=1"]) == 0
    one, two = read_metrics(run_dir)[0], read_metrics(shared)[0]
    assert set(one) == set(two) | {"kernel/linear_prm_loss"}  # linear_logprob and a sum over the ranks take its place
    for key in ("outcome", "groups_kept", "groups", "rows", "response_length", "rollouts", "policy_updates"):
        assert one[key] == two[key], key
    for key in (
        "prm_loss",
        "prm_grad_norm",
        "prm_accuracy",
        "prm_pair_accuracy",
        "process_reward_mean",
        "policy_loss",
        "policy_grad_norm",
        "entropy",
    ):
        assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), key
    start = AutoModelForCausalLM.from_pretrained(workspace / "model").state_dict()
    for name in ("policy", "prm"):
        left = weights(run_dir, name)
        right = AutoModelForCausalLM.from_pretrained(shared / "checkpoints" / "step-000001" / name).state_dict()
        update = sum((left[key] - start[key]).square().sum() for key in start) ** 0.5
        difference = sum((left[key] - right[key]).square().sum() for key in start) ** 0.5
        assert difference / update < 1e-3, name


def test_a_run_resumes_to_the_same_bits(shared, workspace, other_prm, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(shared, run_dir)
    (run_dir / "checkpoints" / "latest").write_text("step-000001")
    train(workspace, run_dir, other_prm, "--resume")
    assert stable(read_metrics(run_dir)) == stable(read_metrics(shared))
    for name in ("policy", "prm"):
        expected, got = weights(shared, name), weights(run_dir, name)
        assert all(expected[key].equal(got[key]) for key in expected)


IMPOSSIBLE = {  # (attention heads, key-value heads, n, ranks): what is said
    (4, 4, 2, 3): "=2 does not divide the number of ranks, 3; start a multiple of 2",
    (4, 4, 2, 1): "=2 does not divide the number of ranks, 1; start a multiple of 2",
    (
        6,
        6,
        4,
        4,
    ): "=4 cannot divide the 6 attention heads and 6 key-value heads of {path} among 4 ranks; set it to one of "
    "1, 2, 3, 6",
    (
        6,
        3,
        2,
        2,
    ): "=2 cannot divide the 6 attention heads and 3 key-value heads of {path} among 2 ranks; set it to one of 1, 3, 6",
}


@pytest.mark.parametrize("case", IMPOSSIBLE, ids=str)
@pytest.mark.parametrize("role", ["policy", "prm"])
def test_a_number_that_cannot_work_is_refused_before_anything_is_written(case, role, workspace, tmp_path, capsys):
    heads, kv_heads, size, ranks = case
    path = tmp_path / "model"
    shutil.copytree(workspace / "model", path)
    settings = json.loads((path / "config.json").read_text())
    settings |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16}
    (path / "config.json").write_text(json.dumps(settings))
    words = [f"run_dir={tmp_path / 'run'}", f"model.{role}={path}", f"engine.sequence_parallel={size}"]
    said = "engine.sequence_parallel" + IMPOSSIBLE[case].format(path=path)
    with pytest.raises(ValueError) as caught:
        ulysses.check(load_config(workspace / "config.yaml", words), ranks)
    assert said in str(caught.value)
    config = str(workspace / "config.yaml")
    assert main(["train", config, *words, "--dry-run", "--ranks", str(ranks)]) == 2
    assert said in capsys.readouterr().err
    for command in ("train", "sft"):  # on the one rank of this process
        assert main([command, config, *words]) == 2
        assert f"={size} does not divide the number of ranks, 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
