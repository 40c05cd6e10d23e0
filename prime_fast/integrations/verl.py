"""A verl or PRIME run's settings -> our configuration, and a reason for each that has no place in it: docs/verl.md.

Three programs have the same keys and mean different things by some: the published PRIME code (PRIME-RL/PRIME 18ad596f),
verl's recipe/prime (verl-recipe 48ea0a79), and verl itself, which has no implicit PRM.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from prime_fast import yaml_text
from prime_fast.config import Config, make_config
from prime_fast.integrations.launch_script import settings_of

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
PUBLISHED, RECIPE, VERL = "the published PRIME code", "verl's recipe/prime", "verl"
# what a key means where a script leaves it out; of those keys whose defaults are not ours
DEFAULTS: dict[str, dict[str, Any]] = {
    VERL: {
        "data.train_batch_size": 1024,
        "data.max_prompt_length": 512,
        "data.max_response_length": 512,
        "algorithm.adv_estimator": "gae",
        f"{ROLLOUT}.name": "vllm",
        f"{ROLLOUT}.n": 1,
        f"{ACTOR}.optim.lr": 1e-6,
        f"{ACTOR}.ppo_mini_batch_size": 256,
        "trainer.save_freq": -1,
        "trainer.test_freq": -1,
    },
}
DEFAULTS[RECIPE] = DEFAULTS[VERL] | {
    "data.filter_accuracy": True,
    "data.accuracy_lower_bound": 0.2,
    "data.accuracy_upper_bound": 0.8,
    f"{ROLLOUT}.n": 4,
    f"{ACTOR}.entropy_coeff": 0.001,
    "algorithm.adv_estimator": "rloo",
    "reward_model.model.update": "before",
    "reward_model.model.optim.grad_clip": 1.0,
}
DEFAULTS[PUBLISHED] = {key: value for key, value in DEFAULTS[VERL].items() if key != f"{ROLLOUT}.n"} | {
    "data.n_samples": 1,
    f"{ACTOR}.entropy_coeff": 0.001,
    "reward_model.rm_coef": 0,
    "reward_model.mini_batch_size": 256,
    "reward_model.prime_model.update": "none",
    "reward_model.prime_model.optim.grad_clip": 1.0,
    "trainer.test_freq": 2,
}
VLLM = {name: name for name in ("max_num_batched_tokens", "max_num_seqs", "enforce_eager")}
VLLM["tensor_model_parallel_size"] = "tensor_parallel_size"
METRICS = "metrics go to run_dir/metrics.jsonl"
# the first pattern that fits the beginning of a key says why it has no place
REASONS = {
    r"critic\.": "there is no critic",
    r".*(micro_batch_size|use_dynamic_bsz|max_token_len)": "rows are packed into micro-batches of engine.micro_tokens",
    r".*use_remove_padding|.*balance_batch": "rows are always packed and balanced over the ranks",
    r".*_offload": "states wait on the host while vLLM decodes; should the plan not fit, engine.offload=cpu",
    r".*enable_gradient_checkpointing": "model.recompute=auto recomputes as few layers as the memory asks for",
    r".*(gpu_memory_utilization|free_cache_engine)": "the memory plan gives the engine what training leaves",
    r".*(fsdp_config|megatron|strategy|hybrid_engine)": "every model is under ZeRO-3",
    r".*(input_tokenizer|tokenizer_path)|data\.tokenizer": "policy, PRM and reference share the policy's tokenizer",
    r"data\.val_batch_size": "data.eval_rows says how many held-out rows are drawn",
    r"data\.oversample_factor": "prompts are started until rollout.prompts groups are kept; none is thrown away",
    r"data\.(filter_overlong|truncation)": "prompts longer than data.max_prompt are dropped and counted",
    r"data\.(\w+_key|return_)": "the shape of the rows is found out by itself",
    r"data\.shuffle": "rows are drawn in an order that seed gives",
    r".*(use_kl_in_reward|kl_ctrl|kl_penalty)": "no KL term enters the rewards; policy.kl_coef puts one into the loss",
    r"actor_rollout_ref\.ref\.": "the reference is frozen and has no settings of its own",
    r"reward_model\.(rm_type|enable)|verifier\.type": "the PRM is on where prime.process_weight is above 0",
    r"reward_model\.rm_coef|verifier\.reward_coef": "it never reaches the published code's advantages",
    r".*loss_type": "prm.loss is response (the published ce), centered or prefix",
    r"(reward_model\.)?reward_manager": "reward.function=auto grades each row by its ability",
    r"reward_model\.": "rewards are functions and the implicit PRM, no other model",
    r"trainer\.total_epochs": "a run's length is told in steps; set steps to rows * epochs / rollout.prompts",
    r"trainer\.(n_gpus_per_node|nnodes)": "torchrun says how many ranks there are",
    r"trainer\.val_before_train": "held-out rows are always evaluated before the first step",
    r"trainer\.(logger|wandb|project_name|experiment_name)": METRICS,
    r"trainer\.resume": "prime-fast train --resume goes on",
    r"defaults|hydra": "other files are not read; convert the whole YAML that Hydra writes into .hydra/",
    r"ray_|.*(runtime_env|hdfs)": "there is no Ray and no HDFS",
}
NUMBER = re.compile(r".*(_length|_size|_size_per_gpu|\.n|n_samples|_freq|_coef|nnodes|n_gpus_per_node)")
OF_RECIPE = re.compile(r"reward_model\.(model\.(update|beta_train|ref_)|prime_)|data\.oversample_factor")


class Conversion(NamedTuple):
    config: Config
    tree: dict[str, Any]  # what the run says, nested
    left: dict[str, str]  # key=value of the run: why it has no place
    assumed: dict[str, str]  # our key=value: whose default that is, which the run relies on

    def notes(self) -> list[str]:
        lines = [f"not carried: {setting}: {why}" for setting, why in self.left.items()]
        return lines + [f"by default: {setting}: {whose}" for setting, whose in self.assumed.items()]

    def yaml(self) -> str:
        return yaml_text.write(self.tree) + "".join(f"\n# {line}" for line in self.notes()) + "\n"


def convert(text: str, environment: Mapping[str, str] = os.environ) -> Conversion:
    """text: of a launch script, of Hydra overrides or of a Hydra YAML.

    Raises ValueError where no model is named, or where what was carried is no configuration.
    """
    return _Run(settings_of(text, environment), environment).conversion()


class _Run:
    """The settings of a run that are not yet dealt with, and what has become of the others."""

    def __init__(self, found: dict[str, Any], environment: Mapping[str, str]) -> None:
        self.found, self.home = found, environment.get("HOME", "~")
        if any(key.startswith("reward_model.prime_model.") for key in found):
            self.program, self.prm = PUBLISHED, "reward_model.prime_model"
        elif any(map(OF_RECIPE.match, found)):
            self.program, self.prm = RECIPE, "reward_model.model"
        else:
            self.program, self.prm = VERL, None
        self.ours: dict[str, Any] = {}
        self.left: dict[str, str] = {}
        self.assumed: dict[str, str] = {}
        for key in [key for key, value in found.items() if re.search(r"\$[({\w]|`", str(value))]:
            self.left[f"{key}={found.pop(key)}"] = "its value is made elsewhere; convert again with it in the place"
        for key, value in found.items():
            if NUMBER.fullmatch(key) and not isinstance(value, int | float | None):
                raise ValueError(f"{key}={value} is no number; give one")
        self.settings = DEFAULTS[self.program] | {key: value for key, value in found.items() if value is not None}

    def conversion(self) -> Conversion:
        model = self.take("actor_rollout_ref.model.path")
        if not model:
            raise ValueError("actor_rollout_ref.model.path is missing, so there is no policy to train; add it")
        self.ours["run_dir"] = self._path(self.take("trainer.default_local_dir") or self._named())
        self.ours["model.policy"] = self._path(model)
        self._data()
        self._rollout()
        self._prime(self._path(model))
        self._policy()
        self._loop()
        for key, value in self.found.items():
            if key in self.settings or value is None:
                why = next((why for pattern, why in REASONS.items() if re.match(pattern, key)), "no counterpart")
                self.left[f"{key}={_text(value)}"] = why
        tree: dict[str, Any] = {}
        for key, value in self.ours.items():
            section, _, leaf = key.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[leaf] = value
        return Conversion(make_config(tree, "what was carried does not fit together: "), tree, self.left, self.assumed)

    # ---- the sections

    def _data(self) -> None:
        for theirs, ours in (("train", "train"), ("val", "eval")):
            self.carry(f"data.{theirs}_files", f"data.{ours}", self._paths)
        self.carry("data.max_prompt_length", "data.max_prompt")
        self.carry("data.seed", "seed")

    def _rollout(self) -> None:
        self.carry("data.train_batch_size", "rollout.prompts")
        samples = "data.n_samples" if self.program == PUBLISHED else f"{ROLLOUT}.n"
        self.carry(samples, "rollout.samples")
        self.carry("data.max_response_length", "rollout.max_response")
        self.carry(f"{ROLLOUT}.temperature", "rollout.temperature")
        self.carry(f"{ROLLOUT}.top_p", "rollout.top_p")
        if self.settings.get(f"{ROLLOUT}.top_k") in (-1, 0):
            self.take(f"{ROLLOUT}.top_k")  # off, as here
        if (name := self.settings.get(f"{ROLLOUT}.name")) in ("vllm", "hf"):
            self.carry(f"{ROLLOUT}.name", "rollout.engine")
        else:
            self.ours["rollout.engine"] = "vllm"
            self.leave(f"{ROLLOUT}.name", f"there is no engine {name}; vllm is in its place")
        for theirs, argument in VLLM.items():
            value = self.take(f"{ROLLOUT}.{theirs}")
            if value is not None and (argument, value) != ("tensor_parallel_size", 1):
                self.ours.setdefault("rollout.vllm", {})[argument] = value
        low, high = self.take("data.accuracy_lower_bound", 0), self.take("data.accuracy_upper_bound", 1)
        if self.take("algorithm.filter_groups.enable", False):
            low, high = 0.01, 0.99  # not all alike
        elif not self.take("data.filter_accuracy", False):
            low, high = 0, 1
        self.ours["rollout.keep"] = [low, high]
        if self.program == RECIPE:  # the others' is off
            self.assume("rollout.keep", "data.filter_accuracy")
        self.carry("data.filter_truncated", "rollout.filter_truncated")

    def _prime(self, policy: str) -> None:
        self.carry("algorithm.adv_estimator", "prime.estimator", among=("rloo", "grpo", "reinforce"))
        gamma = [self.take(f"algorithm.adv_params.{name}_gamma") for name in ("reward_model", "verifier")]
        if any(value is not None for value in gamma):
            self.ours["prime.gamma"] = [1.0 if value is None else value for value in gamma]
        if self.program == VERL:
            self.ours |= {"prime.process_weight": 0.0, "prime.whiten": False}  # its grpo and rloo do not
            return
        process, outcome = (self.take(f"algorithm.reward_{kind}_coef", 5) for kind in ("dpo", "gt"))
        if self.program == PUBLISHED and not self.settings["reward_model.rm_coef"]:
            process = self.take("reward_model.rm_coef")
        if process != outcome:  # of which the whitening leaves the ratio alone
            self.ours |= {"prime.process_weight": process / (outcome or 1), "prime.outcome_weight": float(outcome > 0)}
            if self.program == PUBLISHED:
                self.assume("prime.process_weight", "reward_model.rm_coef")
        for name, ours in (("path", "model.prm"), ("ref_path", "model.reference")):
            if (path := self.take(f"{self.prm}.{name}")) and self._path(path) != policy:
                self.ours[ours] = self._path(path)
        self.carry(f"{self.prm}.update", "prime.update", among=("after", "before", "none"))
        self.carry(f"{self.prm}.ref_type", "prime.reference", lambda kind: "sft" if kind == "freeze" else "policy")
        self.carry(f"{self.prm}.beta_train", "prime.beta")
        self.carry("reward_model.prime_granularity", "prime.granularity")
        self.carry("reward_model.prime_norm", "prime.normalize", lambda norm: "batch" if norm == "batch_norm" else norm)
        if self.settings.get(f"{self.prm}.loss_type") == "ce":
            self.take(f"{self.prm}.loss_type")  # prm.loss=response
        self._optimizer(f"{self.prm}.optim", "prm")
        self.carry(f"{self.prm}.optim.grad_clip", "prm.grad_clip")
        mini = self.take("reward_model.mini_batch_size") or self.settings[f"{ACTOR}.ppo_mini_batch_size"]
        self.ours["prm.mini_batch"] = mini  # rows, in both programs

    def _policy(self) -> None:
        self._optimizer(f"{ACTOR}.optim", "policy")
        self.carry(f"{ACTOR}.grad_clip", "policy.grad_clip")
        # the published code counts rows here, verl prompts
        factor = 1 if self.program == PUBLISHED else self.ours["rollout.samples"]
        self.carry(f"{ACTOR}.ppo_mini_batch_size", "policy.mini_batch", lambda prompts: prompts * factor)
        self.carry(f"{ACTOR}.ppo_epochs", "policy.epochs")
        clip = self.take(f"{ACTOR}.clip_ratio", 0.2)
        low, high = (self.take(f"{ACTOR}.clip_ratio_{side}", clip) for side in ("low", "high"))
        self.ours["policy.clip"] = [low, high]
        self.carry(f"{ACTOR}.entropy_coeff", "policy.entropy_coef")
        coefficient = self.take(f"{ACTOR}.kl_loss_coef", 0.001)
        if self.take(f"{ACTOR}.use_kl_loss", False):
            self.ours["policy.kl_coef"] = coefficient
            if self.settings.get(f"{ACTOR}.kl_loss_type", "low_var_kl") in ("low_var_kl", "k3"):
                self.take(f"{ACTOR}.kl_loss_type")
            else:
                self.leave(f"{ACTOR}.kl_loss_type", "the KL term is k3, which verl calls low_var_kl")
        self._mean()

    def _mean(self) -> None:
        mode = self.settings.get(f"{ACTOR}.loss_agg_mode")
        if mode in ("token-mean", "seq-mean-token-mean"):
            self.carry(f"{ACTOR}.loss_agg_mode", "policy.mean", lambda mode: "token" if mode == "token-mean" else "row")
        elif mode is not None:
            self.leave(f"{ACTOR}.loss_agg_mode", "policy.mean is token or row")
        ranks = self.settings.get("trainer.n_gpus_per_node", 8) * self.settings.get("trainer.nnodes", 1)
        rows = self.settings.get(f"{ACTOR}.ppo_micro_batch_size_per_gpu")
        rows = rows or (self.settings.get(f"{ACTOR}.ppo_micro_batch_size") or 0) / ranks
        if self.program != VERL and mode is None and rows == 1:  # their token mean is over a micro-batch
            self.ours["policy.mean"] = "row"

    def _loop(self) -> None:
        self.carry("trainer.total_training_steps", "steps")
        for theirs, ours in (("save", "checkpoint"), ("test", "eval")):
            self.carry(f"trainer.{theirs}_freq", f"log.{ours}_every", lambda steps: max(0, steps))
        if "tensorboard" in str(self.settings.get("trainer.logger")):
            self.ours["log.tensorboard"] = True
        function = self.take("custom_reward_function.path")
        if function:
            name = self.take("custom_reward_function.name") or "compute_score"
            self.ours["reward.function"] = f"{self._path(function)}:{name}"
        self.carry(f"{ACTOR}.ulysses_sequence_parallel_size", "engine.sequence_parallel")
        longest = self.ours["data.max_prompt"] + self.ours["rollout.max_response"]
        held = Config.model_fields["engine"].default.micro_tokens * self.ours.get("engine.sequence_parallel", 1)
        if longest > held:
            self.ours["engine.micro_tokens"] = -(-longest // self.ours.get("engine.sequence_parallel", 1))

    def _optimizer(self, theirs: str, ours: str) -> None:
        self.carry(f"{theirs}.lr", f"{ours}.lr")
        self.carry(f"{theirs}.weight_decay", f"{ours}.weight_decay")
        self.carry(f"{theirs}.lr_warmup_steps_ratio", f"{ours}.warmup")
        for name in ("warmup_style", "lr_scheduler_type"):
            self.carry(f"{theirs}.{name}", f"{ours}.schedule", among=("constant", "cosine"))

    # ---- one setting

    def carry(
        self, theirs: str, ours: str, change: Callable[[Any], Any] = lambda value: value, among: tuple | None = None
    ) -> None:
        value = self.settings.get(theirs)
        if value is None:
            self.settings.pop(theirs, None)
        elif among is not None and value not in among:
            self.leave(theirs, f"{ours} is one of {', '.join(among)}")
        else:
            self.ours[ours] = change(self.take(theirs))
            self.assume(ours, theirs)

    def assume(self, ours: str, theirs: str) -> None:
        if theirs not in self.found:
            self.assumed[f"{ours}={_text(self.ours[ours])}"] = f"that of {self.program}, {theirs} is not set"

    def take(self, key: str, default: Any = None) -> Any:
        return self.settings.pop(key, default)

    def leave(self, key: str, why: str) -> None:
        self.left[f"{key}={_text(self.take(key))}"] = why

    def _named(self) -> str:
        return f"runs/{self.settings.get('trainer.experiment_name', 'verl')}"

    def _paths(self, value: Any) -> list[str]:
        return [self._path(one) for one in (value if isinstance(value, list) else [value])]

    def _path(self, text: Any) -> str:
        return re.sub(r"^~(?=/|$)", self.home, str(text))


def _text(value: Any) -> str:
    """On one line."""
    return " ".join(yaml_text.write(value).split()).removesuffix(" ...") if not isinstance(value, list) else str(value)
