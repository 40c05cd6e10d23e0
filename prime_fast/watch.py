"""What goes wrong in a run, told when it begins and when it ends: conditions on the metrics of its steps.

A watcher measures one metric against a limit. It begins after so many steps in a row on the wrong side, and ends after
CALM on the right one. What healthy learning does too (certainty where the task is solved, longer responses that score
higher, no group left to learn from at the end) is excused. docs/watching.md says what each means and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from prime_fast.config import Config

WINDOW = 20  # steps that a mean or a median is of
CALM = 3  # steps in a row on the right side that end an alarm
LEVEL = 3  # steps whose median is the outcome as it stands
SOLVED = 0.9  # mean outcome from which on certainty is what was wanted
LEFT = 0.3  # share of the first step's failures: with fewer left, entropy is low because the task is nearly solved
GAIN = 0.05  # above the outcome of the first step: more than noise
LOST = 0.8  # of the best level so far: an outcome below that has fallen
MAD_TO_SIGMA = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
# standard deviation of a norm's logarithm: where norms hardly differ, a small step up is no spike; where they differ
# much, as they drift in a run's first steps, a thousandfold is one all the same
NARROWEST, WIDEST = 0.2, 0.6
LIKED = 0.5  # correlation of length and outcome from which on it is the length that pays
EARNS = 0.1  # share of the outcomes' variance that a PRM explains which may weigh more than they do
FAILURES = ("reward_errors", "reward_timeouts", "reward_crashes")


class History:
    """The watched metrics: at the start of the run, of the last WINDOW steps, and of the step that is looked at."""

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.recent: dict[str, list[float]] = {}  # the newest last, this step's included
        self.now: dict[str, float] = {}
        self.best = 0.0  # level of the outcome

    def add(self, record: Mapping[str, Any]) -> None:
        seen = {key: record.get(key) for key in METRICS}
        failures = [record.get(key) for key in FAILURES]
        if None not in failures:
            seen["reward_failures"] = sum(failures)
        self.now = {key: float(x) for key, x in seen.items() if isinstance(x, int | float) and math.isfinite(x)}
        self.first = self.now | self.first
        for key, value in self.now.items():
            self.recent[key] = [*self.recent.get(key, []), value][-WINDOW:]
        if "outcome" in self.now:
            self.best = max(self.best, self.outcome)

    @property
    def outcome(self) -> float:
        return median(self.recent.get("outcome", [0.0])[-LEVEL:])


Measure = Callable[[History, str], tuple[float, str] | None]  # the number and what it is; None: not known in this step


def now(history: History, key: str) -> tuple[float, str] | None:
    value = history.now.get(key)
    return None if value is None else (value, f"{key} is {value:.3g}")


def over_start(history: History, key: str) -> tuple[float, str] | None:
    value, start = history.now.get(key), history.first.get(key)
    if value is None or not start:
        return None
    return value / start, f"{key} is {value:.3g}, {value / start:.2g} times the {start:.3g} at the start"


def over_best(history: History, key: str) -> tuple[float, str] | None:
    """Of the outcome, which alone has a best."""
    if key not in history.now or not history.best:
        return None
    share = history.outcome / history.best
    return share, f"{key} is {history.outcome:.3g}, {share:.2g} times its best, {history.best:.3g}"


def mean(history: History, key: str) -> tuple[float, str] | None:
    return _of_window(history, key, fmean, "mean")


def typical(history: History, key: str) -> tuple[float, str] | None:
    """Of what has no bound where outcomes hardly differ, for which one such step outweighs all others in a mean."""
    return _of_window(history, key, median, "median")


def _of_window(history: History, key: str, of: Callable, name: str) -> tuple[float, str] | None:
    recent = history.recent.get(key, [])
    if key not in history.now or len(recent) < WINDOW:
        return None
    value = of(recent)
    return value, f"{key} is {value:.3g} in the {name} of {WINDOW} steps"


def deviations(history: History, key: str) -> tuple[float, str] | None:
    """Of the newest value from the median of those before it, in robust standard deviations; all of the logarithm,
    for norms differ by factors."""
    *before, value = history.recent.get(key, [0.0])
    if key not in history.now or len(before) < WINDOW // 2 or not all((value, *before)):
        return None
    logs = [math.log(x) for x in before]
    middle = median(logs)
    spread = min(max(MAD_TO_SIGMA * median(abs(x - middle) for x in logs), NARROWEST), WIDEST)
    found, usual = (math.log(value) - middle) / spread, math.exp(middle)
    return found, f"{key} is {value:.3g} after a median of {usual:.3g}, {found:.3g} robust deviations of its logarithm"


def solves(history: History) -> bool:
    return 1 - history.outcome <= max(1 - SOLVED, LEFT * (1 - history.first.get("outcome", 0.0)))


def rewarded(history: History) -> bool:
    """The policy has become another one, and a better one."""
    return history.outcome > max(history.first.get("outcome", 0.0) + GAIN, LOST * history.best)


def rewarded_though_short(history: History) -> bool:
    return rewarded(history) and length_pays(history) > -LIKED


def rewarded_though_long(history: History) -> bool:
    return rewarded(history) and length_pays(history) < LIKED


def length_pays(history: History) -> float:
    """By the last steps in which lengths and outcomes differed: once all responses are as the reward likes, none do."""
    return median(history.recent.get("length_correlation", [0.0])[-LEVEL:])


def has_learnt(history: History) -> bool:
    """Nothing is left to tell the responses to a prompt apart by, but there was."""
    return solves(history) and history.first.get("outcome", 0.0) < SOLVED


def explains(history: History) -> bool:
    return median(history.recent.get("prm_explained_75", [0.0])) >= EARNS


class Watcher(NamedTuple):
    metric: str
    measure: Measure
    side: str  # on which side of the limit it is wrong: "above", or "at most"
    limit: float  # watch.limits takes another
    advice: str  # the likely cause, and the fix
    excuse: Callable[[History], bool] | None = None
    steps: int = 3  # in a row, before it begins

    def wrong(self, value: float, limit: float) -> bool:
        return value > limit if self.side == "above" else value <= limit


WATCHERS = {
    "outcome_fall": Watcher(
        "outcome", over_best, "at most", 0.5,
        "the policy has unlearnt what it could; go back to a checkpoint of before and lower policy.lr, or set "
        "policy.kl_coef=0.001",
    ),
    "entropy_collapse": Watcher(
        "entropy", over_start, "at most", 0.1,
        "the policy stops exploring before it solves the task, mostly for a policy.lr that is too high; lower it, "
        "raise policy.clip's second number (0.28), or set policy.entropy_coef=0.001",
        solves,
    ),
    "entropy_explosion": Watcher(
        "entropy", over_start, "above", 3.0,
        "updates push the policy towards noise; lower policy.lr or policy.entropy_coef, or set policy.kl_coef=0.001",
        rewarded,
    ),
    "length_collapse": Watcher(
        "response_length", over_start, "at most", 0.33,
        "the policy breaks off, or the reward likes it short (length_correlation is near -1); read samples.jsonl, then "
        "mend reward.function or lower policy.lr",
        rewarded_though_short,
    ),
    "length_explosion": Watcher(
        "response_length", over_start, "above", 3.0,
        "responses ramble or repeat themselves, or the reward likes them long (length_correlation is near 1); read "
        "samples.jsonl, then mend reward.function, lower policy.lr or set policy.kl_coef=0.001",
        rewarded_though_long,
    ),
    "truncation": Watcher(
        "truncated", now, "above", 0.5,
        "most responses are cut off before they can answer; raise rollout.max_response, or leave them "
        "out with rollout.filter_truncated=true",
    ),
    "policy_kl": Watcher(
        "approx_kl", now, "above", 0.05,
        "a step moves the policy further than policy.clip is meant to allow; lower policy.lr or policy.epochs, or "
        "raise policy.mini_batch",
        steps=2,
    ),
    "reference_kl": Watcher(
        "reference_kl", now, "above", 0.5,
        "the policy has left its reference with nothing to show for it; lower policy.lr, or set policy.kl_coef=0.001",
        rewarded,
    ),
    "mismatch": Watcher(
        "mismatch_kl", now, "above", 0.01,
        "the engine samples from other probabilities than the trainer computes; take quantisation and low-precision "
        "caches out of rollout.vllm, and leave rollout.importance_cap on",
    ),
    "prm_chance": Watcher(
        "prm_pair_accuracy", mean, "at most", 0.5,
        "the PRM does not tell right responses from wrong ones, so its rewards are noise; raise prm.lr, set "
        "prm.loss=centered and prm.rows=all, or do without it (prime.process_weight=0)",
        steps=1,
    ),
    "prm_misleads": Watcher(
        "prm_explained_75", now, "at most", -0.02,
        "the PRM's value of a prefix is further from the outcome than the baseline alone; set prime.gate=evidence, "
        "lower prime.process_weight, or train the PRM more (prm.loss, prm.rows, prm.passes)",
    ),
    "few_groups": Watcher(
        "groups_kept", now, "at most", 0.05,
        "hardly any prompt has a mean outcome within rollout.keep, so steps cost many rollouts and teach little; give "
        "easier or harder rows (outcome tells which), more rollout.samples, or a wider rollout.keep",
        has_learnt,
    ),
    "reward_failures": Watcher(
        "reward_failures", now, "above", 0.2,
        "the reward raises, runs out of time or crashes on that share of the responses, which then score 0; mend "
        "reward.function (reward_errors, reward_timeouts and reward_crashes tell which), or raise reward.timeout",
        steps=2,
    ),
    "reward_constant": Watcher(
        "outcome_std", now, "at most", 0.0,
        "every response gets the same outcome, from which nothing is learnt; if it was never otherwise, compare "
        "samples.jsonl with the rows' answers, then mend reward.function or give other rows",
        has_learnt,
        steps=2,
    ),
    "policy_grad_spike": Watcher(
        "policy_grad_norm", deviations, "above", 10.0,
        "a batch pulls the policy unlike any before; policy.grad_clip bounds it, but where the outcome falls "
        "afterwards go back to a checkpoint and lower policy.lr",
        steps=1,
    ),
    "prm_grad_spike": Watcher(
        "prm_grad_norm", deviations, "above", 10.0,
        "a batch pulls the PRM unlike any before; prm.grad_clip bounds it, but where prm_pair_accuracy falls "
        "afterwards lower prm.lr",
        steps=1,
    ),
    "process_dominates": Watcher(
        "process_over_outcome", typical, "above", 2.0,
        "the process reward drowns the outcomes though the PRM explains little of them; lower prime.process_weight, or "
        "take a prime.credit that is calibrated",
        explains,
        steps=1,
    ),
}  # fmt: skip
METRICS = {watcher.metric for watcher in WATCHERS.values()} | {"length_correlation"}


class Change(NamedTuple):
    name: str
    step: int
    began: bool  # or ended
    told: str


class Watch:
    """Looks at the record of every step, in their order. limits: by name, of those that are to look (`limits_of`)."""

    def __init__(self, limits: Mapping[str, float]) -> None:
        self.limits = limits
        self.history = History()
        self.on: dict[str, int] = {}  # the step in which it began
        self.streak: dict[str, int] = {}  # steps in a row that speak against what it is now

    def look(self, record: dict[str, Any]) -> list[Change]:
        """What began or ended with this step; the record gets `watch/NAME`: 1 for all that are on."""
        self.history.add(record)
        changes = [change for name in self.limits if (change := self._look(name, record["step"]))]
        record |= {f"watch/{name}": 1 for name in self.on}
        return changes

    def state_dict(self) -> dict[str, Any]:
        return deepcopy({"history": vars(self.history), "on": self.on, "streak": self.streak})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self.history).update(deepcopy(state["history"]))
        self.on, self.streak = (
            {name: value for name, value in state[key].items() if name in self.limits} for key in ("on", "streak")
        )

    def _look(self, name: str, step: int) -> Change | None:
        watcher, limit, on = WATCHERS[name], self.limits[name], name in self.on
        measured = watcher.measure(self.history, watcher.metric)
        if measured is None:
            return None
        value, what = measured
        wrong = watcher.wrong(value, limit) and not (watcher.excuse and watcher.excuse(self.history))
        self.streak[name] = self.streak.get(name, 0) + 1 if wrong != on else 0
        if self.streak[name] < (CALM if on else watcher.steps):
            return None
        self.streak[name] = 0
        if on:
            told = f"watch: {name} of step {self.on.pop(name)} ended in step {step}: {what} (limit {limit:g})"
            return Change(name, step, False, told)
        self.on[name] = step
        state = f"{what} (limit {limit:g}), the outcome {self.history.outcome:.2f}"
        return Change(name, step, True, f"watch: {name} began in step {step}: {state}; {watcher.advice}")


def limits_of(config: Config) -> dict[str, float]:
    """By name, of the watchers that mean something in this run and are not turned off."""
    top_p = config.rollout.top_p
    found: dict[str, float | None] = {name: watcher.limit for name, watcher in WATCHERS.items()}
    found["mismatch"] += top_p - 1 - math.log(top_p)  # the engine's log-probs are of the nucleus, higher by so much
    found |= config.watch.limits
    if config.prime.credit == "published":
        found["prm_misleads"] = None  # V is not used
    return {name: limit for name, limit in found.items() if limit is not None}


def replay(records: Iterable[dict[str, Any]], limits: Mapping[str, float]) -> list[Change]:
    """What a watch tells of a whole run, from its metrics.jsonl."""
    watch = Watch(limits)
    return [change for record in records if record["step"] > 0 for change in watch.look(dict(record))]
