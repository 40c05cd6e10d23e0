"""The sections of the configuration tree: every key with its type, its default and what it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
    Targets,
    Tokens,
    VllmArguments,
    Watched,
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def empty(cls, value: Any) -> Any:
        """`policy:` with nothing below it is a section without keys."""
        return {} if value is None else value


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field of this type is, also one that may be left out."""
    kind = (get_args(annotation) or (annotation,))[0]
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


class ModelConfig(Section):
    policy: Name  # HF directory or hub id; policy, PRM and reference all start here unless told otherwise
    prm: Name | None = None  # where the PRM starts; null = as the policy
    reference: Name | None = None  # the frozen reference; null = where the policy starts
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward; auto = bfloat16 on a GPU, float32 on CPU
    # norms, RoPE, SwiGLU. hf: transformers' | auto: on a GPU torch's RMSNorm | fused: Liger's RoPE and SwiGLU as well
    layers: Literal["auto", "hf", "fused"] = "auto"
    # layers whose activations are made again in the backward: none, all, a number, all but the outputs of attention
    # (attention-saved), or as few as the memory plan leaves room for (auto; none without a GPU). The gradients are the
    # same to the bit
    recompute: Recompute = "auto"


class DataConfig(Section):
    train: Paths = []  # .jsonl, .json, .parquet or hf://org/name:split; docs/start.md tells the shapes of rows
    eval: Paths = []  # held-out rows, likewise
    eval_rows: Positive = 256  # of all eval files together, as many of each
    max_prompt: Positive = 1024  # tokens; longer prompts are dropped and counted
    drop: list[Literal["broken", "duplicates"]] = []  # rows to leave out and count; a broken row is else an error
    # chat: the tokenizer's chat template | raw: prompts as they stand | auto: raw for texts in `prompt` and for
    # tokenizers without a chat template, else chat
    template: Literal["auto", "raw", "chat"] = "auto"
    template_args: Arguments = {}  # of the chat template, e.g. {enable_thinking: false}


