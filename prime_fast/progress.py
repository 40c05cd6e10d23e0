"""What a long phase tells while it lasts: one updating line on a terminal, now and then a plain line in a log file.

    with progress("evaluating", total=500, unit="problems") as tick:
        for problem in problems:
            tick()

On a terminal the line is erased when the phase ends. In a log file (or pipe) a phase says nothing in its first
seconds, then a line a minute, and one at its end if it has said anything; there is no thread, so it speaks when it
ticks. Rank 0 alone speaks. What else is printed during a phase goes through `say`.
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

REDRAW_SECONDS = 0.1  # on a terminal
QUIET_SECONDS, LINE_SECONDS = 10.0, 60.0  # in a log file: before the first line, between two lines
COLUMNS = 80  # where a terminal does not tell its width
ERASE = "\r\x1b[K"


class _Lasting:
    """A standard stream that a run outlives: what cannot be written any more is dropped."""

    def __init__(self, stream: TextIO | None, nowhere: TextIO) -> None:
        self._stream, self._nowhere = stream or nowhere, nowhere  # None: it was closed before Python started
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="replace")  # a character that its encoding lacks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._lasting(self._stream.write, text) or 0

    def flush(self) -> None:
        self._lasting(self._stream.flush)

    def _lasting(self, work: Callable, *arguments: str) -> Any:
        try:
            return work(*arguments)
        except OSError:  # its reader or its terminal is gone, its disk is full: what it still holds is dropped too
            os.dup2(self._nowhere.fileno(), self._stream.fileno())


@contextmanager
def lasting_output() -> Iterator[None]:
    """Nobody has to be there to hear a run: with its output closed, broken or full it goes on, unheard."""
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(_Lasting(sys.stdout, nowhere)),
        redirect_stderr(_Lasting(sys.stderr, nowhere)),
    ):
        yield


class Position:
    """Where this process is, for those who ask from outside (`engine.watchdog`)."""

    def __init__(self) -> None:
        self.step, self.phase, self.since = 0, "start", time.time()
        self.moves = 0  # grows with all that gets done


here = Position()


def at(step: int, phase: str) -> None:
    """A phase of a step begins."""
    if (step, phase) != (here.step, here.phase):
        here.step, here.phase, here.since = step, phase, time.time()
    moved()


def moved() -> None:
    here.moves += 1


class Tick:
    """Called after each piece of work: `tick()`, `tick(3)`; `tick(0, more=9)` where more work has turned up.

    tokens: generated in these pieces; the line then has their rate. note: words at its end, until the next ones.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, at_once: bool, stream: TextIO, clock: Callable[[], float]
    ) -> None:
        self.what, self.total, self.unit, self.stream, self.clock = what, total, unit, stream, clock
        speaks = os.environ.get("RANK", "0") == "0"  # of torchrun; the process group may not exist yet
        self.predictable = total is not None  # a total that grows says nothing about the time left
        self.done = self.tokens = 0
        self.note, self.said = "", False
        self.start = clock()
        self.on_terminal = speaks and _is_terminal(stream)
        quiet = 0.0 if at_once or self.on_terminal else QUIET_SECONDS
        self.next = self.start + quiet if speaks else math.inf

    def __call__(self, pieces: int = 1, *, more: int = 0, tokens: int = 0, note: str | None = None) -> None:
        if pieces:
            moved()
        self.done += pieces
        self.tokens += tokens
        if more:
            self.total, self.predictable = (self.total or 0) + more, False
        if note is not None:
            self.note = note
        if (now := self.clock()) >= self.next:
            self.tell(now)

    def tell(self, now: float) -> None:
        self.said = True
        if self.on_terminal:
            self.next = now + REDRAW_SECONDS
            self.stream.write(ERASE + self.line(now)[: _columns(self.stream) - 1])
        else:
            self.next = now + LINE_SECONDS
            self.stream.write(self.line(now) + "\n")
        self.stream.flush()

    def line(self, now: float) -> str:
        seconds = now - self.start
        parts = [self.what]
        if self.total or self.done:
            count = f"{self.done}/{self.total}" if self.total else f"{self.done}"
            parts[0] += f" {count} {self.unit}".rstrip()
        if self.tokens and seconds > 0:
            parts.append(f"{thousands(self.tokens / seconds)} tok/s")
        if self.note:
            parts.append(self.note)
        if seconds >= 1:
            parts.append(duration(seconds))
        if self.predictable and 0 < self.done < self.total and seconds >= 1:
            parts.append(f"eta {duration(seconds / self.done * (self.total - self.done))}")
        return "  ".join(parts)

    def erase(self) -> None:
        if self.on_terminal:
            self.stream.write(ERASE)
            self.stream.flush()

    def end(self) -> None:
        now = self.clock()
        if self.said and not self.on_terminal and now >= self.start + QUIET_SECONDS:
            self.tell(now)


@contextmanager
def progress(
    what: str,
    total: int | None = None,
    unit: str = "",
    *,
    at_once: bool = False,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Tick]:
    """A phase `what` of `total` pieces of work (None if unknown), counted as `unit` by the `Tick` that it gives.

    at_once: a log file, too, gets the first line when the phase begins, for phases that are long and cannot tick.
    """
    tick = Tick(what, total, unit, at_once, stream or sys.stdout, clock)
    tick(0)
    try:
        yield tick
    finally:
        tick.erase()
    tick.end()


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line though a phase may be on the terminal's last one."""
    stream = stream or sys.stdout
    print((ERASE if _is_terminal(stream) else "") + text, file=stream, flush=True)


def thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or COLUMNS
    except OSError:  # it is gone
        return COLUMNS
