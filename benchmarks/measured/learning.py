"""What is learnt, and by which credit."""

from __future__ import annotations

from benchmarks.learning.arms import ADDITIONS
from benchmarks.measured.words import link, load, made_by, ratio, reached, table

PRIME = "odds-size+step+keen+faster+x4+unfiltered"
WARM = f"{PRIME}+warm"
ARMS = {
    "rloo": "RLOO, groups of mean outcome 0.2 to 0.8",
    "rloo+unfiltered": "RLOO, every group",
    PRIME: "process rewards, every group (`configs/quickstart.yaml`)",
    WARM: "the same, with a warm PRM",
}


def learning() -> str:
    """Learning."""
    arms = load("learning-chain6.json")["arms"]
    seconds, every = (arms[arm]["mean"]["seconds_per_step"] for arm in (PRIME, "rloo+unfiltered"))
    return f"""
The quickstart's task. {_compared("learning-chain6.json")}

![held-out accuracy of the arms, and the PRM's step AUC](../benchmarks/results/cpu/learning-chain6.png)

Two things pay. One is to drop no group; the other is the process reward, against RLOO on every group, too. It costs
compute: the PRM takes {seconds["prm"] / seconds["policy"]:.1f} times the policy's seconds, and a step
{seconds["whole"]:.1f} s against {every["whole"]:.1f} s of RLOO's on every group, beside other work on the machine.
[credit.md](credit.md#when-process-rewards-pay) says what to do."""


def _compared(name: str) -> str:
    """What a study of the arms says."""
    study = load(name)
    arms, level = study["arms"], "0.9"
    head = (
        "arm",
        "start",
        "end",
        "rollouts to 0.8",
        f"to {level}",
        f"to {level} over RLOO's",
        "over RLOO's on every group",
        "errors at the end over RLOO's",
    )
    rows = [
        (
            label,
            f"{arms[arm]['mean']['start_accuracy']:.3f}",
            f"{arms[arm]['mean']['final_accuracy']:.3f}",
            *reached(arms[arm], ("0.8", level)),
            ratio(arms[arm], "against_rloo", level),
            ratio(arms[arm], "against_rloo_unfiltered", level),
            f"{arms[arm]['against_rloo']['error_ratio']:.2f}" if "against_rloo" in arms[arm] else "",
        )
        for arm, label in ARMS.items()
        if arm in arms
    ]
    told = ""
    if WARM in arms:
        counted = ratio(arms[WARM], "against_rloo_unfiltered", level, "ratio_with_warmup")
        sharp = ", ".join(f"{third:.2f}" for third in arms[WARM]["mean"]["step_auc_by_thirds"])
        told = f"""

A warm PRM was trained before, on {arms[WARM]["mean"]["warmup_rollouts"]:.0f} rollouts of the policy as it starts; its
step AUC by thirds of the run is {sharp}. With these rollouts counted the ratio over RLOO on every group is
{counted}: it pays where a PRM serves more than one run, or where rollouts with outcomes are there already."""
    auc = ", ".join(f"{third:.2f}" for third in arms[PRIME]["mean"]["step_auc_by_thirds"])
    return f"""{len(arms[PRIME]["seeds"])} seeds with an SFT model each, {study["steps"]} steps, greedy accuracy on
held-out problems, and rollouts until it is reached; ratios with intervals (`95%`) over pairs of one seed. The step AUC
of the PRM by thirds of a run is {auc}.

{made_by(name)}

{table(head, rows)}{told}"""


