"""(b) the published dataflow, on the same ZeRO-3 engine: [P] "after" (8 forward units a row) and [R] "before" (13).

[P] is PRIME-RL/PRIME 18ad596f, [R] the refactor verl-recipe 48ea0a79; written anew from a description of what they
compute and in which order. Policy passes run one row a micro-batch, padded to the longest prompt and the longest
response of the batch (they pad to the longest allowed), with full logits in float32 and, in the update, an entropy
that no loss uses. PRM rows have their padding stripped; the reference's have it in [P] too, not in [R], which also
makes a pass for a KL that it never applies, scores again after the update, reference included, and recomputes the
forward in every backward (gradient checkpointing). Token scores and returns are Python loops over rows, groups and
tokens. Where the two differ in numbers (token scores, coefficients) [P]'s are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks import advantage_loops
from benchmarks.step.ours import STEP, configuration
from benchmarks.step.workload import K
from prime_fast import passes
from prime_fast.config import OptimizerConfig
from prime_fast.engine import zero
from prime_fast.engine.batch import Batch, Group
from prime_fast.metrics import Phases


class PaddedLM(nn.Module):
    """Log-probs of responses from logits over the whole vocabulary."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, ids: Tensor, mask: Tensor, width: int, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """ids, mask (B, P + width), responses last -> log-probs and entropy (B, width), float32."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.lm(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        logits = logits[:, -width - 1 : -1].float()
        logprob = logits.log_softmax(-1).gather(2, ids[:, -width:, None])[..., 0]
        if not entropy:
            return logprob, None
        return logprob, logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


class PaddedEngine(zero.Engine):
    wrap = PaddedLM


