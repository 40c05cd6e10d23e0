"""The passes of a step, and the seconds of one: matrix products, attention, LM head, and ZeRO-3's traffic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from prime_fast.config import Config
from prime_fast.engine.recompute import Recompute
from prime_fast.memory.shapes import Shape
from prime_fast.speed.rates import Rates

OPTIMIZER_BYTES = 40  # a parameter: gradient read for its norm and again; master, two moments in and out; weight out
HEAD = 3  # matrix products of the LM head that trains: its gradients come out of its forward, nothing is redone


KEPT, EVERY = "kept responses", "every response"


class Pass(NamedTuple):
    phase: str  # of the trainer's stopwatch
    what: str
    rows: str  # KEPT or EVERY
    units: float  # forwards: a backward is 2, and recomputed layers are one more
    steps: int = 0  # optimizer steps on kept responses
    trains: bool = False
    kept: float = 0.0  # of the units, those that attention is spared because its outputs are kept
    spared: float = 0.0  # of the units, those that the layers are spared because their weights are frozen


def passes_per_step(config: Config, recompute: Mapping[str, Recompute]) -> list[Pass]:
    """recompute: of each trained model, by its role."""

    def trained(role: str, what: str, rows: str, steps: int, runs: int = 1) -> Pass:
        found = recompute[role]
        again = runs * found.layers / found.of
        spared = float(runs) if getattr(config, role).lora else 0.0  # half of a backward: the weights' gradients
        made = f"{what} forward and backward, {steps} optimizer steps"
        made += " and those of dropped groups" if rows == EVERY else ""
        return Pass(role, made, rows, 3.0 * runs + again, steps, True, again if found.attention else 0.0, spared)

    steps = {
        name: max(1, round(config.rollout.prompts * config.rollout.samples / section.mini_batch))
        for name, section in (("policy", config.policy), ("prm", config.prm))
    }
    judged = EVERY if config.uses_prm and config.prm.rows == "all" else KEPT
    rows = [Pass("generate", "generate (and sync weights once)", EVERY, 1.0)]
    if config.uses_reference:
        rows.append(Pass("reference", "reference forward", judged, 1.0))
    policy_reference = config.uses_prm and config.prime.reference == "policy"
    if policy_reference:
        rows.append(Pass("reference", "policy forward: the PRM's reference", judged, 1.0))
    if config.uses_prm:
        if config.prime.update == "none":
            rows.append(Pass("prm", "PRM forward", KEPT, 1.0))
        else:
            runs = config.prm.passes
            rows.append(trained("prm", "PRM", judged, runs * steps["prm"], runs))
        if config.prime.update == "before":
            rows.append(Pass("prm", "PRM forward again, after its update", KEPT, 1.0))
    reused = policy_reference and config.rollout.temperature == 1
    spared = {"recompute": 0, "update": 1, "engine": steps["policy"]}[config.rollout.old_logprobs]
    if spared < steps["policy"] and not reused:
        rows.append(Pass("old_logprobs", "policy forward: old log-probs", KEPT, 1.0 - spared / steps["policy"]))
    epochs = config.policy.epochs
    rows.append(trained("policy", "policy", KEPT, epochs * steps["policy"], epochs))
    return rows


@dataclass(frozen=True)
class Rows:
    """What a pass runs over, on all ranks together."""

    count: int
    tokens: float  # fed
    squares: float  # sum of the squares of the rows' tokens
    responses: float  # response tokens

    @classmethod
    def of(cls, prompt: float, responses: tuple[float, ...], count: int) -> Rows:
        """`count` rows whose responses have the given lengths in equal shares."""
        fed = [prompt + response for response in responses]
        share = count / len(responses)
        return cls(count, share * sum(fed), share * sum(n * n for n in fed), share * sum(responses))


@dataclass(frozen=True)
class Machine:
    """One model on its ranks."""

    shape: Shape
    rates: Rates
    ranks: int
    node: int = 8  # ranks that share fast links
    width: int = 2  # bytes a parameter in the forward, and a gradient on its way
    offload: bool = False  # parameters and optimizer states rest in host memory
    sequence_parallel: int = 1  # ranks that hold a micro-batch together
    trained: int | None = None  # parameters that train, if not all
    fused_layers: bool = False

    @property
    def products(self) -> int:
        """Parameters that every token is multiplied with: not the embedding, nor the LM head."""
        return max(1, self.shape.count - self.shape.head * (1 if self.shape.tied else 2))

    @property
    def trains(self) -> int:
        return self.shape.count if self.trained is None else self.trained

    @property
    def flops(self) -> float:
        return self.rates.flops(self.width == 4)

    def forward_flops(self, rows: Rows) -> dict[str, float]:
        """Of one forward over the rows: 2 N n + 2 H L n^2 as in packing.work, and the head on response tokens."""
        shape = self.shape
        return {
            "layers": 2 * self.products * rows.tokens,
            "attention": 2 * shape.heads * shape.head_size * shape.layers * rows.squares,
            "head": 2 * shape.head * rows.responses,
        }

    def computing(self, rows: Rows, units: float, heads: float, kept: float = 0.0, spared: float = 0.0) -> float:
        """Seconds of `units` forwards, `kept` of them without attention and `spared` without the layers' products, and
        `heads` products of the LM head, were they all that there is."""
        rates, flops = self.rates, self.forward_flops(rows)
        layers = rates.layers if self.fused_layers else rates.layers * rates.hf_layers
        spent = (units - spared) * flops["layers"] / layers + (units - kept) * flops["attention"] / rates.attention
        spent += heads * flops["head"] / rates.head
        return spent / self.flops / self.ranks / rates.balance

    def traffic(self, trains: bool) -> float:
        """Seconds that one micro-batch's parameters take to be gathered, and its gradients to be reduced."""
        rates = self.rates
        moved = self.shape.count + (self.shape.count + self.trains if trains else 0)  # forward; backward, gradients
        link = rates.link if self.ranks <= self.node else rates.network
        seconds = moved * self.width * (self.ranks - 1) / self.ranks / (link * rates.collective)
        return seconds + (moved * self.width / self.ranks / rates.pcie if self.offload else 0.0)

    def exchange(self, rows: Rows) -> float:
        """Seconds in which a forward's queries, keys, values and attention outputs change ranks; attention waits."""
        shape, size, rates = self.shape, self.sequence_parallel, self.rates
        heads = 2 * shape.heads + 2 * max(shape.kv_heads, size)
        leaving = shape.layers * heads * shape.head_size * self.width * (size - 1) / size
        link = rates.link if size <= self.node else rates.network
        return rows.tokens * leaving / self.ranks / rates.balance / (link * rates.collective)

    def pass_seconds(
        self,
        rows: Rows,
        units: float,
        micro_batches: float,
        trains: bool,
        passes: float = 1.0,
        kept: float = 0.0,
        spared: float = 0.0,
    ) -> float:
        """Seconds of `passes` runs over the rows, of `units` forwards together (`kept`, `spared`: see computing), each
        in `micro_batches` a rank."""
        rates = self.rates
        heads = passes * HEAD - spared if trains else passes
        computing = self.computing(rows, units, heads, kept, spared)
        floor = units * micro_batches * self.shape.layers * rates.layer
        computing, traffic = max(computing, floor), passes * micro_batches * self.traffic(trains)
        exchanges = units - passes if trains else units  # a backward is one, as its forward
        waiting = exchanges * self.exchange(rows)
        return max(computing, traffic) + rates.exposed * min(computing, traffic) + waiting

    def optimizer_step(self) -> float:
        share, rates = self.trains / self.ranks, self.rates
        if not self.offload:
            return share * OPTIMIZER_BYTES / (rates.memory * rates.streaming)
        return share * (OPTIMIZER_BYTES / rates.host + (4 + self.width) / rates.pcie)