def one_seed() -> str:
    """One seed of more arms."""
    study = load("learning-chain6-one-seed.json")
    names = {
        "rloo": "RLOO",
        "odds-size+step+keen+x4": "process rewards (`odds`) with the filter, PRM lr 3e-4",
        "odds-size+step+keen+x12": "the same, weight 12",
        "odds-size+step+oracle+x4": "**true step labels** through the same form, with the filter",
        "rloo+unfiltered": "RLOO, every group",
        "rloo-shrunk+unfiltered": "the same, baseline shrunk by 1.5",
        "odds-size+step+keen+x4+unfiltered": "`odds` on every group, PRM lr 3e-4",
        PRIME: "`odds` on every group, PRM lr 1e-3",
        "odds+step+keen+faster+x4+unfiltered": "the same, gate `evidence`",
        "odds-size+step+keen+faster+prefix+x4+unfiltered": "gate `size`, prefix loss",
        WARM: "gate `size`, warm PRM",
        "critic+step+keen+faster+unfiltered": "`critic` on every group, PRM lr 1e-3",
        "pav+step+keen+faster+unfiltered": "`pav` on every group, weight 2, PRM lr 1e-3",
        "lookahead+keen+faster+unfiltered": "`lookahead` on every group, weight 2, PRM lr 1e-3",
        "td+step+keen+faster+unfiltered": "`td` on every group, lambda 0.9, PRM lr 1e-3",
        "published+unfiltered": "`published` on every group, its PRM (lr 1e-4)",
        "frozen+unfiltered": "the same, its PRM trained on as many rollouts before, and then frozen",
        "odds-size+step+oracle+x4+unfiltered": "**true step labels** through `odds` on every group",
    }
    levels = "0.8", "0.9", "0.95"
    ends = {arm: f"{result['mean']['final_accuracy']:.3f}" for arm, result in study["arms"].items()}
    rows = [(name, ends[arm], *reached(study["arms"][arm], levels)) for arm, name in names.items()]
    return f"""
{study["steps"]} steps of one seed: a direction, not a percentage.

{made_by("learning-chain6-one-seed.json")}

{table(("arm", "end", *(f"rollouts to {level}" for level in levels)), rows)}"""


def lora() -> str:
    """A PRM by LoRA."""
    study, base = load("learning-lora.json"), "odds-size+step+x4+centered+passes+unfiltered"
    names = {
        f"{base}+faster": "all weights, PRM lr 1e-3",
        f"{base}+faster+lora": "adapter, PRM lr 1e-3",
        f"{base}+fastest+lora": "adapter, PRM lr 1e-2",
    }
    levels, rank = ("0.8", "0.9", "0.95"), ADDITIONS["lora"].overrides[0].partition("=")[2]
    rows = []
    for arm, name in names.items():
        auc = " / ".join(f"{third:.2f}" for third in study["arms"][arm]["mean"]["step_auc_by_thirds"])
        rows.append((name, *reached(study["arms"][arm], levels), auc))
    return f"""
The quickstart's task with an adapter of rank {rank}, {study["steps"]} steps of one seed: a direction, not a percentage.

{made_by("learning-lora.json")}

{table(("the PRM trains", *(f"rollouts to {level}" for level in levels), "step AUC by thirds"), rows)}"""


def addition() -> str:
    """Long addition."""
    arms, higher = load("learning-addition.json")["arms"], "0.95"
    late = arms[PRIME]["against_rloo_unfiltered"]["rollouts_to"][higher]
    ends = [seed["final_accuracy"] for arm in arms.values() for seed in arm["seeds"].values()]
    return f"""
Sums of long numbers with a written scratchpad. {_compared("learning-addition.json")}

The {late["pairs"]} runs that reach {higher} need {late["ratio"][0]:.2f} times the rollouts of RLOO on every group, and
all runs end between {min(ends):.2f} and {max(ends):.2f}."""


def chain10() -> str:
    """Chains of ten."""
    return f"\nChains of ten steps instead of six. {_compared('learning-chain10.json')}"


def gentle() -> str:
    """A gentle policy."""
    return f"\nThe quickstart's task at a third of its learning rate. {_compared('learning-gentle.json')}"


def published() -> str:
    """As published."""
    study = load("learning.json")
    ends = {arm: f"{study['arms'][arm]['mean']['final_accuracy']:.3f}" for arm in ("prime", "rloo", "frozen")}
    return f"""
PRIME as published is behind RLOO on the quickstart's task, {ends["prime"]} to {ends["rloo"]} after {study["steps"]}
steps ({len(study["arms"]["prime"]["seeds"])} seeds), and with a frozen PRM, which gets over-optimised, far behind:
{ends["frozen"]}.

{made_by("learning.json")}"""


