"""A run that is asked to leave, by SIGTERM or SIGUSR1 at any rank: all ranks leave together, with a checkpoint.

The signal itself is heard by `watchdog`'s thread and only noted here. The ranks agree where a phase begins (`agreed`),
and an engine that decodes in this process looks at `asked`, so that nobody waits for its longest response.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from prime_fast.engine import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
NO, SOON, NOW = range(3)  # how urgent it is to leave. NOW: what is left of the grace is needed for the checkpoint
RESERVE = 1.5  # checkpoints as long as the longest so far; as long as none was written, half the grace


class Preempted(distributed.Stop):
    """The run was asked to leave, and every rank does."""

    code = 128 + signal.SIGTERM


@dataclass
class _State:
    grace: float = 0.0
    since: float | None = None  # time.time() of the first request
    checkpoint: float | None = None  # seconds that the longest one took


_state = _State()


def begin(grace: float) -> None:
    """A run starts, which nobody has asked to leave."""
    global _state
    _state = _State(grace)


def ask(since: float | None = None) -> None:
    if _state.since is None:
        _state.since = since or time.time()


def asked() -> bool:
    return _state.since is not None


def since() -> float:
    """Seconds since then."""
    return time.time() - _state.since


def grace() -> float:
    return _state.grace


def left() -> float:
    """Seconds of the grace that remain, infinite if nobody has asked."""
    return float("inf") if _state.since is None else _state.since + _state.grace - time.time()


def took(checkpoint: float) -> None:
    """Note how many seconds a checkpoint took."""
    _state.checkpoint = max(checkpoint, _state.checkpoint or 0.0)


def agreed() -> int:
    """NO, SOON or NOW: what is most urgent at any rank. Every rank calls it at the same point."""
    reserve = _state.grace / 2 if _state.checkpoint is None else RESERVE * _state.checkpoint
    urgency = NOW if left() <= reserve else SOON if asked() else NO
    if distributed.world_size() == 1:
        return urgency
    most = torch.tensor(urgency)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if most:
        ask()
    return int(most)