class Rows(NamedTuple):
    """A micro-batch: prompts padded on the left, responses on the right."""

    ids: Tensor  # (B, P + T)
    mask: Tensor  # (B, P + T)
    response: Tensor  # (B, T) float32: 1 on response tokens

    @classmethod
    def of(cls, batch: Batch, rows: list[int], prompt: int, width: int, device: torch.device) -> Rows:
        ids = torch.ones(len(rows), prompt + width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(rows):
            start, end = prompt - len(batch.prompts[row]), prompt + len(batch.responses[row])
            ids[line, start:end] = torch.cat([batch.prompts[row], batch.responses[row]])
            mask[line, start:end] = 1
        return cls(ids.to(device), mask.to(device), mask[:, prompt:].float().to(device))


class Published:
    """variant: "PRIME, after", "PRIME, before" or "RLOO"."""

    def __init__(self, settings: dict[str, Any], variant: str) -> None:
        self.device = zero.start()
        self.prime, self.before = variant.startswith("PRIME"), variant.endswith("before")
        config = self.config = configuration(settings, prm=self.prime)
        if self.before:
            config.model.recompute = "all"
        folder = Path(settings["folder"])

        def engine(role: str, path: str, optimizer: OptimizerConfig | None) -> PaddedEngine:
            return PaddedEngine(role, str(folder / path), config.model, config.engine, optimizer, self.device)

        self.policy = engine("policy", "policy", config.policy)
        if self.prime:
            self.prm, self.reference = engine("prm", "prm", config.prm), engine("reference", "policy", None)

    def step(self, groups: list[Group]) -> tuple[Phases, dict[str, float]]:
        batch, phases, found = Batch.of(groups), Phases(), {}
        config, budget = self.config, self.config.engine.micro_tokens
        shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + STEP)  # the trainer's: the same mini-batches
        minis = rows_of(passes.split(batch, config.policy.mini_batch, budget, shuffle))
        self.prompt = max(map(len, batch.prompts))
        self.width = max(map(len, batch.responses))
        with phases("old_logprobs"):
            old = self.logprobs(self.policy, batch)
        prm = ref = torch.cat([old[row, :length] for row, length in enumerate(map(len, batch.responses))])
        if self.prime:
            if self.before:
                with phases("reference"):  # of a KL that is not applied
                    self.logprobs(self.reference, batch)
            prm, ref = self.train_prm(batch, rows_of(passes.split(batch, config.prm.mini_batch, budget)), phases, found)
            if self.before:
                with phases("prm"):
                    prm = flat(batch, {row: self.stripped(self.prm, batch, row) for row in range(len(old))})
                with phases("reference"):
                    ref = self.flat_padded(self.logprobs(self.reference, batch), batch)
        with phases("advantage"):
            scored = scores(prm.cpu(), ref.cpu(), batch)
            advantage = advantage_loops.padded(scored, torch.zeros_like(scored), batch.outcome, batch.cu_seqlens, K)
        with phases("policy"):
            self.train_policy(batch, minis, old, advantage, found)
        return phases, found

    @torch.no_grad()
    def logprobs(self, engine: PaddedEngine, batch: Batch) -> Tensor:
        """(R, T) of all rows, padded, one after another."""
        return torch.cat([engine.deepspeed(rows.ids, rows.mask, self.width)[0] for _, rows in self.micros(batch)])

    def micros(self, batch: Batch, chosen: list[int] | None = None) -> Iterator[tuple[int, Rows]]:
        for row in range(len(batch.responses)) if chosen is None else chosen:
            yield row, Rows.of(batch, [row], self.prompt, self.width, self.device)

    @torch.no_grad()
    def stripped(self, engine: PaddedEngine, batch: Batch, row: int) -> Tensor:
        return self.run_stripped(engine, batch, row)

    def run_stripped(self, engine: PaddedEngine, batch: Batch, row: int) -> Tensor:
        """(L,) of one row without its padding."""
        prompt, length = len(batch.prompts[row]), len(batch.responses[row])
        rows = Rows.of(batch, [row], prompt, length, self.device)
        return engine.deepspeed(rows.ids, rows.mask, length)[0][0]

    def flat_padded(self, values: Tensor, batch: Batch) -> Tensor:
        return torch.cat([values[row, : len(response)] for row, response in enumerate(batch.responses)])

    def train_prm(
        self, batch: Batch, minis: list[list[int]], phases: Phases, found: dict[str, float]
    ) -> tuple[Tensor, Tensor]:
        """The log-probs (T,) of PRM and reference that the PRM was trained with."""
        prm, ref, losses, norms = {}, {}, [], []
        for mini in minis:
            total = 0.0
            for row in mini:
                with phases("reference"), torch.no_grad():
                    if self.before:
                        padded = Rows.of(batch, [row], self.prompt, self.width, self.device)
                        whole = self.reference.deepspeed(padded.ids, padded.mask, self.width)[0][0]
                        ref[row] = whole[: len(batch.responses[row])]
                    else:
                        ref[row] = self.stripped(self.reference, batch, row)
                with phases("prm"):
                    logprob = self.run_stripped(self.prm, batch, row)
                    chance = (self.config.prime.beta * (logprob - ref[row]).sum()).sigmoid()
                    loss = F.binary_cross_entropy(chance, batch.outcome[row].to(self.device)) / len(mini)
                    self.prm.backward(loss)
                    prm[row] = logprob.detach()
                    total += float(loss.detach())
            with phases("prm"):
                norms.append(self.prm.step(self.config.prm.lr).grad_norm)
            losses.append(total)
        found |= {"prm_loss": sum(losses) / len(losses), "prm_grad_norm": sum(norms) / len(norms)}
        return flat(batch, prm), flat(batch, ref)

    def train_policy(
        self, batch: Batch, minis: list[list[int]], old: Tensor, advantage: Tensor, found: dict[str, float]
    ) -> None:
        config, losses, norms = self.config.policy, [], []
        low, high = config.clip
        offsets = batch.cu_seqlens.tolist()
        for mini in minis:
            total = 0.0
            for row, rows in self.micros(batch, mini):
                logprob, entropy = self.policy.deepspeed(rows.ids, rows.mask, self.width, True)
                gain = torch.zeros_like(logprob)
                length = offsets[row + 1] - offsets[row]
                gain[0, :length] = advantage[offsets[row] : offsets[row + 1]].to(self.device)
                ratio = (logprob - old[row]).exp()
                token = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - low, 1 + high))
                tokens = rows.response.sum()
                loss = (token * rows.response).sum() / tokens - 0.0 * (entropy * rows.response).sum() / tokens
                loss = loss / len(mini)
                self.policy.backward(loss)
                total += float(loss.detach())
            norms.append(self.policy.step(config.lr).grad_norm)
            losses.append(total)
        found |= {"policy_loss": sum(losses) / len(losses), "policy_grad_norm": sum(norms) / len(norms)}

    def close(self) -> None:
        pass


def rows_of(minis: list[passes.MiniBatch]) -> list[list[int]]:
    """The rows of each mini-batch, one after another as the published loaders yield them."""
    return [[row for ranks in mini for share in ranks for row in share] for mini in minis]


def flat(batch: Batch, by_row: dict[int, Tensor]) -> Tensor:
    return torch.cat([by_row[row] for row in range(len(batch.responses))])


def scores(prm: Tensor, ref: Tensor, batch: Batch) -> Tensor:
    """(T,) log-ratios, handed on token by token."""
    ratio, found = prm - ref, torch.zeros_like(prm)
    offsets = batch.cu_seqlens.tolist()
    for row in range(len(offsets) - 1):
        for t in range(offsets[row], offsets[row + 1]):
            found[t] = ratio[t]
    return found
