"""What a run will hold and do, from its configuration alone: model sizes, memory per GPU, passes per step."""

from __future__ import annotations

from typing import NamedTuple

from accelerate import init_empty_weights
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PretrainedConfig

from prime_fast.config import Config
from prime_fast.data.models import model_config
from prime_fast.rollout.weights import BUCKET_BYTES

GIB = 1 << 30
HEAD_CHUNK_BYTES = 2 * 4 * (1 << 26)  # one float32 logits chunk of the LM-head op and its gradient


def parameter_count(model: PretrainedConfig) -> int:
    with init_empty_weights():
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(model).parameters())


class Item(NamedTuple):
    name: str
    gib: float  # per rank
    place: str = "GPU"  # or where engine.offload puts it


def memory_plan(config: Config, ranks: int) -> list[Item]:
    """What each rank holds, for bfloat16 training (float32 where model.dtype says so). Activations are an estimate."""
    width = 4 if config.model.dtype == "float32" else 2
    policy = model_config(config.model.policy)
    sizes = {role: parameter_count(model_config(path)) for role, path in _models(config).items()}
    rests = {"none": "GPU", "cpu": "host memory", "disk": "disk"}[config.engine.offload]
    plan = []
    for role, count in sizes.items():
        plan.append(Item(f"{role}: parameters, sharded", width * count / ranks, rests))
        if role == "policy" or (role == "prm" and config.prime.update != "none"):
            plan.append(Item(f"{role}: gradients, sharded", width * count / ranks, rests))
            plan.append(Item(f"{role}: float32 master weights and AdamW states, sharded", 12 * count / ranks, rests))
    plan += [
        *_rollout_items(config, policy, sizes["policy"], width),
        Item("one layer gathered, and one prefetched", 2 * width * _layer_parameters(policy)),
        Item("LM-head chunk of logits, float32", HEAD_CHUNK_BYTES),
        Item("LM-head weight and its float32 gradient", (width + 4) * policy.vocab_size * policy.hidden_size),
        Item("activations of one micro-batch (estimate)", _activation_bytes(config, policy, width)),
    ]
    return [item._replace(gib=item.gib / GIB) for item in plan]


def _rollout_items(config: Config, shape: PretrainedConfig, count: int, width: int) -> list[Item]:
    """What the rollout engine holds, per engine GPU; vLLM takes what its gpu_memory_utilization allows beyond."""
    options = config.rollout.vllm
    if config.rollout.engine == "hf":
        return [Item("rollout engine: whole model (asleep while training)", width * count)]
    shards = options.get("tensor_parallel_size", 1)
    apart = "gpus" in options
    place = "GPU of its own" if apart else "GPU, while sampling"
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    token = 2 * shape.num_hidden_layers * heads * head_size * width
    tokens = config.rollout.batch * (config.data.max_prompt + config.rollout.max_response)
    bucket = options.get("bucket_mib", BUCKET_BYTES >> 20) << 20
    items = [
        Item("vLLM: parameters", width * count / shards, place),
        Item("vLLM: KV cache of rollout.batch full-length sequences", token * tokens / shards, place),
        Item("weight sync: two buckets", 2 * bucket, "GPU, while syncing"),
    ]
    if not apart:
        items.append(Item("vLLM: parameters, asleep while training", width * count / shards, "host memory"))
    return items


