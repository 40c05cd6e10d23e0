"""What is compared: the tasks, and the arms by name."""

from __future__ import annotations

from typing import NamedTuple

CHAINS = "prime_fast.stages.quickstart"
ADDITION = "prime_fast.stages.addition"


class Task(NamedTuple):
    """How a task is made, and what of the quickstart's config is other for it."""

    module: str  # `python -m module OUT_DIR` makes it; has step_labels
    arguments: tuple[str, ...] = ()  # of that command
    overrides: tuple[str, ...] = ()
    start: str | None = None  # the task whose rows and SFT models it shares


TASKS = {
    "chain6": Task(CHAINS),
    "chain10": Task(
        CHAINS,
        ("--chain", "10", "--sft", str(540 * 64)),  # shorter, it does not copy operands reliably
        ("data.max_prompt=32", "rollout.max_response=64", "sft.steps=540"),
    ),
    # a policy so slow that the PRM can run ahead of it
    "gentle": Task(CHAINS, (), ("policy.lr=3.0e-5", "steps=150"), start="chain6"),
    "addition": Task(
        ADDITION,
        ("--sft", str(500 * 64)),
        (f"reward.function={ADDITION}:compute_score", "data.max_prompt=16", "rollout.max_response=56", "sft.steps=500"),
    ),
}


class Arm(NamedTuple):
    label: str
    overrides: tuple[str, ...]
    helper: str | None = None  # the run whose PRM it starts with
    oracle: bool = False  # the PRM's log-ratios are the true labels of the steps


# What every arm adds to, whatever the config says: PRIME as published
PLAIN = (
    *("rollout.keep=[0.2, 0.8]", "prime.credit=published", "prime.process_weight=1", "prime.segment=token"),
    *('prime.separators="\\n"', "prime.gate=evidence"),
    *("prm.lr=1.0e-4", "prm.loss=response", "prm.rows=kept", "prm.passes=1"),
)
BASE = "rloo"
GATED = "prime.gate=evidence"
ODDS = ("prime.credit=odds",)
PAV = ("prime.credit=pav", "prime.process_weight=2", GATED)
STEPS = ("prime.segment=step", 'prime.separators="[,:]"')
VLLM = ("rollout.engine=vllm",)
FORMS = {
    BASE: Arm("RLOO", ("prime.process_weight=0",)),
    "rloo-shrunk": Arm("RLOO, shrunk baseline", ("prime.process_weight=0", "prime.credit=critic", "prime.shrink=1.5")),
    "published": Arm("PRIME as published", ()),
    "critic": Arm("critic", ("prime.credit=critic", GATED)),
    "pav": Arm("pav", PAV),
    "lookahead": Arm("lookahead", ("prime.credit=lookahead", *PAV[1:], *STEPS)),
    "odds": Arm("log-odds, gated by evidence", (*ODDS, GATED)),
    "odds-size": Arm("log-odds, gated by size", (*ODDS, "prime.gate=size")),
    "td": Arm("TD of V, lambda 0.9", ("prime.credit=td", "prime.gamma=[0.9, 1]", GATED)),
    "frozen": Arm("PRIME, frozen PRM", ("prime.update=none",), helper="offline"),
    # of vLLM: does it cost learning that the engine works beside the trainer, or carries groups over?
    "vllm": Arm("PRIME, vLLM", VLLM),
    "ahead": Arm("PRIME, vLLM one step ahead", (*VLLM, "rollout.ahead=1")),
    "carry": Arm("PRIME, vLLM, groups carried", (*VLLM, "rollout.carry=true")),
}
ADDITIONS = {
    "step": Arm("by steps", STEPS),
    "shrunk": Arm("shrunk baseline", ("prime.shrink=1.5",)),
    "fast": Arm("PRM lr 3e-4", ("prm.lr=3.0e-4",)),
    "faster": Arm("PRM lr 1e-3", ("prm.lr=1.0e-3",)),
    "fastest": Arm("PRM lr 1e-2", ("prm.lr=1.0e-2",)),
    # a tenth of the model's parameters; an adapter wants about ten times the learning rate
    "lora": Arm("PRM by LoRA", ("prm.lora.rank=8",)),
    "policy-lora": Arm("policy by LoRA, lr 1e-3", ("policy.lora.rank=8", "policy.lr=1.0e-3")),
    "ungated": Arm("no gate", ("prime.gate=none",)),
    "rebased": Arm("rebased", ("prime.rebase=true",)),
    "prefix": Arm("prefix loss", ("prm.loss=prefix",)),
    "centered": Arm("centered loss", ("prm.loss=centered",)),
    # every verified rollout, three times, at three times the rate
    "keen": Arm("keen PRM", ("prm.loss=centered", "prm.rows=all", "prm.passes=3", "prm.lr=3.0e-4")),
    "all": Arm("PRM on all rollouts", ("prm.rows=all",)),
    "passes": Arm("3 PRM passes", ("prm.passes=3",)),
    "x4": Arm("process weight 4", ("prime.process_weight=4",)),
    "x12": Arm("process weight 12", ("prime.process_weight=12",)),
    "unfiltered": Arm("no group dropped", ("rollout.keep=[0, 1]",)),  # process rewards teach where outcomes are alike
    "warm": Arm("warm PRM", (), helper="warmup"),
    "oracle": Arm("true step labels", ("prime.update=none",), oracle=True),
}
OWN_LOSS = ("prefix", "centered", "keen")
OFFLINE = ("policy.lr=0", "rollout.max_rounds=1", "log.eval_every=0", "log.checkpoint_every=0")
# Runs whose policy stays what SFT made it, for their PRM alone
HELPERS = {
    # as many steps as the online PRM gets, so that the arms differ in whose rollouts a PRM learns from, not in how many
    "offline": Arm("PRM of the frozen arm", OFFLINE),
    # every rollout counts, those of groups that are all right or all wrong as well
    "warmup": Arm("warm start of the PRM", (*OFFLINE, "rollout.keep=[0, 1]", "prm.lr=3.0e-4")),
}
DEFAULT_ARMS = (BASE, "published", "frozen")


def arm(name: str) -> Arm:
    """The arm FORM or FORM+ADDITION+..., a helper likewise; ValueError for another name.

    An arm with a warm PRM that has a loss of its own starts with one that had it too: the helper is warmup+prefix.
    """
    form, *additions = name.split("+")
    known = FORMS | HELPERS
    if form not in known or not set(additions) <= set(ADDITIONS) or len(set(additions)) < len(additions):
        raise ValueError(
            f"there is no arm {name}; give one of {', '.join(FORMS)}, and what is added to it after a +: "
            f"{', '.join(ADDITIONS)}"
        )
    parts = [known[form], *(ADDITIONS[addition] for addition in additions)]
    helpers = [part.helper for part in parts if part.helper]
    if "warm" in additions:
        helpers = ["+".join(["warmup", *(part for part in additions if part in OWN_LOSS)])]
    return Arm(
        ", ".join(part.label for part in parts),
        tuple(override for part in parts for override in part.overrides),
        helpers[0] if helpers else None,
        any(part.oracle for part in parts),
    )
