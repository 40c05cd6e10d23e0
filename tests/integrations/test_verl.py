"""prime-fast convert on scripts with the published runs' values, and verl's rows and reward functions as they are."""

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from prime_fast.cli import main
from prime_fast.config import load_config
from prime_fast.data.sources import read
from prime_fast.integrations.launch_script import settings_of
from prime_fast.integrations.verl import convert
from prime_fast.rewards import score

HOME = {"HOME": "/home/me"}
# the settings of the published run (PRIME-RL/PRIME 18ad596f), in a script of the same kind
PUBLISHED = r"""
set -x  # the author's comment \
export NCCL_DEBUG=WARN  # a comment, with data.train_batch_size=1
NAME='solvable-0.2-0.8'
DATA=path/to/data
SFT="PRIME-RL/Eurus-2-7B-SFT"

python3 -m verl.trainer.main_ppo \
    data.train_files=["$DATA/train.parquet"] data.val_files=["${DATA}/validation.parquet"] \
    data.train_batch_size=256 data.val_batch_size=1024 data.max_prompt_length=1024 data.max_response_length=3072 \
    actor_rollout_ref.model.path=$SFT actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.actor.optim.lr=5e-7 actor_rollout_ref.actor.entropy_coeff=0. \
    actor_rollout_ref.actor.ppo_mini_batch_size=256 actor_rollout_ref.actor.ppo_micro_batch_size=8 \
    actor_rollout_ref.actor.fsdp_config.grad_offload=True \
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.7 algorithm.kl_ctrl.kl_coef=0.00 \
    trainer.logger=['console','wandb'] trainer.experiment_name=$NAME trainer.default_local_dir=ckpt/$NAME \
    trainer.n_gpus_per_node=8 trainer.nnodes=1 trainer.save_freq=16 trainer.test_freq=16 trainer.total_epochs=1 \
    data.n_samples=4 data.filter_accuracy=True data.accuracy_lower_bound=0.2 data.accuracy_upper_bound=0.8 \
    algorithm.adv_estimator=rloo algorithm.adv_params.verifier_gamma=1.0 \
    algorithm.adv_params.reward_model_gamma=1.0 reward_model.rm_type=prime reward_model.rm_coef=5 \
    reward_model.prime_model.path=$SFT reward_model.prime_model.ref_path=$SFT \
    reward_model.prime_model.update=after reward_model.prime_model.beta_train=0.05 \
    reward_model.prime_model.optim.lr=1e-6 reward_model.prime_model.optim.grad_clip=10.0 \
    reward_model.prime_model.input_tokenizer=null reward_model.prime_granularity=token \

"""
RECIPE = """
gsm8k=$HOME/data/gsm8k/train.parquet
files="['$gsm8k', '~/more.parquet']"
ARGS=(
    data.max_prompt_length=$((1024 * 2))   # it's an array over lines (of words)
    data.max_response_length=${LONGEST:-"$((1024 * 20 - 1))"}
    +trainer.new_key='two words'
)
python3 -m recipe.prime.main_prime --config-name=prime_trainer data.train_files="$files" "${ARGS[@]}" \\
    data.train_batch_size=64 actor_rollout_ref.model.path=some/model actor_rollout_ref.actor.ppo_mini_batch_size=64 \\
    actor_rollout_ref.rollout.enforce_eager=True actor_rollout_ref.rollout.tensor_model_parallel_size=2 \\
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.002 \\
    reward_model.model.path=other/prm reward_model.model.beta_train=0.1 reward_model.mini_batch_size=32 \\
    reward_model.model.update=reverse algorithm.reward_dpo_coef=2 algorithm.reward_gt_coef=4 \\
    custom_reward_function.path=~/mine.py trainer.seed_of=$(date) $@
"""
GRPO = """
data: {train_files: train.parquet, train_batch_size: 8, max_prompt_length: 16, max_response_length: 32, seed: 7}
actor_rollout_ref:
  model: {path: some/model}
  actor:
    ppo_mini_batch_size: 4
    clip_ratio: 0.3
    clip_ratio_high: 0.4
    loss_agg_mode: seq-mean-token-mean
    optim: {lr: 2.0e-6, weight_decay: 0.1, warmup_style: cosine}
  rollout: {n: 5, name: sglang, top_k: -1, temperature: 0.8}
  ref: {log_prob_micro_batch_size_per_gpu: 4}
algorithm: {adv_estimator: grpo, filter_groups: {enable: true}}
reward_model: {model: {path: "${actor_rollout_ref.model.path}"}}
trainer: {save_freq: -1, test_freq: 5, total_training_steps: 30, logger: [console, tensorboard]}
"""


