import re
from pathlib import Path

import pytest
import yaml

from prime_fast.config import Config, known_keys, load_config, save_config

SHIPPED = sorted(Path(__file__).parents[1].glob("configs/*.yaml"))


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("run_dir: out\nmodel: {policy: some/model}\n")
    return path


def test_the_tree_stays_small():
    assert len(known_keys()) < 120


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    assert isinstance(load_config(path), Config)


def test_defaults_are_the_published_run(config_file):
    config = load_config(config_file)
    assert (config.rollout.prompts, config.rollout.samples, config.rollout.temperature) == (256, 4, 1.0)
    assert (config.policy.lr, config.policy.weight_decay, config.policy.grad_clip, config.policy.clip) == (
        5e-7, 0.01, 1.0, (0.2, 0.2),
    )  # fmt: skip
    assert (config.prm.lr, config.prm.weight_decay, config.prm.grad_clip) == (1e-6, 0.0, 10.0)
    assert (config.prime.beta, config.prime.update, config.prime.form) == (0.05, "after", "run")
    assert config.rollout.keep == (0.2, 0.8)


def test_overrides_are_typed_and_saved(config_file, tmp_path):
    config = load_config(
        config_file, ["policy.lr=1e-4", "data.train=[a.jsonl, b.jsonl]", "data.eval=c.jsonl", "seed=3"]
    )
    assert config.policy.lr == 1e-4 and config.data.train == ["a.jsonl", "b.jsonl"] and config.data.eval == ["c.jsonl"]
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


MISTAKES = {
    "policy.lrr=3": "unknown key policy.lrr; did you mean policy.lr?",
    "prime.bta=1": "did you mean prime.beta?",
    "samples=8": "unknown key samples; did you mean rollout.samples?",
    "rollout.samples=1": "set rollout.samples to 2 or more, or prime.estimator=reinforce and rollout.keep=[0, 1]",
    "rollout.top_p=0": "rollout.top_p=0: input should be greater than 0",
    "rollout.max_age=-1": "rollout.max_age=-1: input should be greater than or equal to 0",
    "model.recompute=most": "model.recompute='most': give auto, none, attention-saved, all, or how many layers",
    "model.recompute=true": "model.recompute=True: give auto, none,",
    "model.recompute=-1": "model.recompute=-1: give auto, none,",
    "model.gradient_checkpointing=true": "key model.gradient_checkpointing is gone; model.recompute has taken its",
    "policy.lr=-1": "policy.lr=-1: input should be greater than or equal to 0",
    "steps=many": "steps='many'",
    "prime.update=sometimes": "'after', 'before' or 'none'",
    "prime.update=none": "set model.prm to a trained PRM",
    "rollout.keep=[0.8, 0.2]": "must satisfy 0 <= low <= high <= 1",
    "engine.micro_tokens=100": "raise engine.micro_tokens",
    "engine.sequence_parallel=0": "engine.sequence_parallel=0: input should be greater than 0",
    "policy.lr": "not of the form key=value",
    "run_dir.x=1": "run_dir is a value, not a section",
    "seed=-1": "seed=-1: input should be greater than or equal to 0",
    f"seed={1 << 70}": "input should be less than 4294967296",
    "policy.lr=nan": "policy.lr='nan': input should be greater than or equal to 0",
    "prime.beta=.inf": "prime.beta=inf: input should be a finite number",
    "rollout.temperature=1e-320": "input should be greater than or equal to 0.001",
    "reward.timeout=1e308": "input should be less than or equal to 86400",
    "log.eval_every=3000000000": "input should be less than or equal to 2147483647",
    "steps=true": "a number is wanted, not true or false",
    "data.train=[1]": "data.train.0=1: input should be a valid string",
    "rollout.vllm={1: 2}": "rollout.vllm.1.[key]=1: input should be a valid string",
    "rollout.vllm={gpus: x}": "gpus='x': input should be a valid list",
    "sft.response='{solution.x}'": "only {solution}, {reasoning}, {ground_truth} can be filled in",
    "model.policy=": "model.policy=None: input should be a valid string",
    "a=[": "its value is not valid YAML",
    "policy={lr: 1, lr: 2}": "the key lr comes twice",
    "prm.lora.rnk=8": "unknown key prm.lora.rnk; did you mean prm.lora.rank?",
    "prm.lora.rank=0": "prm.lora.rank=0: input should be greater than 0",
    "policy.lora.targets=q_proj": "policy.lora.targets='q_proj': give all-linear, or a list of linear layers",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_sentence_with_the_fix(override, config_file):
    with pytest.raises(ValueError) as caught:
        load_config(config_file, [override])
    assert MISTAKES[override] in str(caught.value)
    assert "\n" not in str(caught.value)


ONE = ["rollout.samples=1", "prime.estimator=reinforce"]


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        (["prime.process_weight=0", "prime.outcome_weight=0"], "raise one of them"),
        (["prime.reference=policy", "rollout.old_logprobs=engine"], "set rollout.old_logprobs=recompute"),
        (["rollout.top_p=0.9", "rollout.old_logprobs=engine"], "set rollout.old_logprobs=update, or rollout.top_p=1"),
        (["prime.reference=policy", "policy.kl_coef=0.1"], "set prime.reference=sft"),
        (
            ["prm.rows=all", "prime.process_weight=0"],
            "no effect with prime.process_weight=0, .*set prm.rows=kept",
        ),
        (
            ["prm.passes=2", "prime.update=none", "model.prm=x"],
            "no effect with prime.update=none, .*set prm.passes=1,",
        ),
        (["prm.warmup_steps=3", "prime.process_weight=0"], "set prm.warmup_steps=0, or train one"),
        (["prm.warmup_steps=100"], "the first of steps=100 and leave none that trains the policy; raise steps"),
        (["prm.lora={}", "prime.process_weight=0"], "prm.lora has no effect with prime.process_weight=0, .*leave it"),
        (["prm.lora={}", "model.prm=x"], "of the reference, some/model, and model.prm=x .* leave model.prm out"),
        (["policy.lora={}", "engine.offload=disk"], "set engine.offload=cpu or none, or leave lora out"),
        (["prm.loss=prefix", *ONE, "rollout.keep=[0, 1]"], "set rollout.samples to 2 or more, or prm.loss=response"),
    ],
)
def test_contradictions_are_refused(overrides, fix, config_file):
    with pytest.raises(ValueError, match=fix):
        load_config(config_file, overrides)


