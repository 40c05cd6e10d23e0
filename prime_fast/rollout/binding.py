"""Which engine generates which group: the one with the least to do takes the next, whenever one has room.

A plan made before the lengths are known (by number) leaves one engine with more of the long responses than another.
Nothing here asks another rank: where all are told of the same groups in the same order, all come to the same answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

from prime_fast.rollout import Request

QUEUE = 0.25  # sequences that wait in an engine, as a share of those that it decodes: it works on until the next look


class Binding:
    """batches: rank of an engine -> sequences that it decodes at a time."""

    def __init__(self, batches: Mapping[int, int]) -> None:
        self.slots = sum(batches.values())
        self.room = {rank: batch + int(QUEUE * batch) for rank, batch in batches.items()}
        self.load = dict.fromkeys(batches, 0)  # sequences of unfinished groups
        self.ended = dict.fromkeys(batches, 0)  # those of them that are finished, as far as is known
        self.waiting: deque[Request] = deque()
        self.bound: dict[int, int] = {}  # unfinished group -> its sequences

    def add(self, requests: Iterable[Request]) -> None:
        """Longest prompts first, for these take longest: among as many as are decoded at a time, and behind what was
        added before, since whoever takes groups in their order waits for the first."""
        part: list[Request] = []
        for request in requests:
            part.append(request)
            if sum(len(other.seeds) for other in part) >= self.slots:
                self.waiting += sorted(part, key=_longest)
                part = []
        self.waiting += sorted(part, key=_longest)

    def take(self, everything: bool = False) -> Iterator[tuple[int, Request]]:
        """(rank of its engine, request) of the groups that go to an engine now; everything: room or not.

        A lone engine takes all: it knows best when it has room.
        """
        everything |= len(self.load) == 1
        while self.waiting:
            left, rank = min((self.load[rank] - self.ended[rank], rank) for rank in self.load)
            size = len(self.waiting[0].seeds)
            if not everything and left and left + size > self.room[rank]:
                return
            request = self.waiting.popleft()
            self.load[rank] += size
            self.bound[request.key] = size
            yield rank, request

    def finished(self, rank: int, keys: Iterable[int], ended: int) -> None:
        """These groups of an engine are; ended: so many sequences of its others are."""
        for key in keys:
            self.load[rank] -= self.bound.pop(key)
        self.ended[rank] = ended


def _longest(request: Request) -> tuple[int, int]:
    return -len(request.prompt), request.key
