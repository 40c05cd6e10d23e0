"""Seconds, bytes and shares: kernels, whole steps, rollouts, checkpoints."""

from __future__ import annotations

from statistics import mean

from benchmarks.measured.words import link, load, table


def lm_head() -> str:
    """LM head."""
    result, peaked = load("lm_head.json"), load("peaked.json")
    found = {row["peer"]: row for row in result["rows"]}
    eager = found["eager, float32 logits"]
    names = {
        "prime_kernels": "prime_kernels",
        "CCE": "Cut Cross-Entropy's log-probs",
        "compiled chunk loop": "the same chunks with `torch.compile`",
        "prime_kernels, torch back-end": "prime_kernels, torch back-end",
        "Liger GRPO": "Liger's GRPO loss",
        "eager, float32 logits": "eager PyTorch, float32 logits",
        "F.linear_cross_entropy": "`F.linear_cross_entropy`, per token",
        "Liger scaled CE": "Liger's scaled cross-entropy",
    }
    rows = [
        (
            name,
            f"{found[peer]['ms'] / 1000:.2f} s",
            f"{eager['ms'] / found[peer]['ms']:.2f}x",
            f"{found[peer]['share']:.2f}",
            f"{found[peer]['extra_mb']:.0f} MB",
        )
        for peer, name in names.items()
    ]
    cut = peaked["treatments"]["2^-12"]
    return f"""
Forward and backward of the policy loss with the head of {eager["head"]}-135M, {eager["tokens"]} tokens, float32,
{result["machine"]["threads"]} threads, all in one process, in turns.

Made by `python -m benchmarks.lm_head {result["command"]}`: {link("lm_head.json")}.

{table(("", "time", "over eager", "share of the bare GEMMs' speed", "extra memory"), rows)}

The largest error of a log-prob against float64 is {found["prime_kernels"]["error"]:.1e} (eager: {eager["error"]:.1e}).
To skip vocabulary blocks without gradient does not pay: on {peaked["tokens"]} tokens of GSM8K text {cut["skipped"]:.0%}
of the blocks could go, at an error of {cut["dX relative error"]:.1%} in the gradient
(`python -m benchmarks.peaked MODEL data/gsm8k_train.jsonl --tokens 2048`, {link("peaked.json")}), so there is no such
option."""


def advantages() -> str:
    """Advantages."""
    result = load("advantage.json")
    found = {row["candidate"]: row for row in result["rows"]}
    cpu, torch, loops = found["cpu"], found["torch"], found["python loops, tokens"]
    return f"""
{cpu["rows"]} rows, {cpu["tokens"] / 1e6:.2f}M tokens, {result["machine"]["threads"]} threads: C++ {cpu["ms"]:.1f} ms,
vectorised torch {torch["ms"]:.0f} ms ({torch["times_cpu"]:.1f}x), Python loops over rows and tokens
{loops["ms"] / 1000:.1f} s ({loops["times_cpu"]:.0f}x). Made by `python -m benchmarks.advantage {result["command"]}`:
{link("advantage.json")}."""


def collection() -> str:
    """Collection."""
    cases = [case for case in load("collection.json")["cases"] if case["rate"].replace(".", "").isdigit()]
    now, before = [case["now"] for case in cases], [case["before"] for case in cases]
    prompts = sorted({case["prompts"] for case in cases})
    rates = sorted(float(case["rate"]) for case in cases)
    times = [case["before"]["time"] / case["now"]["time"] for case in cases]

    def span(runs: list[dict], key: str, form: str) -> str:
        return f"{min(run[key] for run in runs):{form}} to {max(run[key] for run in runs):{form}}"

    return f"""
A simulated engine and the real collector, at stationary pass rates of {rates[0]} to {rates[-1]} and steps of
{" and ".join(map(str, prompts))} prompts: {span(now, "stale", ".0%")} of the trained rows are stale, no step has more
than {max(run["stalest"] for run in now):.0%}, {span(now, "over", ".2f")} times the groups needed are started, in
{span(now, "rounds", ".1f")} rounds a step. Starting more after every unlucky group, as before, took
{mean(times):.1f} times as long on average ({min(times):.1f} to {max(times):.1f}) and left
{span(before, "stale", ".0%")} stale, {max(run["stalest"] for run in before):.0%} of the worst step. Made by
`python -m benchmarks.collection`: {link("collection.json")}."""


def rollouts() -> str:
    """Rollouts."""
    result = load("rollout.json")
    (case,) = result["cases"]
    hf, vllm = case["engines"]["hf"], case["engines"]["vllm"]
    kl = max(vllm["mismatch_kl"], hf["mismatch_kl"])
    return f"""
SmolLM2-135M, {case["prompts"]} prompts x {case["samples"]} samples of {case["tokens"]} tokens, float32,
{result["machine"]["threads"]} threads: vLLM {vllm["tokens_per_second"]:.0f} tokens a second, the embedded engine
{hf["tokens_per_second"]:.0f}; the larger KL to a plain forward is {kl:.0e} nats a token; a checked weight sync to
vLLM's process, through a socket as everywhere on a CPU, {vllm["sync_seconds"]:.1f} s. Made by
`python -m benchmarks.rollout MODEL --data gsm8k_test.jsonl --tokens 64`: {link("rollout.json")}."""