def test_the_published_run_becomes_its_configuration(tmp_path, capsys):
    """configs/eurus2-7b-8xa100.yaml was made by hand."""
    script, out = tmp_path / "run.sh", tmp_path / "run.yaml"
    script.write_text(PUBLISHED)
    assert main(["convert", str(script), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    made = load_config(out).model_dump()
    by_hand = load_config("configs/eurus2-7b-8xa100.yaml").model_dump()
    own = {"run_dir": "ckpt/solvable-0.2-0.8", "steps": 100, "seed": 0}  # the run was stopped after 592 steps
    assert {key: made.pop(key) for key in own} == own
    by_hand["data"] |= {"train": ["path/to/data/train.parquet"], "eval": ["path/to/data/validation.parquet"]}
    by_hand["data"]["eval_rows"] = 256  # verl evaluates all rows, in batches
    assert {key: by_hand[key] for key in made} == made
    text = out.read_text()
    left = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")]
    assert said.splitlines() == [*left, f"wrote {out}"]
    assert "not carried: trainer.total_epochs=1: a run's length is told in steps; set steps to rows * epochs" in text
    kept = ["gpu_memory_utilization=0.7", "grad_offload=true", "val_batch_size=1024", "rm_coef=5", "kl_coef=0.0"]
    assert all(f"{setting}: " in text for setting in kept) and "by default" not in text


def other_than(value):
    if isinstance(value, bool) or value == "vllm":
        return not value if value is True else "hf"
    return [f"{value[0]}x"] if isinstance(value, list) else f"{value}x" if isinstance(value, str) else value / 2 or 0.5


def test_every_setting_of_the_published_run_counts_or_is_told():
    made = convert(PUBLISHED, HOME)
    told = {setting.partition("=")[0] for setting in made.left}
    found = settings_of(PUBLISHED, HOME)
    assert len(found) == 42 and len(told) == 14
    for key in found.keys() - told:
        try:
            assert convert(f"{PUBLISHED}{key}={other_than(found[key])}", HOME).tree != made.tree, key
        except ValueError:  # which a setting without an effect does not cause
            continue


def test_a_recipe_of_verl():
    """Whose mini-batches of the policy count prompts, those of the PRM rows; with what bash makes of such words."""
    made = convert(RECIPE, HOME)
    config = made.config
    assert config.data.train == ["/home/me/data/gsm8k/train.parquet", "/home/me/more.parquet"]
    assert (config.data.max_prompt, config.rollout.max_response) == (2048, 20479)
    assert config.engine.micro_tokens == 2048 + 20479
    assert (config.policy.mini_batch, config.prm.mini_batch) == (256, 32)
    assert config.rollout.vllm == {"enforce_eager": True, "tensor_parallel_size": 2}
    assert (config.prime.process_weight, config.prime.outcome_weight) == (0.5, 1.0)
    assert (config.policy.kl_coef, config.prime.beta, config.model.prm) == (0.002, 0.1, "other/prm")
    assert config.reward.function == "/home/me/mine.py:compute_score" and config.rollout.keep == (0.2, 0.8)
    assert made.left["reward_model.model.update=reverse"] == "prime.update is one of after, before, none"
    assert made.left["trainer.seed_of=$(date)"].startswith("its value is made elsewhere")
    assert made.left["trainer.new_key=two words"] == "no counterpart"
    assert made.assumed["policy.entropy_coef=0.001"].startswith("that of verl's recipe/prime")
    assert convert(RECIPE, HOME | {"LONGEST": "77"}).config.rollout.max_response == 77


def test_a_yaml_without_a_prm():
    made = convert(GRPO, HOME)
    config = made.config
    assert config.prime.process_weight == 0 and config.prime.estimator == "grpo"
    assert not config.prime.whiten  # verl's grpo and rloo leave advantages as they are
    assert config.rollout.keep == (0.01, 0.99) and (config.rollout.samples, config.policy.mini_batch) == (5, 20)
    assert config.policy.clip == (0.3, 0.4) and config.policy.mean == "row" and config.policy.schedule == "cosine"
    assert (config.steps, config.seed, config.log.checkpoint_every, config.log.tensorboard) == (30, 7, 0, True)
    assert made.left["actor_rollout_ref.rollout.name=sglang"] == "there is no engine sglang; vllm is in its place"
    assert "reward_model.model.path=some/model" in made.left
    assert yaml.safe_load(made.yaml()) == made.tree


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("ARGS=(a.b=1)\nARGS+=(a.c=2)\nrun ${ARGS[*]}", {"a.b": 1, "a.c": 2}),
        ("MORE='a.b=1'\nMORE+=' a.c=2'\nrun $MORE a.d=x", {"a.b": 1, "a.c": 2, "a.d": "x"}),
        ('MORE="u v"\nrun a.b="$MORE"', {"a.b": "u v"}),
        ("X=7\nrun ${X:+a.b=1} ${Y:+a.c=2} a.d=${X:+is} a.e=${Y:+not}", {"a.b": 1, "a.d": "is", "a.e": None}),
        ("X=\nrun a.b=${X:-1} a.c=${X-1} a.d=${Y-2} a.e=${Z:=3}", {"a.b": 1, "a.c": None, "a.d": 2, "a.e": 3}),
        (r"D=/data" "\n" r"run a.b=[\"$D/x\",\"$D/z\"]", {"a.b": ["/data/x", "/data/z"]}),
        (r'run a.b="\$X" a.c=x\ y', {"a.b": "$X", "a.c": "x y"}),
        ("run a.b=1 a.c=2|tee log", {"a.b": 1, "a.c": 2}),
        ("run a.b=1& wait", {"a.b": 1}),
        ("run a.b=1 a.c=2 ~a.b +a.d=3 ~a.c=2 ++a.d=4", {"a.b": None, "a.c": None, "a.d": 4}),
        ("- a.b=['x y', \"z\"]\n- +a.c=it's 1\n- ~a.d\n", {"a.b": ["x y", "z"], "a.c": "it's 1", "a.d": None}),
        ("run a.b=$1 a.c=x/$UNKNOWN a.d=$((N * 2))", {"a.b": "$1", "a.c": "x/$UNKNOWN", "a.d": "$(($N * 2))"}),
    ],
)
def test_words_are_what_bash_and_hydra_make_of_them(script, found):
    assert settings_of(script, {}) == found


