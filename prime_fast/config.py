"""The configuration tree: YAML file + key=value overrides -> one validated, typed object."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prime_fast import durable, yaml_text
from prime_fast.values import (
    DAY,
    Answer,
    Arguments,
    Discount,
    Limits,
    Name,
    NotNegative,
    Number,
    Paths,
    Positive,
    Rate,
    Recompute,
    Separators,
    Share,
    Tokens,
    VllmArguments,
    Watched,
    check_name,
    describe,
    key_of,
    shortened,
)

WHOLE_REWARDS = ("math", "math-strict", "code-strict", "auto-strict")  # their outcomes are 0 or 1, nothing between
REPLACED = {
    "model.gradient_checkpointing": "model.recompute has taken its place: all is true, none is false, and without it "
    "as few layers are recomputed as fit"
}
ROUNDING = 1e-6  # of means, as in prime.keep_groups


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def empty(cls, value: Any) -> Any:
        """`policy:` with nothing below it is a section without keys."""
        return {} if value is None else value


class ModelConfig(Section):
    policy: Name  # HF directory or hub id; policy, PRM and reference all start here unless told otherwise
    prm: Name | None = None
    reference: Name | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward; auto = bfloat16 on a GPU, float32 on CPU
    # norms, RoPE, SwiGLU. hf: transformers' | auto: on a GPU torch's RMSNorm | fused: Liger's RoPE and SwiGLU as well
    layers: Literal["auto", "hf", "fused"] = "auto"
    # layers whose activations are made again in the backward: none, all, a number, all but the outputs of attention
    # (attention-saved), or as few as the memory plan leaves room for (auto; none without a GPU). The gradients are the
    # same to the bit
    recompute: Recompute = "auto"


class DataConfig(Section):
    train: Paths = []
    eval: Paths = []
    eval_rows: Positive = 256
    max_prompt: Positive = 1024  # tokens; longer prompts are dropped and counted
    drop: list[Literal["broken", "duplicates"]] = []  # rows to leave out and count; a broken row is else an error
    # chat: the tokenizer's chat template | raw: prompts as they stand | auto: raw for texts in `prompt` and for
    # tokenizers without a chat template, else chat
    template: Literal["auto", "raw", "chat"] = "auto"
    template_args: Arguments = {}  # of the chat template, e.g. {enable_thinking: false}


class RolloutConfig(Section):
    engine: Literal["hf", "vllm"] = "hf"
    # arguments of vllm.LLM, and ours: gpus (for engines alone), sleep_level (2; 1 keeps the weights), bucket_mib (sync)
    vllm: VllmArguments = {}
    prompts: Positive = 256  # groups trained on per step
    samples: Positive = 4  # K, responses per prompt
    max_response: Positive = 3072  # tokens, EOS included
    temperature: Annotated[float, Number, Field(ge=1e-3, allow_inf_nan=False)] = 1.0
    # sample from the most probable tokens that make up this share
    top_p: Annotated[float, Number, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    stop: Tokens = []  # token strings or ids that end a response beside EOS, and are a part of it; each one token
    batch: Positive = 256  # sequences decoded together by one engine
    max_rounds: Positive = 8  # at most this many times `prompts` prompts are started to fill a step
    keep: tuple[Share, Share] = (0.2, 0.8)  # groups whose mean outcome lies in this closed interval train
    patience: NotNegative = 3  # steps in a row without one, after which the run ends; 0 = never
    filter_truncated: bool = False  # groups with a truncated response do not
    # weight updates that a group left over may have seen. 1: what one step leaves opens the next one; more is left only
    # after the pass rate has jumped
    max_age: NotNegative = 1
    # start the next step's prompts behind this step's: what is unfinished sleeps through the update, then goes on
    carry: bool = False
    # the same, and the engine goes on while the trainer works, which takes rollout.vllm.gpus, or a CPU
    ahead: Annotated[int, Number, Field(ge=0, le=1)] = 0
    # from a pass of their own | the update's own forward where that is the old policy | the engine
    old_logprobs: Literal["recompute", "update", "engine"] = "update"
    importance_cap: Rate = 2.0  # weight of a token: min(trainer / engine probability, cap); 0 = 1; unused with "engine"


class RewardConfig(Section):
    function: Name = "auto"  # math, code, auto (by the row's ability), path/to/file.py:name or package.module:name
    sandbox: Literal["namespaces", "rlimits-only"] = "namespaces"  # of model-written code
    timeout: Annotated[float, Number, Field(gt=0, le=DAY)] = (
        10.0  # seconds a response, from the moment its grading starts
    )
    # share of a step's responses without a verdict (errors, crashes, timeouts; not programs that were stopped in their
    # sandbox, which keep what they reached) above which the run stops
    max_failures: Share = 0.5


class PrimeConfig(Section):
    update: Literal["after", "before", "none"] = "after"
    reference: Literal["sft", "policy"] = "sft"
    beta: Annotated[float, Number, Field(gt=0, allow_inf_nan=False)] = 0.05
    # train the PRM on groups as they come, where engines work beside the trainer (rollout.vllm.gpus, or vLLM on a CPU)
    overlap: bool = True
    # what becomes of the PRM's log-ratios: docs/credit.md tells when which one pays
    credit: Literal["published", "critic", "pav", "lookahead", "odds", "td"] = "published"
    # how far a credit other than published trusts the PRM: as fitted (none), as far as that is sure (evidence), or by
    # the effect on outcomes (size, of odds)
    gate: Literal["none", "evidence", "size"] = "evidence"
    shrink: Rate = 0.0  # pseudo-responses of mean outcome among a prompt's others, of a credit other than published
    segment: Literal["token", "step"] = "token"  # what gets credit as one
    separators: Separators = "\n"  # the last token of a step: its id, or a regular expression that its text holds
    rebase: bool = False  # log-ratios of PRM to sampling policy, not to the reference; the PRM is trained as without
    # (prompt, response) -> [(character of the response, right)], as path/to/file.py:name or package.module:name: which
    # steps are right, for the metric prm_step_auc alone
    step_labels: Name | None = None
    granularity: Literal["token", "whole"] = "token"  # whole: a row's process reward comes with its last token
    estimator: Literal["rloo", "grpo", "reinforce"] = "rloo"
    form: Literal["run", "paper"] = "run"
    normalize: Literal["batch", "none"] = "batch"
    whiten: bool = True
    process_weight: Rate = 1.0
    outcome_weight: Rate = 1.0
    gamma: tuple[Discount, Discount] = (1.0, 1.0)  # per token, of the process reward and of the outcome


class OptimizerConfig(Section):
    lr: Rate
    weight_decay: Rate = 0.0
    grad_clip: Rate = 1.0  # 0 = no clipping
    mini_batch: Positive = 256  # rows per optimizer step, over all ranks
    warmup: Share = 0.0  # share of the run's steps over which lr rises linearly
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up; to 0 at the end of the run


class PolicyConfig(OptimizerConfig):
    lr: Rate = 5e-7
    weight_decay: Rate = 0.01
    epochs: Positive = 1  # passes over a step's rows, each cut into mini-batches anew
    clip: tuple[Rate, Rate] = (0.2, 0.2)  # the ratio is clipped to [1 - low, 1 + high]
    entropy_coef: Rate = 0.0
    kl_coef: Rate = 0.0
    mean: Literal["token", "row"] = "token"  # loss: mean over tokens, or over rows of the mean over a row's tokens


class PrmConfig(OptimizerConfig):
    lr: Rate = 1e-6
    grad_clip: Rate = 10.0
    # cross-entropy of the outcome given the whole response | that on top of the log-odds of the group's mean outcome:
    # log-ratios then tell responses to a prompt apart | the latter at every prefix (arXiv 2604.13197)
    loss: Literal["response", "centered", "prefix"] = "response"
    rows: Literal["kept", "all"] = "kept"  # all: then also on the groups that rollout.keep drops; they give no scores
    passes: Positive = 1  # over a step's rows; scores are of the first, but with prime.update=before
    warmup_steps: NotNegative = 0  # first ones of the run's steps, which train the PRM alone


class SftConfig(OptimizerConfig):
    data: Paths = []
    eval: Paths = []  # held-out solutions for the validation loss; of all files together at most data.eval_rows
    lr: Rate = 1e-5
    weight_decay: Rate = 0.01
    warmup: Share = 0.05
    mini_batch: Positive = 96
    steps: Positive = 100
    response: Answer = "{solution}"  # or {reasoning} (the solution without its last `#### x` line), {ground_truth}


class EngineConfig(Section):
    micro_tokens: Positive = 16384  # token budget of a packed micro-batch on one rank
    sequence_parallel: Positive = 1  # consecutive ranks that hold a micro-batch together: a row may fill all of them
    offload: Literal["none", "cpu", "disk"] = "none"  # where parameters and optimizer states rest; disk: in $TMPDIR
    overlap_comm: bool = False  # reduce gradients beside the backward, on a stream of its own
    park: bool = True  # optimizer states wait in host memory while a vLLM on the same GPU decodes


class WatchConfig(Section):
    """What is told when it goes wrong: docs/watching.md names the watchers."""

    limits: Limits = {}  # {watcher: number} in the place of its default; null turns it off
    stop: list[Watched] = []  # watchers that end the run when they begin


class LogConfig(Section):
    eval_every: NotNegative = 10  # steps; 0 = never
    checkpoint_every: NotNegative = 50  # steps; 0 = only at the end
    keep: Positive = 2  # newest checkpoints; the best of those made at an evaluated step is kept besides
    tensorboard: bool = False
    # seconds from SIGTERM or SIGUSR1 to the end of the run, which saves what it can until then. Slurm, Kubernetes and
    # torchrun give 30 unless told otherwise
    grace: Annotated[float, Number, Field(gt=0, le=DAY)] = 25.0
    # seconds without progress on any rank after which the run ends and tells where each stands; 0 = never. What takes
    # longest without a sign of progress is the writing of a large model's checkpoint
    hang: Annotated[float, Number, Field(ge=0, le=DAY)] = 1800.0


class Config(Section):
    run_dir: Name
    steps: Positive = 100
    seed: Annotated[int, Number, Field(ge=0, lt=1 << 32)] = 0
    model: ModelConfig
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    prime: PrimeConfig = PrimeConfig()
    policy: PolicyConfig = PolicyConfig()
    prm: PrmConfig = PrmConfig()
    sft: SftConfig = SftConfig()
    engine: EngineConfig = EngineConfig()
    watch: WatchConfig = WatchConfig()
    log: LogConfig = LogConfig()

    @property
    def evaluates(self) -> bool:
        return bool(self.data.eval) and self.log.eval_every > 0

    @property
    def parks(self) -> bool:
        """Whether optimizer states leave a GPU for the engine that wakes there."""
        rollout = self.rollout
        shares = rollout.engine == "vllm" and "gpus" not in rollout.vllm and rollout.vllm.get("sleep_level") != 0
        return self.engine.park and self.engine.offload == "none" and shares

    @property
    def uses_prm(self) -> bool:
        return self.prime.process_weight > 0

    @property
    def uses_reference(self) -> bool:
        return (self.uses_prm and self.prime.reference == "sft") or self.policy.kl_coef > 0

    @model_validator(mode="after")
    def consistent(self) -> Config:
        if self.rollout.samples < 2 and self.prime.estimator in ("rloo", "grpo"):
            raise ValueError(
                f"rollout.samples={self.rollout.samples} leaves nothing to compare with in the "
                f"{self.prime.estimator} baseline; set rollout.samples to 2 or more, or prime.estimator=reinforce "
                "and rollout.keep=[0, 1]"
            )
        if self.prime.process_weight == 0 and self.prime.outcome_weight == 0:
            raise ValueError(
                "prime.process_weight and prime.outcome_weight are both 0, so there is no reward; raise one of them"
            )
        if self.uses_prm and self.prime.update == "none" and self.model.prm is None:
            raise ValueError(
                "prime.update=none never trains the PRM, and a PRM equal to its reference rewards nothing; "
                "set model.prm to a trained PRM, or prime.update=after"
            )
        _check_prm(self)
        if self.prime.reference == "policy" and self.uses_prm and self.rollout.old_logprobs == "engine":
            raise ValueError(
                "prime.reference=policy needs the trainer's own log-probs (the engine's differ by rounding, which the "
                "batch norm would blow up); set rollout.old_logprobs=recompute"
            )
        if self.prime.reference == "policy" and self.policy.kl_coef > 0:
            raise ValueError("policy.kl_coef needs a frozen reference; set prime.reference=sft, or policy.kl_coef=0")
        longest = self.data.max_prompt + self.rollout.max_response
        held = self.engine.micro_tokens * self.engine.sequence_parallel
        if held < longest:
            raise ValueError(
                f"engine.micro_tokens * engine.sequence_parallel = {held} cannot hold one row of data.max_prompt + "
                f"rollout.max_response = {longest} tokens; raise engine.micro_tokens"
            )
        _check_credit(self)
        for name in self.watch.stop:
            if self.watch.limits.get(name, 0.0) is None:
                raise ValueError(f"watch.stop names {name}, which watch.limits turns off; leave it out of one of them")
        low, high = self.rollout.keep
        if low > high:
            raise ValueError(f"rollout.keep={[low, high]} must satisfy 0 <= low <= high <= 1")
        _check_keep(self)
        for key in ("carry", "ahead"):
            value = f"rollout.{key}={getattr(self.rollout, key)!s}".lower()
            if getattr(self.rollout, key) and self.rollout.engine != "vllm":
                raise ValueError(
                    f"{value} needs an engine that keeps unfinished responses while its weights change, which "
                    f"{self.rollout.engine} does not; set rollout.engine=vllm, or leave rollout.{key} out"
                )
            if getattr(self.rollout, key) and not self.rollout.max_age:
                raise ValueError(
                    f"{value} trains on responses that an older policy began, which rollout.max_age=0 forbids; set "
                    f"rollout.max_age=1, or leave rollout.{key} out"
                )
        if self.rollout.top_p < 1 and self.rollout.old_logprobs == "engine":
            raise ValueError(
                f"rollout.top_p={self.rollout.top_p:g} makes the engine's log-probs those of the most probable tokens "
                "alone, which are no old log-probs of the policy; set rollout.old_logprobs=update, or rollout.top_p=1"
            )
        return self


def _check_credit(config: Config) -> None:
    """What only some forms of credit know must not stand beside another one, as if it did something."""
    prime, rollout = config.prime, config.rollout
    if prime.credit == "published":
        for key, value, default in (("shrink", prime.shrink, 0), ("segment", prime.segment, "token")):
            if value != default:
                raise ValueError(
                    f"prime.{key}={value} is not a part of prime.credit=published; set prime.credit=critic (with "
                    f"prime.process_weight=0 that is RLOO) or another, or leave prime.{key} out"
                )
    else:
        for key, value, needed in (("estimator", prime.estimator, "rloo"), ("granularity", prime.granularity, "token")):
            if value != needed:
                raise ValueError(f"prime.credit={prime.credit} needs prime.{key}={needed}, not {value}")
    if not prime.rebase:
        return
    if rollout.temperature != 1 or rollout.top_p != 1:
        raise ValueError(
            "prime.rebase takes the engine's log-probs for the policy's, which they are at rollout.temperature=1 and "
            f"rollout.top_p=1 alone, not {rollout.temperature:g} and {rollout.top_p:g}; leave it out"
        )
    if prime.credit == "published" and prime.normalize == "batch":
        raise ValueError(
            "prime.rebase takes the engine's log-probs, whose rounding prime.normalize=batch would blow up; set "
            "prime.normalize=none, or another prime.credit"
        )


def _check_prm(config: Config) -> None:
    """What asks for more than the published training of the PRM must have a PRM that trains, and something to train."""
    prm, defaults = config.prm, PrmConfig()
    trains = config.uses_prm and config.prime.update != "none"
    for key in ("loss", "rows", "passes", "warmup_steps"):
        if not trains and getattr(prm, key) != getattr(defaults, key):
            what = "prime.update=none" if config.uses_prm else "prime.process_weight=0"
            raise ValueError(
                f"prm.{key}={getattr(prm, key)} has no effect with {what}, which trains no PRM; set prm.{key}="
                f"{getattr(defaults, key)}, or train one"
            )
    if prm.loss != "response" and config.rollout.samples == 1:
        raise ValueError(
            f"prm.loss={prm.loss} starts from a group's mean outcome, which with rollout.samples=1 is the outcome "
            "itself; set rollout.samples to 2 or more, or prm.loss=response"
        )
    if prm.warmup_steps >= config.steps:
        raise ValueError(
            f"prm.warmup_steps={prm.warmup_steps} are the first of steps={config.steps} and leave none that trains the "
            "policy; raise steps, or lower prm.warmup_steps"
        )


def _check_keep(config: Config) -> None:
    """Groups of outcomes that are 0 or 1 have a mean of k/K: some of those in keep must teach something.

    Fractions can have any mean, so that only rewards which give none are looked at; and K = 1 with any reward, where a
    keep between 0 and 1 would choose responses by their outcome instead of prompts by their difficulty.
    """
    (low, high), count, prime = config.rollout.keep, config.rollout.samples, config.prime
    kept = [k for k in range(count + 1) if low - ROUNDING <= k / count <= high + ROUNDING]
    if config.reward.function not in WHOLE_REWARDS and (count > 1 or kept):
        return
    mixed, alike = any(0 < k < count for k in kept), {k > 0 for k in kept if k in (0, count)}
    if prime.process_weight > 0:
        teaches = bool(kept)  # the process reward tells responses of one outcome apart
    elif prime.estimator == "reinforce":
        teaches = mixed or (alike == {True, False} if prime.whiten else True in alike)
    else:
        teaches = mixed
    if teaches:
        return
    wider = [0, 1]
    if count > 1:
        k = min(range(1, count), key=lambda k: max(low - k / count, k / count - high))
        wider = [min(low, math.floor(100 * k / count) / 100), max(high, math.ceil(100 * k / count) / 100)]
    what = f"only groups whose outcomes are all {max(alike):d}" if kept else "no group"
    raise ValueError(
        f"rollout.keep={[low, high]} keeps {what} where each of rollout.samples={count} outcomes is 0 or 1, so nothing "
        f"would be learnt; set rollout.keep={wider}"
    )


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, in the order of declaration."""
    keys = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides (dotted keys, YAML values) and validate the result.

    Raises ValueError with one sentence that names the key, what it got and the fix (the nearest key for a typo).
    """
    tree = _read(path)
    for key, value in parse_assignments(overrides).items():
        _set(tree, key, value)
    return make_config(tree, f"{path}: ")


def make_config(tree: dict, where: str = "") -> Config:
    """The tree validated; ValueError with one sentence, which begins with `where`."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{where}{_explain(error)}") from error


