"""The unit of a memory plan: some bytes, whose they are and where they lie."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

GIB = 1 << 30


class Item(NamedTuple):
    name: str
    size: int  # bytes, of one rank
    where: Literal["GPU", "host", "disk", "engine's GPU"] = "GPU"
    holder: Literal["trainer", "engine", "driver"] = "trainer"  # whose: driver = outside every allocator


def total(items: Iterable[Item], where: str = "GPU", holder: str | None = None) -> int:
    return sum(item.size for item in items if item.where == where and holder in (None, item.holder))


def pinned(size: int) -> int:
    """What torch takes for a pinned block: the next power of two (ATen/core/CachingHostAllocator.h)."""
    return 1 << (size - 1).bit_length() if size else 0
