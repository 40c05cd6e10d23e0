"""Stage 3: the LM-head ops beside their peers as shares of bare GEMMs, the advantages as a share of a copy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import advantage, lm_head, peers
from benchmarks.gpu.job import Item, Job
from benchmarks.peers import HEADS

CASES = [  # the largest first, losses before log-probs alone
    *[("policy", head, 32768) for head in HEADS],
    *[("prm", head, 32768) for head in HEADS],
    *[("policy", head, 8192) for head in HEADS],
    *[("logprob", head, 32768) for head in HEADS],
    *[(op, head, 8192) for op in ("prm", "logprob") for head in HEADS],
]
ROUNDS, SECONDS = 10, 4.0  # of turns at most, per case
SECONDS_A_CASE = 15  # with what is compiled for it
ADVANTAGES = [2**20, 2**22]  # tokens
INDUCTOR = ("compiled chunk loop", "CCE", "Liger GRPO")  # peers that it compiles


def run(job: Job) -> None:
    job.do(items(job))


def items(job: Job) -> Iterator[Item]:
    shapes = {"tiny": (16, 300)} if job.small else HEADS
    cases = [(op, "tiny", 64) for op in peers.ANY] if job.small else CASES
    for number, case in enumerate(cases):
        yield Item(" ".join(map(str, case)), SECONDS_A_CASE, partial(head, job, *case, shapes))
        if number == 0:
            yield Item("advantage", 25, partial(advantages, job))


def head(job: Job, op: str, name: str, tokens: int, shapes: dict) -> dict:
    cuda, rounds = job.device == "cuda", 2 if job.small else ROUNDS
    fit = [peer for peer, (ops, _) in peers.PEERS.items() if op in ops and (cuda or peer not in peers.GPU_ONLY)]
    if not cuda:  # Inductor takes longer than a rehearsal may
        fit = [peer for peer in fit if peer not in INDUCTOR]
    rows = lm_head.measure(op, name, tokens, job.device, rounds, fit, shapes=shapes, seconds=SECONDS)
    if cuda:
        torch.cuda.empty_cache()
    ours = next(row for row in rows if row["peer"] == "prime_kernels")
    if "note" in ours:
        raise RuntimeError(f"prime_kernels: {ours['note']}")
    return {"rows": rows}


def advantages(job: Job) -> dict:
    return {"rows": advantage.compare(3 if job.small else 15, job.device, [2**13] if job.small else ADVANTAGES)}
