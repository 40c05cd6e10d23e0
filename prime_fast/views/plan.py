"""The dry run: model sizes, memory by phase and whether it fits a card, passes per step."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from prime_fast.config import Config
from prime_fast.data.models import model_config
from prime_fast.memory.advice import apply, mend
from prime_fast.memory.items import GIB, total
from prime_fast.memory.plan import Plan, models
from prime_fast.memory.shapes import shape

NODE = 8  # ranks that share a host


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
    epochs = config.policy.epochs
    updates = f"policy forward and backward, {epochs * steps['policy']} optimizer steps"
    rows.append((updates, "kept responses", epochs * train))
    return rows


def print_dry_run(config: Config, ranks: int, console: Console, card: int | None = None) -> bool:
    """Print what a run on `ranks` GPUs (of `card` bytes each, if given) holds and does; returns whether it fits."""
    plan = Plan(config, ranks, card)
    console.print(_models_table(config))
    console.print(_phases_table(plan))
    console.print(_items_table(plan))
    console.print(_passes_table(config))
    r = config.rollout
    console.print(
        f"{r.prompts} prompts x {r.samples} samples, up to {config.data.max_prompt} + {r.max_response} tokens each; "
        f"micro-batches of {config.engine.micro_tokens} tokens per GPU; {config.steps} steps.\n"
        f"A checkpoint takes {_gib(plan.checkpoint_bytes)} on disk, {_gib(plan.kept_bytes)} with the newest "
        f"{config.log.keep} that are kept{', the best' if config.evaluates else ''} and one being written."
    )
    if card is None:
        return True
    for sentence in verdict(plan):
        console.print(sentence, style="bold" if plan.fits else "bold red")
    return plan.fits


def verdict(plan: Plan) -> list[str]:
    """Sentences: the tightest phase and by how much the run fits its card or not; the setting that mends it."""
    tightest, held = plan.tightest, plan.rollout.sequences
    first = f"Tightest phase: {tightest}, {_gib(plan.peaks[tightest])} of {_gib(plan.card)}"
    lines = [f"{first}: {'fits with' if plan.left >= 0 else 'does not fit, over by'} {_gib(abs(plan.left))}."]
    if held is not None:
        lines.append(f"vLLM's KV cache holds {max(0.0, held):.1f} sequences of full length.")
        if held < 1:
            lines.append("vLLM refuses to start with room for less than one.")
    if not plan.fits:
        lines.append(_advice(plan))
    return lines


def _advice(plan: Plan) -> str:
    change = mend(plan)
    if not change:
        return "No setting mends it, nor all of them together; use a larger card, a smaller model or shorter rows."
    mended = Plan(apply(plan.config, change), plan.ranks, plan.card)
    settings = " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
    advice = f"Set {settings}: then {mended.tightest} is the tightest phase and fits with {_gib(mended.left)}"
    if "engine.offload" in change:
        host = max(mended.node_host_bytes(phase, NODE) for phase in mended.phases)
        advice += f", and a node's host holds up to {_gib(host)}"
    return advice + "."


def _models_table(config: Config) -> Table:
    table = Table("model", "checkpoint", "parameters", "layers", "hidden", "vocabulary", "context", title="Models")
    for role, path in models(config).items():
        found = shape(path)
        context = getattr(model_config(path), "max_position_embeddings", "-")
        sizes = (f"{found.count / 1e9:.3f} B", found.layers, found.hidden, found.vocabulary, context)
        table.add_row(role, path, *map(str, sizes))
    return table


def _phases_table(plan: Plan) -> Table:
    """Peaks in GiB: of a rank's GPU, by holder; of the host for a whole node."""
    title = f"Memory by phase, GiB: {plan.ranks} ranks" + (f", {_gib(plan.card)} each" if plan.card else "")
    columns = ["phase", "GPU", "trainer", "engine", "driver", *(["left"] if plan.card else []), "host, a node"]
    table = Table(*columns, title=title, caption="host: beyond the processes themselves")
    for phase, items in plan.phases.items():
        sizes = [plan.peaks[phase], *(total(items, "GPU", holder) for holder in ("trainer", "engine", "driver"))]
        sizes += [plan.card - plan.peaks[phase]] if plan.card else []
        table.add_row(phase, *(f"{size / GIB:.2f}" for size in (*sizes, plan.node_host_bytes(phase, NODE))))
    return table


def _items_table(plan: Plan) -> Table:
    table = Table("item", "GiB per rank", "in", title=f"What the tightest phase holds: {plan.tightest}")
    for item in sorted(plan.phases[plan.tightest], key=lambda item: (item.where, -item.size)):
        if item.size >= GIB // 200:
            table.add_row(item.name, f"{item.size / GIB:.2f}", item.where)
    table.add_section()
    policy = plan.states["policy"].shape
    spared = plan.config.engine.micro_tokens * policy.vocabulary * (plan.dtype.itemsize + 4 + 4)
    table.add_row("not built: logits, their float32 copy and gradient", f"{spared / GIB:.2f}", "-")
    return table


def _passes_table(config: Config) -> Table:
    table = Table("pass", "over", "forward units", title="Passes per step")
    units = 0.0
    for name, rows, unit in passes_per_step(config):
        table.add_row(name, rows, f"{unit:g}")
        units += unit if rows == "kept responses" else 0
    table.add_section()
    table.add_row("sum over kept responses", "", f"{units:g}")
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