def checkpoints() -> str:
    """Checkpoints."""
    result = load("checkpoint.json")
    small, large = result["quickstart"], result["smollm2-135m"]

    def copy(case: dict) -> tuple[float, float, float]:
        seconds = case["seconds"]
        return seconds["step"]["thread"], seconds["copy"]["thread"], case["share_of_a_step"]["copy"]["thread"]

    waits = [c["seconds"]["waited_for"]["clock"] / c["seconds"]["copy"]["clock"] for c in (small, large)]
    return f"""
SFT steps, seconds of the processor in the training's thread, for many other programs were running. At the quickstart's
size a step of {small["tokens"]} tokens takes {copy(small)[0]:.2f} s and the copy that training waits for
{1000 * copy(small)[1]:.0f} ms ({copy(small)[2]:.1%}); a random SmolLM2-135M copies
{large["checkpoint_bytes"] / 1e9:.1f} GB in {copy(large)[1]:.2f} s, {copy(large)[2]:.1%} of a step of no more than
{large["tokens"]} tokens, {copy(large)[0]:.1f} s. By the clock a checkpoint that is waited for took
{" and ".join(f"{wait:.0f}" for wait in waits)} times as long as the copy. Made by
`python -m benchmarks.checkpoint --models quickstart --rounds 2`, then
`python -m benchmarks.checkpoint --models smollm2-135m --tokens 256 --rounds 1`: {link("checkpoint.json")}."""


def whole_steps() -> str:
    """Whole steps."""
    result = load("step.json")
    settings, packages = result["settings"], result["machine"]["packages"]
    seconds = {(row["case"], row["arm"]): row["seconds"] for row in result["rows"] if "seconds" in row}
    over = {(row["case"], row["what"]): row["ratio"] for row in result["comparisons"]}

    def cells(arm: str, ours: str | None) -> list[str]:
        ratios = [f" ({over[case, f'{arm} / {ours}']:.1f}x)" if ours else "" for case in settings["cases"]]
        return [f"{seconds[case, arm]:.1f}{ratio}" for case, ratio in zip(settings["cases"], ratios, strict=True)]

    arms = {
        "ours RLOO": None,
        "TRL GRPO": "ours RLOO",
        "TRL RLOO": "ours RLOO",
        "published RLOO": "ours RLOO",
        "ours PRIME": None,
        "published PRIME, after": "ours PRIME",
        "published PRIME, before": "ours PRIME",
    }
    shapes = f"responses up to {settings['longest']}, long-tailed", "short, all of one length"
    both = [over[case, "ours PRIME / ours RLOO, rollouts included"] for case in settings["cases"]]
    came = [seconds[case, "rollouts"] for case in settings["cases"]]
    return f"""
A random Llama of {settings["shape"]} parameters, float32, {settings["threads"]} threads: ours, the published dataflow
on the same ZeRO-3 engine and TRL {packages["trl"]}'s trainers on the same model, {settings["rows"]} rows, rollouts and
{settings["updates"]} optimizer steps; arms that should compute the same are held against each other. Seconds of a step
after its rollouts, from one round; in brackets over ours.

Made by `python -m benchmarks.step {result["command"]}`: {link("step.json")}.

{table(("", *shapes), [(arm, *cells(arm, ours)) for arm, ours in arms.items()])}

Long rows cost the others padding and float32 logits; with rows of one length what is left is the logits. PRIME costs
{both[0]:.2f} times an RLOO step where the rollouts of these long rows ({came[0]:.1f} s) come before it, {both[1]:.1f}
times where short ones leave {came[1]:.1f} s to hide behind. TRL's arms with Liger need a GPU.

![seconds of a step by phase](../benchmarks/results/cpu/step.png)"""


def overlap() -> str:
    """Beside the rollouts."""
    first, second = load("overlap.json"), load("overlap-2-slots.json")

    def seconds(result: dict) -> dict[str, float]:
        return {arm["arm"]: arm["seconds"] for arm in result["arms"]}

    one, two = seconds(first), seconds(second)
    after = next(arm for arm in first["arms"] if arm["arm"] == "PRIME, one after the other")["phases"]
    alone = next(arm for arm in second["arms"] if arm["arm"] == "RLOO")["phases"]["generate"]
    needed, decoded = after["reference"] + after["prm"], after["generate"]
    serial, beside = one["PRIME, one after the other"], one["PRIME, overlapped"]
    rows = first["arms"][0]["rows"][0]
    return f"""
A small random Llama, trainer and vLLM on a core each, {rows} rows: a PRIME step takes {serial:.1f} s one after the
other and {beside:.1f} s overlapped, an RLOO step {one["RLOO"]:.1f} s. Here one core decodes in
{decoded:.1f} s what the other's reference and PRM need {needed:.0f} s for, so at best those {decoded:.1f} s could
vanish, and {serial - beside:.1f} s did. With rollouts of {alone:.0f} s an overlapped
PRIME step takes {two["PRIME, overlapped"] / two["RLOO"]:.2f} times an RLOO step, {two["PRIME, overlapped"]:.1f} to
{two["RLOO"]:.1f} s: what is left is the last of only {second["sizes"]["prompts"]} groups.

Made by
`python -m benchmarks.overlap --response 192 --steps 1 --arms RLOO "PRIME, one after the other" "PRIME, overlapped"`
({link("overlap.json")}) and
`python -m benchmarks.overlap --response 128 --steps 1 --slots 2 --arms RLOO "PRIME, overlapped"`
({link("overlap-2-slots.json")})."""