def credit_forms() -> str:
    """Credit forms."""
    result = load("credit_forms.json")
    prms = {
        "perfect": "a perfect PRM",
        "noisy": "a noisy one",
        "one step late": "one step late",
        "noise": "noise",
        "noise, trusted": "trusted noise",
    }
    names = {
        "RLOO, shrunk 1.5": "RLOO, baseline shrunk by 1.5",
        "published": "`published`",
        "critic": "`critic` (no bias with any PRM)",
        "critic, shrunk 1.5": "`critic`, shrunk by 1.5",
        "pav, k 2": "`pav`, weight 2",
        "lookahead, k 2": "`lookahead`, weight 2",
        "log-odds, w 1": "`odds`, weight 1",
        "log-odds, gate size": "`odds`, gate `size`",
        "td, lambda 0.9": "`td`, lambda 0.9",
    }
    rows = [
        (name, *(f"{result['prms'][prm]['forms'][form]['signal']:.2f}" for prm in prms)) for form, name in names.items()
    ]
    return f"""
Every form against the exact policy gradient of a problem with {result["responses"]} responses: signal of a gradient
estimate (its part along the exact gradient over its noise), relative to RLOO. "Noise" is a PRM that knows nothing,
behind its gate; "trusted" without one.

{made_by("credit_forms.json")}

{table(("", *prms.values()), rows)}"""


def ahead() -> str:
    """One step ahead."""
    result = load("ahead.json")
    arms, runs = result["arms"], result["hardware"]["runs_at_a_time"]

    def told(arm: str) -> str:
        ends = ", ".join(f"{seed['final_accuracy']:.3f}" for seed in arms[arm]["seeds"].values())
        return f"{ends}, the mean over the run {arms[arm]['mean']['mean_accuracy']:.3f}"

    seconds = {arm: f"{arms[arm]['mean']['seconds_per_step']['whole']:.1f} s" for arm in arms}
    return f"""
vLLM, {runs} runs at a time on {result["hardware"]["cores"]} cores. With `rollout.ahead: 1` the final accuracy of the
seeds is {told("ahead")}; without it {told("vllm")}. A step takes {seconds["ahead"]} instead of {seconds["vllm"]}.

{made_by("ahead.json")}"""


def step_labels() -> str:
    """Steps that no label named."""
    seeds = load("credit.json").values()

    def auc(policy: str, prm: str) -> str:
        return ", ".join(f"{seed[policy][prm]:.2f}" for seed in seeds)

    rows = [(policy, auc(policy, "online"), auc(policy, "frozen")) for policy in ("SFT policy", "trained policy")]
    wrong = [seed["trained policy"]["wrong_steps"] for seed in seeds]
    return f"""
No PRM ever saw a step label, yet the log-ratio at a step's result digit tells right from wrong steps. AUC on fresh
responses, a figure a seed:

{table(("responses of", "online PRM", "frozen PRM"), rows)}

Of the trained policy's steps {min(wrong):.0%} to {max(wrong):.0%} are still wrong. Made by
`python -m benchmarks.credit`: {link("credit.json")}."""


def best_of() -> str:
    """Best of n."""
    runs = {name: [load(f"bestofn/{name}-{seed}.json")["eval"] for seed in range(3)] for name in ("sft", "prime")}
    count = max(map(int, runs["sft"][0]["pass"]))

    def shares(name: str, judge: str) -> str:
        return ", ".join(f"{100 * run['best_of'][judge][str(count)][0]:.1f}" for run in runs[name])

    policies = {"sft": "the SFT policy", "prime": "the trained policy"}
    rows = [(policies[name], *(shares(name, judge) for judge in ("prm", "majority", "random"))) for name in policies]
    return f"""
Share of right answers in percent, one figure a seed, of the one picked from {count} answers to each of
{runs["sft"][0]["problems"]} held-out problems.

{table(("answers of", "picked by the online PRM", "majority vote", "chance"), rows)}

Of the trained policy's answers, nearly all right, the PRM picks worse than the majority. Made by
`prime-fast eval SFT --data HELD_OUT --samples 8 --prm RUN --reference SFT`:
[bestofn/](../benchmarks/results/cpu/bestofn)."""