def test_who_is_the_reference(config_file):
    """The model that an adapter leaves as it was: no weights are held twice."""
    for overrides, within, prm in (
        ([], None, "some/model"),
        (["prm.lora={}"], "prm", "some/model"),
        (["prm.lora={}", "model.reference=sft", "policy.lora={}"], "prm", "sft"),
        (["policy.lora={}"], "policy", "some/model"),
        (["policy.lora={}", "model.reference=sft"], None, "some/model"),
        (["policy.lora={}", "prime.process_weight=0", "policy.kl_coef=0.1"], "policy", None),
        (["prm.lora={}", "prime.reference=policy", "model.prm=x"], None, "x"),
    ):
        config = load_config(config_file, overrides)
        assert (config.reference_within, config.paths.get("prm")) == (within, prm), overrides


def test_an_alias_is_a_copy(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("run_dir: out\nmodel: {policy: some/model}\npolicy: &same {lr: 1e-4}\nprm: *same\nlog:\n")
    config = load_config(path, ["prm.lr=2e-4"])
    assert (config.policy.lr, config.prm.lr) == (1e-4, 2e-4)


@pytest.mark.parametrize(
    ("overrides", "keep"),
    [
        (["rollout.keep=[0.6, 0.7]"], "[0.6, 0.75]"),
        (["rollout.keep=[0.6, 0.9]", "rollout.samples=2"], "[0.5, 0.9]"),
        (["rollout.keep=[0.4, 0.5]", "rollout.samples=3"], "[0.33, 0.5]"),
        (["rollout.keep=[0, 0.1]", "prime.process_weight=0"], "[0.0, 0.25]"),
        (["rollout.keep=[0.9, 1]", "prime.process_weight=0", "prime.estimator=grpo"], "[0.75, 1.0]"),
        (ONE, "[0, 1]"),
        ([*ONE, "reward.function=code"], "[0, 1]"),
        ([*ONE, "rollout.keep=[0.5, 1]", "prime.process_weight=0"], "[0, 1]"),
        ([*ONE, "rollout.keep=[0, 0]", "prime.process_weight=0", "prime.whiten=false"], "[0, 1]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_keep_that_no_group_can_pass_is_refused(overrides, keep, config_file):
    overrides = ["reward.function=math", *overrides]
    with pytest.raises(ValueError, match=rf"so nothing would be learnt; set rollout.keep={re.escape(keep)}$") as caught:
        load_config(config_file, overrides)
    assert "\n" not in str(caught.value)
    load_config(config_file, [*overrides, f"rollout.keep={keep}"])  # the remedy is one


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.keep=[0.6, 0.7]", "reward.function=auto"],  # code gives fractions
        ["rollout.keep=[0.6, 0.7]", "reward.function=a.py:f"],
        ["rollout.keep=[0.3333333, 0.3333333]", "rollout.samples=3", "reward.function=math"],
        ["rollout.keep=[0, 0.1]", "reward.function=math"],  # the process reward teaches
        [*ONE, "rollout.keep=[0.5, 1]"],
        [*ONE, "rollout.keep=[1, 1]", "prime.process_weight=0", "prime.whiten=false", "reward.function=math"],
    ],
    ids=" ".join,
)
def test_a_keep_that_can_pass_is_not(overrides, config_file):
    load_config(config_file, overrides)


def test_files_that_are_not_configs(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("run_dir: é".encode("latin-1"))
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "empty.yaml").write_text(yaml.safe_dump({"model": {"policy": "x"}}))
    with pytest.raises(ValueError, match="key run_dir is required and missing"):
        load_config(tmp_path / "empty.yaml")
