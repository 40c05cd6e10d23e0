"""From PRM and outcomes to the advantages of a step: the chosen form of credit, calibrated on the steps before."""

from __future__ import annotations

import re
from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor

import prime_kernels
from prime_fast import calibration, prime
from prime_fast.calibration import Fit, Prefixes
from prime_fast.config import PrimeConfig
from prime_fast.engine.batch import Batch
from prime_kernels.reference_credit import others_mean, step_ends

WINDOW = 4  # steps whose rollouts calibrate the next one
SHARES = (0.25, 0.5, 0.75)  # of a response, at which the PRM's explained variance is measured
LIKELY = 0.01  # a mean outcome is taken to lie this far from 0 and 1


class Credit:
    """Advantages, and what they need of earlier steps. Every rank holds the same.

    tokenizer: for prime.separators given as a regular expression.
    """

    def __init__(self, config: PrimeConfig, tokenizer: Any) -> None:
        self.config = config
        self.window: deque[Prefixes] = deque(maxlen=WINDOW)
        self.fit = Fit()
        self.separators = separators(config.separators, tokenizer) if config.segment == "step" else None

    def advantage(
        self, batch: Batch, prm_logprob: Tensor | None, ref_logprob: Tensor | None, device: torch.device
    ) -> tuple[Tensor, dict[str, Any]]:
        """(T,) float32, and metrics. prm_logprob, ref_logprob: (T,), both None without a PRM.

        The PRM's scores are from before its update on the same rows, and its calibration is that of earlier steps:
        nothing that a row's outcome has moved enters its own process reward.
        """
        step = self.steps(batch)
        p, (slope, trust) = self.config, trusted(self.fit, self.config.gate, self.config.credit)
        cu_seqlens = batch.cu_seqlens.to(device)
        prm, ref, form = prm_logprob, ref_logprob, {"estimator": p.estimator, "form": p.form, "normalize": p.normalize}
        if p.credit != "published":
            form = {"credit": p.credit, "shrink": p.shrink, "prior": _prior(self.fit), "slope": slope}
            form |= {"drift": self.fit.drift, "step": None if step is None else step.to(device)}
        elif prm is not None and p.granularity == "whole":
            prm = prime.on_last_token(prm - ref, cu_seqlens)
            ref = torch.zeros_like(prm)
        combine = partial(
            prime_kernels.prime_advantage,
            prm,
            ref,
            batch.outcome.to(device),
            cu_seqlens,
            batch.group.to(device),
            beta=p.beta,
            gamma=p.gamma[0],
            outcome_gamma=p.gamma[1],
            **form,
        )
        weights = {"process_weight": p.process_weight * trust, "outcome_weight": p.outcome_weight}
        result = combine(**weights, whiten=p.whiten)
        record: dict[str, Any] = {}
        if prm_logprob is not None:
            parts = (combine(**weights | {none: 0.0}, whiten=False).advantage for none in reversed(weights))
            process, outcome = (part.square().mean().sqrt() for part in parts)
            record |= {
                "process_over_outcome": float(process / outcome) if outcome > 0 else None,
                "process_reward_mean": float(result.token_reward.mean()),
                "process_reward_std": float(result.token_reward.std()),
            }
            record |= self._learn(batch, (prm_logprob - ref_logprob).cpu(), step)
        elif p.shrink:  # towards the mean outcome of the steps before
            self._learn(batch, torch.zeros(int(batch.cu_seqlens[-1])), step)
        return result.advantage, record

    def steps(self, batch: Batch) -> Tensor | None:
        """(T,) int32: the number of each token's step in its response; None where every token is a step."""
        return None if self.separators is None else step_numbers(batch, self.separators)

    def value(self, batch: Batch, log_ratio: Tensor, fit: Fit) -> Tensor:
        """(T,) float64: the chance of success after each token, which is V of the last step that it ends or follows.

        As `fit` calibrates it, whether the form of credit uses it or not; log_ratio (T,) float, on the CPU. NaN where
        outcomes are not in 0..1, for then there is no such chance.
        """
        step, cu_seqlens = self.steps(batch), batch.cu_seqlens.long()
        totals, steps = calibration.step_totals(self.config.beta * log_ratio.double(), cu_seqlens, step)
        shrink, (slope, _) = max(1.0, self.config.shrink), trusted(fit, self.config.gate, self.config.credit)
        others = others_mean(batch.outcome.double(), batch.group, shrink, _prior(fit))
        row = torch.repeat_interleave(steps.diff())
        number = torch.arange(len(totals)) - steps[row] + 1.0
        after = calibration.value(totals, number, others[row], fit._replace(slope=slope))
        ended = step_ends(step, cu_seqlens, len(log_ratio))[0].cumsum(0)  # steps, in all rows up to the token
        row = torch.repeat_interleave(cu_seqlens.diff())
        return torch.where(ended > steps[row], after[(ended - 1).clamp(min=0)], others[row])

    def state_dict(self) -> dict[str, Any]:
        return {"window": [prefixes._asdict() for prefixes in self.window]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.window = deque((Prefixes(**prefixes) for prefixes in state["window"]), maxlen=WINDOW)
        self.fit = calibration.fit(self.window)

    def _learn(self, batch: Batch, log_ratio: Tensor, step: Tensor | None) -> dict[str, Any]:
        """How good the PRM was on this step by the calibration of those before; then add the step to them."""
        outcome, prior = batch.outcome.double(), _prior(self.fit)
        baseline = others_mean(outcome, batch.group, self.config.shrink, prior)
        others = others_mean(outcome, batch.group, max(1.0, self.config.shrink), prior)
        cu_seqlens, beta = batch.cu_seqlens.long(), self.config.beta
        seen = calibration.prefixes(log_ratio, cu_seqlens, step, outcome, others, baseline, beta)
        slope, weight = trusted(self.fit, self.config.gate, self.config.credit)
        used = self.fit._replace(slope=slope)
        record: dict[str, Any] = {"prm_slope": slope, "prm_gate": self.fit.evidence}
        if self.config.credit == "odds":
            record |= {"prm_gate": self.fit.step_evidence, "prm_step_weight": weight}
        variance = float((outcome - baseline).square().mean())
        if variance > 0:
            totals, steps = calibration.step_totals(log_ratio.double(), cu_seqlens, step)
            for share in SHARES:
                found = calibration.expected_at(share, beta * totals, steps, others, baseline, used)
                unexplained = float((outcome - found).square().mean())
                record[f"prm_explained_{100 * share:.0f}"] = 1 - unexplained / variance
        if len(seen.weight):
            record["prm_calibration_error"] = calibration.calibration_error(seen, used)
        self.window.append(seen)
        self.fit = calibration.fit(self.window)
        return record


def _prior(fit: Fit) -> float:
    return min(1 - LIKELY, max(LIKELY, fit.mean))


def trusted(fit: Fit, gate: str, credit: str) -> tuple[float, float]:
    """The slope to use, and what process_weight is multiplied with.

    gate "evidence": the slope as far as it is sure, and none while it explains nothing; "size", of "odds": the effect
    on the outcome in the place of the outcomes' spread.
    """
    sure, step_sure = (1.0, 1.0) if gate == "none" else (fit.evidence * (fit.explained > 0), fit.step_evidence)
    size = fit.step_effect if gate == "size" else fit.spread
    return fit.slope * sure, size * step_sure if credit == "odds" else 1.0


def separators(pattern: str | list[int], tokenizer: Any) -> Tensor:
    """(V,) bool: the tokens that end a step: those whose text holds the regular expression, or of these ids."""
    size = len(tokenizer)
    chosen = torch.zeros(size, dtype=torch.bool)
    if isinstance(pattern, str):
        texts = tokenizer.batch_decode([[i] for i in range(size)])
        chosen[[i for i, text in enumerate(texts) if re.search(pattern, text)]] = True
        if not chosen.any():
            raise ValueError(f"prime.separators={pattern!r} matches no token of this vocabulary; give another pattern")
        return chosen
    if wrong := [i for i in pattern if i >= size]:
        raise ValueError(f"prime.separators={wrong[0]} is not in the vocabulary of {size} tokens")
    chosen[pattern] = True
    return chosen


def step_numbers(batch: Batch, separators: Tensor) -> Tensor:
    """(T,) int32: the number of each token's step in its response; a separator is the last token of its step."""
    tokens, starts = torch.cat(batch.responses), batch.cu_seqlens[:-1].long()
    begins = torch.nn.functional.pad(separators[tokens.clamp(max=len(separators) - 1)][:-1], (1, 0))
    begins[starts] = False
    count = begins.long().cumsum(0)
    return (count - count[starts].repeat_interleave(batch.cu_seqlens.diff().long())).int()
