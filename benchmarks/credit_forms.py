"""Bias, variance and signal of every form of credit, against the exact policy gradient of a small problem.

    python -m benchmarks.credit_forms

A response is of 4 tokens out of 3. Each prefix has one right next token; the outcome is 1 if at most one token of the
response is not the right one. The policy is a softmax with parameters of its own for each of the 40 prefixes, and a PRM
is a table of the 120 prefixes that follow. So the gradient of the mean outcome is known exactly, and the mean of each
form's estimate is too where a response's credit depends on its group through the outcomes alone; the other forms and
the variance come from many batches of 16 groups of 4. No filter, no whitening: those are biases of their own.
In the table ~ marks a bias that is sampled.

bias       |mean estimate - gradient| / |gradient|, beside what Monte Carlo alone would give; exact where it can be
scale      how long the mean estimate is along the gradient, in gradients; direction: the cosine of the two, which is
           what counts behind whitening and Adam
variance   of a batch's estimate, all parameters together, relative to RLOO's
signal     (mean estimate along the gradient)^2 / variance, relative to RLOO's: how many times the rollouts RLOO needs
           for an estimate as sharp; below 0 where it points the wrong way

Slope and drift are what the trainer would fit to four steps of 64 groups of 4 with the gate "evidence"; "trusted" PRMs
have slope 1, whatever they are worth.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import product
from math import comb
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import RESULTS, installed
from prime_fast import calibration
from prime_fast.credit import trusted
from prime_kernels import prime_advantage
from prime_kernels.reference_credit import others_mean

LENGTH, ACTIONS = 4, 3
GROUPS, SAMPLES = 16, 4  # of a batch
SHRINK = 1.5
BETA = 1.0
CERTAIN = 4.0  # a perfect PRM's largest log-odds
FIT_GROUPS = 4 * 64
FORMS = {
    "RLOO": {"credit": "critic", "process_weight": 0.0},
    f"RLOO, shrunk {SHRINK}": {"credit": "critic", "process_weight": 0.0, "shrink": SHRINK},
    "published": {"normalize": "batch"},
    "published, no norm": {"normalize": "none"},
    "critic": {"credit": "critic"},
    f"critic, shrunk {SHRINK}": {"credit": "critic", "shrink": SHRINK},
    "pav, k 2": {"credit": "pav", "process_weight": 2.0},
    "lookahead, k 2": {"credit": "lookahead", "process_weight": 2.0},
    "log-odds, w 1": {"credit": "odds"},
    "log-odds, gate size": {"credit": "odds", "gate": "size"},
    "td, lambda 0.9": {"credit": "td", "gamma": 0.9},
    "td, lambda 0": {"credit": "td", "gamma": 0.0},
}
OF_GROUPS = ("critic", "pav", "lookahead", "td")  # credits that know a group by its outcomes, and no other group
PRMS = ("perfect", "noisy", "one step late", "late", "noise", "noise, trusted", "wrong", "wrong, trusted")


@dataclass(frozen=True)
class Problem:
    """S = ACTIONS**LENGTH responses of LENGTH tokens; P prefixes that have a next token. All float64."""

    tokens: Tensor  # (S, LENGTH) int64
    prefix: Tensor  # (S, LENGTH) int64, of each token, 0..P-1
    policy: Tensor  # (P, ACTIONS) log-probs
    outcome: Tensor  # (S,) 0 or 1

    @property
    def chance(self) -> Tensor:
        """(S,)"""
        return self.policy[self.prefix, self.tokens].sum(1).exp()

    @property
    def mean(self) -> float:
        return float(self.chance @ self.outcome)

    def value(self) -> Tensor:
        """(S, LENGTH): the chance of success after each token."""
        node = self.prefix * ACTIONS + self.tokens
        weight = self.chance[:, None].expand_as(node)
        zeros = torch.zeros(self.policy.numel(), dtype=torch.float64)
        total = zeros.index_add(0, node.flatten(), weight.flatten())
        good = zeros.index_add(0, node.flatten(), (weight * self.outcome[:, None]).flatten())
        return (good / total)[node]

    def gradient(self) -> Tensor:
        """(P * ACTIONS,): of the mean outcome in the policy's logits."""
        advantage = self.outcome[:, None].expand_as(self.tokens)
        return self.estimates(torch.arange(len(self.outcome)), advantage * self.chance[:, None], 1)[0]

    def estimates(self, rows: Tensor, advantage: Tensor, batches: int) -> Tensor:
        """(batches, P * ACTIONS): sum over a batch's rows of advantage (R, LENGTH) * gradient of the log-prob."""
        size = self.policy.numel()
        batch = torch.arange(batches).repeat_interleave(len(rows) // batches)[:, None]
        prefix, value = self.prefix[rows], advantage.reshape(len(rows), LENGTH)
        zeros = torch.zeros(batches * size, dtype=torch.float64)
        taken = zeros.index_add(0, (batch * size + prefix * ACTIONS + self.tokens[rows]).flatten(), value.flatten())
        met = zeros[::ACTIONS].index_add(0, (batch * (size // ACTIONS) + prefix).flatten(), value.flatten())
        return taken.view(batches, size) - (met.view(batches, -1, 1) * self.policy.exp()).view(batches, size)


def make_problem(generator: torch.Generator) -> Problem:
    tokens = torch.tensor(list(product(range(ACTIONS), repeat=LENGTH)))
    prefix = torch.zeros_like(tokens)
    for t in range(1, LENGTH):  # breadth first: the prefixes after prefix p are ACTIONS * p + 1 + token
        prefix[:, t] = ACTIONS * prefix[:, t - 1] + 1 + tokens[:, t - 1]
    prefixes = int(prefix.max()) + 1
    right = torch.randint(ACTIONS, (prefixes,), generator=generator)
    logits = torch.randn(prefixes, ACTIONS, generator=generator, dtype=torch.float64) * 0.5
    logits += F.one_hot(right, ACTIONS)  # the policy is better than chance
    wrong = (tokens != right[prefix]).sum(1)
    return Problem(tokens, prefix, logits.log_softmax(-1), (wrong <= 1).double())


def make_prm(problem: Problem, name: str, generator: torch.Generator) -> Tensor:
    """(S, LENGTH): log-ratio of each token to the reference, in nats; beta * their sum is the PRM's log-odds."""
    kind = name.removesuffix(", trusted")
    known = (problem.value().logit() - torch.tensor(problem.mean).logit()).clamp(-CERTAIN, CERTAIN)
    table = torch.randn(problem.policy.numel(), generator=generator, dtype=torch.float64)
    noise = table[problem.prefix * ACTIONS + problem.tokens]
    delayed = F.pad(known[:, :-1], (1, 0))
    at_the_end = F.pad(known[:, -1:], (LENGTH - 1, 0))
    total = {
        "perfect": known,
        "noisy": known + noise,
        "one step late": delayed,
        "late": at_the_end,
        "noise": noise,
        "wrong": -known,
    }[kind]
    return total.diff(dim=1, prepend=torch.zeros_like(total[:, :1])) / BETA


def sample(problem: Problem, groups: int, generator: torch.Generator) -> Tensor:
    """(groups * SAMPLES,) responses."""
    return torch.multinomial(problem.chance, groups * SAMPLES, replacement=True, generator=generator)


def advantages(problem: Problem, rows: Tensor, ratio: Tensor, fit: calibration.Fit | None, form: dict) -> Tensor:
    """(R, LENGTH), of groups of SAMPLES rows each. fit: None for a PRM that is trusted."""
    form = dict(form)
    credit, gate = form.get("credit", "published"), form.pop("gate", "evidence")
    slope, weight = (1.0, 1.0) if fit is None else trusted(fit, gate, credit)
    if credit != "published":
        form |= {"slope": slope, "drift": fit.drift if fit else 0.0, "prior": problem.mean}
        form["process_weight"] = form.get("process_weight", 1.0) * weight
    q = ratio[rows].flatten()
    result = prime_advantage(
        q,
        torch.zeros_like(q),
        problem.outcome[rows],
        torch.arange(0, len(q) + 1, LENGTH),
        torch.arange(len(rows)) // SAMPLES,
        beta=BETA,
        whiten=False,
        backend="torch",
        **form,
    )
    return result.advantage.view(-1, LENGTH)


def fitted(problem: Problem, ratio: Tensor, generator: torch.Generator) -> calibration.Fit:
    """As prime_fast.credit does it."""
    rows = sample(problem, FIT_GROUPS, generator)
    outcome, groups = problem.outcome[rows], torch.arange(len(rows)) // SAMPLES
    others = [others_mean(outcome, groups, shrink, problem.mean) for shrink in (1.0, 0.0)]
    cu_seqlens = torch.arange(0, LENGTH * len(rows) + 1, LENGTH)
    return calibration.fit([calibration.prefixes(ratio[rows].flatten(), cu_seqlens, None, outcome, *others, BETA)])


def exact(problem: Problem, ratio: Tensor, fit: calibration.Fit | None, form: dict) -> Tensor:
    """(P * ACTIONS,): the mean estimate. Every response beside every number of successes among the others."""
    size, mean = len(problem.outcome), problem.mean
    good, bad = int(problem.outcome.argmax()), int(problem.outcome.argmin())
    rows = torch.tensor(
        [[i, *[good] * hits, *[bad] * (SAMPLES - 1 - hits)] for hits in range(SAMPLES) for i in range(size)]
    )
    first = advantages(problem, rows.flatten(), ratio, fit, form)[::SAMPLES]
    chance = [comb(SAMPLES - 1, hits) * mean**hits * (1 - mean) ** (SAMPLES - 1 - hits) for hits in range(SAMPLES)]
    weight = torch.tensor(chance, dtype=torch.float64)[:, None] * problem.chance
    return problem.estimates(rows[:, 0], first * weight.view(-1, 1), 1)[0]


def sampled(problem, ratio, fit, form, batches: int, generator: torch.Generator) -> Tensor:
    """(batches, P * ACTIONS): estimates of independent batches."""
    rows = sample(problem, batches * GROUPS, generator)
    if form.get("credit") in OF_GROUPS or form.get("normalize") == "none":  # batches do not show: all at once
        advantage = advantages(problem, rows, ratio, fit, form)
    else:
        parts = rows.view(batches, -1)
        advantage = torch.cat([advantages(problem, part, ratio, fit, form) for part in parts])
    return problem.estimates(rows, advantage, batches) / (GROUPS * SAMPLES)


def measure(problem, ratio, fit, form, batches: int, generator: torch.Generator) -> dict[str, float | None]:
    """All relative to the gradient; variance and signal not yet to RLOO's."""
    gradient = problem.gradient()
    size, found = gradient.norm(), sampled(problem, ratio, fit, form, batches, generator)
    variance = found.var(0).sum()
    mean = exact(problem, ratio, fit, form) if form.get("credit") in OF_GROUPS else found.mean(0)
    along = mean @ gradient / size
    return {
        "bias": float((mean - gradient).norm() / size),
        "sampled_bias": float((found.mean(0) - gradient).norm() / size),
        "monte_carlo_error": float((variance / batches).sqrt() / size),
        "exact": form.get("credit") in OF_GROUPS,
        "scale": float(along / size),
        "direction": float(along / mean.norm()),
        "variance": float(variance / size**2),
        "signal": float(along * along.abs() / variance),
    }


def table(problem: Problem, batches: int, seed: int) -> dict[str, dict]:
    """{PRM: {"slope", "evidence", "forms": {form: numbers}}}; the same batches for every form and PRM."""
    result = {}
    for name in PRMS:
        ratio = make_prm(problem, name, torch.Generator().manual_seed(seed + 1))
        fit = None if "trusted" in name else fitted(problem, ratio, torch.Generator().manual_seed(seed + 2))
        forms = {}
        for form, options in FORMS.items():
            forms[form] = measure(problem, ratio, fit, options, batches, torch.Generator().manual_seed(seed + 3))
        base = dict(forms["RLOO"])
        for numbers in forms.values():
            numbers |= {key: numbers[key] / base[key] for key in ("variance", "signal")}
        about = {"slope": 1.0, "evidence": None} if fit is None else {"slope": fit.slope, "evidence": fit.evidence}
        result[name] = about | {"forms": forms}
    return result


def markdown(result: dict[str, dict]) -> str:
    """A row a form, a column a PRM: bias, direction, signal."""
    rows = [["bias / direction / signal", *result], ["---"] * (1 + len(result))]
    for form in FORMS:
        cells = []
        for prm in result.values():
            numbers = prm["forms"][form]
            bias = f"{numbers['bias']:.2f}" if numbers["exact"] else f"~{numbers['bias']:.2f}"
            cells.append(f"{bias} / {numbers['direction']:.2f} / {numbers['signal']:.2f}")
        rows.append([form, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.credit_forms", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / "credit_forms.json")
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    problem = make_problem(torch.Generator().manual_seed(options.seed))
    result = table(problem, options.batches, options.seed)
    document = {
        "command": f"python -m benchmarks.credit_forms --batches {options.batches} --seed {options.seed}",
        "versions": {name: installed(name) for name in ("torch", "prime-fast")},
        "responses": len(problem.outcome),
        "parameters": problem.policy.numel(),
        "mean_outcome": problem.mean,
        "batch": {"groups": GROUPS, "samples": SAMPLES},
        "prms": result,
    }
    text = json.dumps(json.loads(json.dumps(document), parse_float=lambda x: round(float(x), 4)), indent=1)
    options.out.write_text(text + "\n")
    print(f"mean outcome {problem.mean:.3f}\n\n{markdown(result)}")


if __name__ == "__main__":
    main()
