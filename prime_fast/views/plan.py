"""The dry run: model sizes, memory by phase and whether it fits a card, passes and seconds of a step."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from prime_fast.config import Config
from prime_fast.data.models import model_config
from prime_fast.engine import ulysses
from prime_fast.memory.advice import apply, card_bytes, mend
from prime_fast.memory.items import GIB, total
from prime_fast.memory.plan import Plan
from prime_fast.memory.shapes import shape
from prime_fast.speed.plan import NODE, PROMPT, RESPONSE, WORTH, Seconds
from prime_fast.speed.plan import advice as faster
from prime_fast.speed.rates import CARDS, known, measured
from prime_fast.speed.step import passes_per_step


def print_dry_run(
    config: Config,
    ranks: int,
    console: Console,
    gpu: str | None = None,
    response: int | None = None,
    rates: str | None = None,
) -> bool:
    """Print what a run on `ranks` GPUs (of the kind `gpu`, as card_bytes takes it) holds, does and takes; returns
    whether it fits.

    response: mean tokens of a response. rates: a file or folder of measured rates, see speed.rates.measured.
    """
    ulysses.check(config, ranks)
    plan = Plan(config, ranks, card_bytes(gpu) if gpu else None)
    found = measured(gpu, rates) if gpu and known(gpu) else None
    seconds = Seconds(plan, found[0], response) if found else None
    console.print(_models_table(plan))
    console.print(_phases_table(plan))
    console.print(_items_table(plan))
    console.print(_passes_table(plan))
    r, parallel = config.rollout, config.engine.sequence_parallel
    console.print(
        f"{r.prompts} prompts x {r.samples} samples, up to {config.data.max_prompt} + {r.max_response} tokens each; "
        f"micro-batches of {config.engine.micro_tokens} tokens per GPU"
        f"{f', each shared by {parallel} GPUs' if parallel > 1 else ''}; {config.steps} steps.\n"
        f"A checkpoint takes {_gib(plan.checkpoint_bytes)} on disk, {_gib(plan.kept_bytes)} with the newest "
        f"{config.log.keep} that are kept{', the best' if config.evaluates else ''} and one being written."
    )
    for sentence in plan.chosen():
        console.print(sentence)
    if gpu is None:
        return True
    if seconds:
        console.print(_seconds_table(seconds))
        for sentence in forecast(seconds, found[1], assumed=response is None):
            console.print(sentence)
    else:
        console.print(f"No seconds: --gpu {gpu} does not say which card it is; give one of {', '.join(CARDS)}.")
    for sentence in verdict(plan):
        console.print(sentence, style="bold" if plan.fits else "bold red")
    return plan.fits


def forecast(seconds: Seconds, source: str, assumed: bool) -> list[str]:
    """Sentences: what the seconds assume, the longest phase, the setting that shortens the step most."""
    longest = seconds.config.rollout.max_response
    given = f"{RESPONSE:.0%} of rollout.max_response, --response-tokens says otherwise" if assumed else "as given"
    lines = [
        f"Predicted, not measured, for responses of {seconds.response:.0f} tokens on average ({given}), log-normal and "
        f"cut at {longest}, prompts of {seconds.prompt:.0f} ({PROMPT:.0%} of data.max_prompt), {seconds.pass_rate:.0%} "
        f"of the groups passing rollout.keep. Rates: {source}.",
    ]
    top = seconds.bottleneck
    line = f"Longest phase: {top}, {seconds.phases[top] / seconds.total:.0%} of {seconds.total:.4g} s"
    if top == "generate":
        line += f", {seconds.slots} sequences at a time on each of {seconds.engines} engines"
    lines.append(f"{line}; {seconds.tokens_per_second:.0f} trained tokens/s.")
    if not seconds.plan.fits:
        return lines  # first it has to fit
    if found := faster(seconds):
        settings = " ".join(f"{key}={str(value).lower()}" for key, value in found[0].items())
        lines.append(f"What would help most: {settings}, about {found[1]:.3g} s less a step, and it still fits.")
    else:
        lines.append(f"No setting that leaves the results as they are shortens it by more than {WORTH:.0%}.")
    return lines


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


def _models_table(plan: Plan) -> Table:
    columns = ("model", "checkpoint", "parameters", "trained", "layers", "hidden", "vocabulary", "context")
    table = Table(*columns, title="Models")
    for role, path in plan.config.paths.items():
        found, states = shape(path), plan.states.get(role)
        if states is None:  # of the model that it is a part of
            table.add_row(role, f"the {plan.config.reference_within}'s, its adapter off")
            continue
        context = getattr(model_config(path), "max_position_embeddings", "-")
        trained = f"{states.training.count / 1e9:.3f} B" if states.trained else "-"
        sizes = (found.layers, found.hidden, found.vocabulary, context)
        table.add_row(role, path, f"{found.count / 1e9:.3f} B", trained, *map(str, sizes))
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


def _passes_table(plan: Plan) -> Table:
    table = Table("pass", "over", "forward units", title="Passes per step")
    units = 0.0
    for made in passes_per_step(plan.config, plan.recompute):
        done = made.units - made.spared
        table.add_row(made.what, made.rows, f"{done:.4g}")
        units += done if made.rows == "kept responses" else 0
    table.add_section()
    table.add_row("sum over kept responses", "", f"{units:.4g}")
    return table


def _seconds_table(seconds: Seconds) -> Table:
    table = Table("phase", "seconds", "share", title="Seconds of a step, predicted")
    for phase, spent in seconds.phases.items():
        table.add_row(phase, f"{spent:.4g}", f"{spent / seconds.total:.1%}")
    if seconds.beside:
        table.add_row(
            "beside the rollouts, at best", f"-{seconds.beside:.4g}", f"-{seconds.beside / seconds.total:.1%}"
        )
    table.add_section()
    table.add_row("step", f"{seconds.total:.4g}", "")
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
