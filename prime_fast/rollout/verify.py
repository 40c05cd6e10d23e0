"""Outcomes of finished groups, found in the reward pool's workers while the engines go on."""

from __future__ import annotations

from concurrent import futures
from typing import Any

from prime_fast.rewards import RewardPool


class Verifier:
    """One thread waits for the pool; what arrives meanwhile makes its next call."""

    def __init__(self, pool: RewardPool) -> None:
        self.pool = pool
        self.thread = futures.ThreadPoolExecutor(1, "verifier")
        self.queue: list[tuple[Any, list[str], dict]] = []
        self.items: list[tuple[Any, int]] = []  # in the running call: (item, number of its responses)
        self.call: futures.Future[list[float]] | None = None

    def put(self, item: Any, texts: list[str], row: dict) -> None:
        """Ask for the outcomes of responses to one row."""
        self.queue.append((item, texts, row))

    def take(self, seconds: float | None) -> list[tuple[Any, tuple[float, ...]]]:
        """(item, outcomes) of what is scored before nothing more was for that long; None: of everything."""
        scored = []
        while self._busy():
            futures.wait([self.call], seconds)
            if not self.call.done():
                break
            outcomes = iter(self.call.result())
            scored += [(item, tuple(next(outcomes) for _ in range(count))) for item, count in self.items]
            self.call = None
        return scored

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)

    def _busy(self) -> bool:
        """Whether a call runs; what is queued makes one."""
        if self.call is None and self.queue:
            self.items = [(item, len(texts)) for item, texts, _ in self.queue]
            responses = [text for _, texts, _ in self.queue for text in texts]
            rows = [row for _, texts, row in self.queue for _ in texts]
            self.queue = []
            self.call = self.thread.submit(self.pool.score, responses, rows)
        return self.call is not None