def test_a_variable_that_nobody_sets_is_told():
    """bash would take it for empty, which is no setting at all; the default in its place is not what was meant."""
    script = f"{RECIPE} actor_rollout_ref.actor.optim.lr=$LR"
    made = convert(script, HOME)
    assert made.left["actor_rollout_ref.actor.optim.lr=$LR"].startswith("its value is made elsewhere")
    assert "policy.lr=1.0e-06" in made.assumed
    assert convert(script, HOME | {"LR": "3e-7"}).config.policy.lr == 3e-7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo nothing", "no setting of the form section.key=value"),
        ("a: [", "is not valid YAML"),
        ("data.train_batch_size=8", "actor_rollout_ref.model.path is missing"),
        ("data.train_batch_size=many actor_rollout_ref.model.path=m", "data.train_batch_size=many is no number"),
        ("trainer.save_freq=[8] actor_rollout_ref.model.path=m", "trainer.save_freq=[8] is no number"),
        (
            "actor_rollout_ref.model.path=m data.max_prompt_length=0",
            "what was carried does not fit together",
        ),
    ],
)
def test_what_cannot_be_converted_is_told(text, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["convert", "-"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("prime-fast: -: ") and message in said and said.count("\n") == 1


def test_rows_and_reward_functions_of_verl_work_as_they_are(tmp_path):
    """The parquet that its gsm8k example writes, and a custom_reward_function as its documentation has them."""
    rows = Path(__file__).parents[1] / "data" / "rows" / "verl_gsm8k.jsonl"
    table = pa.Table.from_pylist([json.loads(line) for line in rows.read_text().splitlines()])
    pq.write_table(table, tmp_path / "train.parquet")
    (tmp_path / "mine.py").write_text(
        """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    assert data_source == "openai/gsm8k" and extra_info["split"] == "train" and "<<8*60=480>>" in extra_info["answer"]
    return 1.0 if solution_str.endswith(ground_truth) else 0.1
"""
    )
    shape, read_rows = read(str(tmp_path / "train.parquet"))
    (row,) = (row for _, row in read_rows)
    assert shape == "verl"
    assert score(["so 1680", "7"], [row] * 2, reward=f"{tmp_path}/mine.py:compute_score") == [1.0, 0.1]
    assert score(["#### 1,680", "#### 168"], [row] * 2) == [1.0, 0.0]