def passes_per_step(config: Config) -> list[tuple[str, str, float]]:
    """(pass, over which rows, forward units): a backward is 2 units, and one more under gradient checkpointing."""
    train = 4.0 if config.model.gradient_checkpointing else 3.0
    steps = {
        name: max(1, round(config.rollout.prompts * config.rollout.samples / section.mini_batch))
        for name, section in (("policy", config.policy), ("prm", config.prm))
    }
    rows = [("generate (and sync weights once)", "every response", 1.0)]
    if config.uses_reference:
        rows.append(("reference forward", "kept responses", 1.0))
    if config.uses_prm:
        if config.prime.update == "none":
            rows.append(("PRM forward", "kept responses", 1.0))
        else:
            rows.append((f"PRM forward and backward, {steps['prm']} optimizer steps", "kept responses", train))
        if config.prime.update == "before":
            rows.append(("PRM forward again, after its update", "kept responses", 1.0))
    policy_reference = config.uses_prm and config.prime.reference == "policy"
    if policy_reference:
        rows.append(("policy forward: the PRM's reference", "kept responses", 1.0))
    reused = policy_reference and config.rollout.temperature == 1
    spared = {"recompute": 0, "update": 1, "engine": steps["policy"]}[config.rollout.old_logprobs]
    if spared < steps["policy"] and not reused:
        rows.append(("policy forward: old log-probs", "kept responses", 1.0 - spared / steps["policy"]))
    rows.append((f"policy forward and backward, {steps['policy']} optimizer steps", "kept responses", train))
    return rows


def print_dry_run(config: Config, ranks: int, console: Console) -> None:
    models = Table("model", "checkpoint", "parameters", "layers", "hidden", "vocabulary", "context", title="Models")
    for role, path in _models(config).items():
        shape = model_config(path)
        models.add_row(
            role,
            path,
            f"{parameter_count(shape) / 1e9:.3f} B",
            str(shape.num_hidden_layers),
            str(shape.hidden_size),
            str(shape.vocab_size),
            str(getattr(shape, "max_position_embeddings", "-")),
        )
    console.print(models)
    plan = memory_plan(config, ranks)
    memory = Table("item", "GiB per rank", "in", title=f"Memory plan, {ranks} ranks")
    for item in plan:
        memory.add_row(item.name, f"{item.gib:.2f}", item.place)
    memory.add_section()
    for place in dict.fromkeys(item.place for item in plan):
        memory.add_row("sum", f"{sum(item.gib for item in plan if item.place == place):.2f}", place)
    shape = model_config(config.model.policy)
    spared = config.engine.micro_tokens * shape.vocab_size * (2 + 4 + 4) / GIB
    memory.add_row("not built: logits, their float32 copy and gradient", f"{spared:.2f}", "-")
    console.print(memory)
    work = Table("pass", "over", "forward units", title="Passes per step")
    units = 0.0
    for name, rows, unit in passes_per_step(config):
        work.add_row(name, rows, f"{unit:g}")
        units += unit if rows == "kept responses" else 0
    work.add_section()
    work.add_row("sum over kept responses", "", f"{units:g}")
    console.print(work)
    r = config.rollout
    console.print(
        f"{r.prompts} prompts x {r.samples} samples, up to {config.data.max_prompt} + {r.max_response} tokens each; "
        f"micro-batches of {config.engine.micro_tokens} tokens per GPU; {config.steps} steps."
    )


def _models(config: Config) -> dict[str, str]:
    models = {"policy": config.model.policy}
    if config.uses_prm:
        models["prm"] = config.model.prm or config.model.policy
    if config.uses_reference:
        models["reference"] = config.model.reference or config.model.policy
    return models


def _layer_parameters(shape: PretrainedConfig) -> int:
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    return (parameter_count(shape) - embeddings) // shape.num_hidden_layers


def _activation_bytes(config: Config, shape: PretrainedConfig, width: int) -> float:
    """Saved for backward, per token: a layer's normed inputs, q, k, v, attention output and MLP intermediates."""
    heads = shape.num_attention_heads
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    projected = (heads + 2 * getattr(shape, "num_key_value_heads", heads)) * head_size
    layer = 6 * shape.hidden_size + 2 * projected + 4 * shape.intermediate_size
    if config.model.gradient_checkpointing:
        per_token = shape.num_hidden_layers * shape.hidden_size + layer
    else:
        per_token = shape.num_hidden_layers * layer
    return config.engine.micro_tokens * per_token * width