class RolloutConfig(Section):
    engine: Literal["hf", "vllm"] = "hf"  # embedded, batched, exact | vLLM in a process of its own
    # arguments of vllm.LLM, and ours: gpus (for engines alone), sleep_level (2; 1 keeps the weights), bucket_mib (sync)
    vllm: VllmArguments = {}
    prompts: Positive = 256  # groups trained on per step
    samples: Positive = 4  # K, responses per prompt
    max_response: Positive = 3072  # tokens, EOS included
    temperature: Annotated[float, Number, Field(ge=1e-3, allow_inf_nan=False)] = 1.0  # of sampling
    # sample from the most probable tokens that make up this share
    top_p: Annotated[float, Number, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    stop: Tokens = []  # token strings or ids that end a response beside EOS, and are a part of it; each one token
    batch: Positive = 256  # sequences decoded together by one engine
    max_rounds: Positive = 8  # at most this many times `prompts` prompts are started to fill a step
    keep: tuple[Share, Share] = (0.2, 0.8)  # groups whose mean outcome lies in this closed interval train
    patience: NotNegative = 3  # steps in a row without one, after which the run ends; 0 = never
    filter_truncated: bool = False  # groups with a truncated response do not train
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
    # after: scores come out of the PRM's own training forward | before: it is trained first, then scores in a second
    # forward | none: it is not trained
    update: Literal["after", "before", "none"] = "after"
    reference: Literal["sft", "policy"] = "sft"  # of the log-ratios: model.reference, frozen | the policy of this step
    beta: Annotated[float, Number, Field(gt=0, allow_inf_nan=False)] = 0.05  # a token's reward is beta * log-ratio
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
    estimator: Literal["rloo", "grpo", "reinforce"] = "rloo"  # the baseline: docs/algorithm.md has the formulas
    form: Literal["run", "paper"] = "run"  # of rloo: the published run's code | the publication's formula
    normalize: Literal["batch", "none"] = "batch"  # process rewards over the batch's largest return | as they are
    whiten: bool = True  # advantages of all tokens of a step to mean 0 and variance 1
    process_weight: Rate = 1.0  # of the process reward; 0 = outcome-only, and neither PRM nor reference is loaded
    outcome_weight: Rate = 1.0  # of the verified outcome
    gamma: tuple[Discount, Discount] = (1.0, 1.0)  # per token, of the process reward and of the outcome


class LoraConfig(Section):
    """An adapter that is trained in the place of the model's own weights: docs/lora.md."""

    rank: Positive = 32  # of what is trained beside each weight; without the section all weights train
    alpha: Positive = 32  # the adapter counts alpha / rank times; so the rank hardly changes which lr is right
    targets: Targets = "all-linear"  # of the decoder layers; or a list of their names, e.g. [q_proj, v_proj]


class OptimizerConfig(Section):
    lr: Rate  # learning rate of AdamW
    weight_decay: Rate = 0.0  # of AdamW
    grad_clip: Rate = 1.0  # largest norm of the gradient; 0 = no clipping
    mini_batch: Positive = 256  # rows per optimizer step, over all ranks
    warmup: Share = 0.0  # share of the run's steps over which lr rises linearly
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up; to 0 at the end of the run


class PolicyConfig(OptimizerConfig):
    lr: Rate = 5e-7
    weight_decay: Rate = 0.01
    epochs: Positive = 1  # passes over a step's rows, each cut into mini-batches anew
    clip: tuple[Rate, Rate] = (0.2, 0.2)  # the ratio is clipped to [1 - low, 1 + high]
    entropy_coef: Rate = 0.0  # of a bonus for the entropy, in the loss
    kl_coef: Rate = 0.0  # of the KL to the reference (k3), in the loss
    mean: Literal["token", "row"] = "token"  # loss: mean over tokens, or over rows of the mean over a row's tokens
    lora: LoraConfig | None = None


class PrmConfig(OptimizerConfig):
    lr: Rate = 1e-6
    grad_clip: Rate = 10.0
    # cross-entropy of the outcome given the whole response | that on top of the log-odds of the group's mean outcome:
    # log-ratios then tell responses to a prompt apart | the latter at every prefix (arXiv 2604.13197) | of which of two
    # responses to a prompt is the better one (of prime-fast prm alone)
    loss: Literal["response", "centered", "prefix", "dpo"] = "response"
    rows: Literal["kept", "all"] = "kept"  # all: then also on the groups that rollout.keep drops; they give no scores
    passes: Positive = 1  # over a step's rows; scores are of the first, but with prime.update=before
    warmup_steps: NotNegative = 0  # first ones of the run's steps, which train the PRM alone
    lora: LoraConfig | None = None  # on the reference's own weights: one model less in memory


class SftConfig(OptimizerConfig):
    data: Paths = []  # rows with solutions
    eval: Paths = []  # held-out solutions for the validation loss; of all files together at most data.eval_rows
    lr: Rate = 1e-5
    weight_decay: Rate = 0.01
    warmup: Share = 0.05
    mini_batch: Positive = 96
    steps: Positive = 100  # optimizer steps
    # what is learnt of a row; or {reasoning} (the solution without its last `#### x` line), {ground_truth}
    response: Answer = "{solution}"


class OfflineConfig(Section):
    """The rows of prime-fast prm, which trains a PRM by the section prm: docs/prm.md."""

    data: Paths = []  # labelled responses; those with step_labels are cut at their steps
    eval: Paths = []  # held-out ones, of the prompts of which at most about data.eval_rows responses are taken
    epochs: Annotated[float, Number, Field(gt=0, le=1000)] = 1.0  # passes over the rows


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
    tensorboard: bool = False  # also write the metrics for TensorBoard, which the extra of that name installs
    # seconds from SIGTERM or SIGUSR1 to the end of the run, which saves what it can until then. Slurm, Kubernetes and
    # torchrun give 30 unless told otherwise
    grace: Annotated[float, Number, Field(gt=0, le=DAY)] = 25.0
    # seconds without progress on any rank after which the run ends and tells where each stands; 0 = never. What takes
    # longest without a sign of progress is the writing of a large model's checkpoint
    hang: Annotated[float, Number, Field(ge=0, le=DAY)] = 1800.0
