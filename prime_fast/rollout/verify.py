"""Outcomes of finished groups, found in the reward pool's workers while the engines go on."""

from __future__ import annotations

import logging
from concurrent import futures
from typing import Any, NamedTuple

from prime_fast.rewards import RewardPool
from prime_fast.rewards.pool import Verdict

logger = logging.getLogger(__name__)


class Scored(NamedTuple):
    done: list[tuple[Any, list[Verdict]]]  # (item, the verdicts on its responses)
    problem: str = ""  # why none can be scored any more


class Verifier:
    """One thread waits for the pool; what arrives meanwhile makes its next call."""

    def __init__(self, pool: RewardPool) -> None:
        self.pool = pool
        self.thread = futures.ThreadPoolExecutor(1, "verifier")
        self.queue: list[tuple[Any, list[str], dict]] = []
        self.items: list[tuple[Any, int]] = []  # in the running call: (item, number of its responses)
        self.call: futures.Future[list[Verdict]] | None = None

    def put(self, item: Any, texts: list[str], row: dict) -> None:
        """Ask for the outcomes of responses to one row."""
        self.queue.append((item, texts, row))

    def take(self, seconds: float | None) -> Scored:
        """What is scored before nothing more was for that long; None: everything.

        A call that raised is a problem for the caller to share: other ranks wait for this one.
        """
        scored = []
        while self._busy():
            futures.wait([self.call], seconds)
            if not self.call.done():
                break
            call, self.call = self.call, None
            if error := call.exception():
                return Scored(scored, _sentence(error))
            verdicts = iter(call.result())
            scored += [(item, [next(verdicts) for _ in range(count)]) for item, count in self.items]
        return Scored(scored)

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)

    def _busy(self) -> bool:
        """Whether a call runs; what is queued makes one."""
        if self.call is None and self.queue:
            self.items = [(item, len(texts)) for item, texts, _ in self.queue]
            responses = [text for _, texts, _ in self.queue for text in texts]
            rows = [row for _, texts, row in self.queue for _ in texts]
            self.queue = []
            self.call = self.thread.submit(self.pool.judge, responses, rows)
        return self.call is not None


def _sentence(error: BaseException) -> str:
    if isinstance(error, ValueError):  # how the rewards tell what is wrong
        return str(error)
    logger.error("the reward workers failed", exc_info=error)
    return f"the reward workers failed: {type(error).__name__}: {error}"