def _read(path: str | Path) -> dict:
    example = "give the path of a YAML file such as configs/quickstart.yaml"
    try:
        text = Path(check_name(str(path))).read_text("utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"config file {path} does not exist; {example}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config file {path} is not text in UTF-8; {example}") from error
    except OSError as error:  # a directory, no permission, ...
        raise ValueError(f"config file {path} cannot be read ({error.strerror}); {example}") from error
    try:
        tree = yaml_text.read(text)
    except ValueError as error:
        raise ValueError(f"config file {path} {error}") from error
    if not isinstance(tree, dict | None):
        raise ValueError(f"config file {path} must hold a mapping of keys, got {type(tree).__name__}")
    return tree or {}


def parse_assignments(words: Iterable[str]) -> dict[str, object]:
    """{key: YAML value} of words `key=value`; ValueError naming one that is not."""
    assignments = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise ValueError(f"override {shortened(word)} is not of the form key=value")
        try:
            assignments[key] = yaml_text.read(value)
        except ValueError as error:
            raise ValueError(f"override {shortened(word)}: its value {error}") from error
    return assignments


def save_config(config: Config, path: str | Path) -> None:
    durable.replace(Path(path), yaml_text.write(config.model_dump(mode="json")))


def _set(tree: dict, dotted: str, value: object) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        section = tree.get(parent)
        if not isinstance(section, dict | None):
            raise ValueError(
                f"override {dotted:.80}: {parent:.80} is a value, not a section; see the config file for its keys"
            )
        tree[parent] = dict(section or {})  # a copy: an alias may name the same section elsewhere
        tree = tree[parent]
    tree[leaf] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = key_of(first)
    if key in REPLACED:
        return f"key {key} is gone; {REPLACED[key]}"
    if first["type"] == "extra_forbidden":
        keys = known_keys()
        leaf = {name.rsplit(".", 1)[-1]: name for name in keys}
        near = difflib.get_close_matches(key, keys, 1, 0.5) or [
            leaf[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaf, 1, 0.5)
        ]
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(keys)}"
        return f"unknown key {key}; {hint}"
    if first["type"] == "missing":
        return f"key {key} is required and missing"
    return describe(first) if key else str(first["ctx"]["error"])
