"""What long phases tell, on a pseudo-terminal and into a pipe, by a clock that the tests move."""

import io
import os
import pty
import re
import sys
import time

import processes
import pytest

from prime_fast.progress import LINE_SECONDS, QUIET_SECONDS, lasting_output, progress, say

SCREEN = re.compile(r"\r\x1b\[K")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def terminal():
    """(the stream that a program writes to, everything that has reached the screen so far)."""
    yield from _connected(*pty.openpty())


@pytest.fixture
def pipe():
    for stream, text in _connected(*os.pipe()):
        yield stream, lambda text=text: text().splitlines()


def _connected(reader: int, writer: int):
    os.set_blocking(reader, False)
    stream, received = os.fdopen(writer, "w"), []

    def text() -> str:
        stream.flush()
        while True:
            try:
                received.append(os.read(reader, 1 << 16).decode())
            except BlockingIOError:
                return "".join(received)

    yield stream, text
    stream.close()
    os.close(reader)


def visible(text: str) -> str:
    """What the last line of a terminal shows in the end."""
    return SCREEN.split(text.split("\n")[-1])[-1]


def test_a_terminal_has_one_line_that_is_updated_and_erased(terminal, clock):
    stream, screen = terminal
    with progress("evaluating", 5, "problems", stream=stream, clock=clock) as tick:
        assert visible(screen()) == "evaluating 0/5 problems"
        clock.now += 0.01
        tick()
        assert visible(screen()) == "evaluating 0/5 problems"  # not drawn again at once
        clock.now += 9.99
        tick(tokens=15_000, note="outcome 0.500")
        assert visible(screen()) == "evaluating 2/5 problems  1.5k tok/s  outcome 0.500  10s  eta 15s"
    assert visible(screen()) == "" and "\n" not in screen()


def test_lines_printed_meanwhile_stand_alone(terminal, clock, monkeypatch):
    stream, screen = terminal
    monkeypatch.setattr("sys.stdout", stream)
    with progress("loading", stream=stream, clock=clock) as tick:
        say("an engine died; restarting it")
        clock.now += 1
        tick()
    say("step 1/2")
    lines = [SCREEN.split(line)[-1] for line in screen().replace("\r\n", "\n").split("\n")]
    assert lines == ["an engine died; restarting it", "step 1/2", ""]


def test_a_line_never_wraps(terminal, clock):
    stream, screen = terminal
    with progress("x" * 200, stream=stream, clock=clock):
        assert visible(screen()) == "x" * 79  # this terminal does not tell its width


def test_a_short_phase_leaves_a_log_alone(pipe, clock):
    stream, lines = pipe
    with progress("tokenising", stream=stream, clock=clock) as tick:
        clock.now += QUIET_SECONDS - 0.1
        tick(100)
    assert lines() == []


def test_a_long_phase_says_a_line_a_minute_into_a_log(pipe, clock):
    stream, lines = pipe
    with progress("policy", 100, "micro-batches", stream=stream, clock=clock) as tick:
        for _ in range(100):
            clock.now += 1.5
            tick()
    assert lines() == [
        "policy 7/100 micro-batches  10s  eta 2m20s",
        "policy 47/100 micro-batches  1m10s  eta 1m20s",
        "policy 87/100 micro-batches  2m10s  eta 20s",
        "policy 100/100 micro-batches  2m30s",
    ]


def test_a_total_that_grows_predicts_nothing(pipe, clock):
    stream, lines = pipe
    with pytest.raises(KeyError), progress("rollouts", unit="groups", stream=stream, clock=clock) as tick:
        tick(0, more=8)
        clock.now += 20
        tick(2, more=1, tokens=4000)
        clock.now += LINE_SECONDS
        raise KeyError
    assert lines() == ["rollouts 2/9 groups  200 tok/s  20s"]  # and nothing of an end that it did not reach


def test_a_phase_that_cannot_tick_says_its_name_at_once(pipe, clock):
    stream, lines = pipe
    for seconds in (1, 75):
        with progress("loading the policy model", at_once=True, stream=stream, clock=clock):
            clock.now += seconds
    name = "loading the policy model"
    assert lines() == [name, name, f"{name}  1m15s"]


def test_other_ranks_are_silent(terminal, pipe, clock, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for stream, read in (terminal, pipe):
        with progress("loading", 2, at_once=True, stream=stream, clock=clock) as tick:
            clock.now += 100
            tick()
        assert tick.done == 1 and not read()


def test_a_tick_costs_nothing_that_could_be_measured():
    """Less than 20 us, where a micro-batch takes a hundred milliseconds."""
    stream = io.StringIO()
    start = time.process_time()
    with progress("policy", 10_000, stream=stream) as tick:
        for _ in range(10_000):
            tick(tokens=5, note="outcome")
    assert (time.process_time() - start) / 10_000 < 20e-6 and stream.getvalue() == ""


RUN = """
from prime_fast.progress import lasting_output, progress, say
with lasting_output():
    for step in range(3):
        with progress("rollouts", at_once=True) as tick:
            tick()
        print("outcome", step, "x" * 10000, "\u2192", flush=True)
        say("end")
open("trained", "w").close()
"""
PYTHON = f"{sys.executable} -c '{RUN}'"


@pytest.mark.parametrize(
    "command",
    [
        "{} >&-",
        "{} >&- 2>&-",
        "{} >/dev/full",
        "set -o pipefail; {} | head -1",
        "PYTHONIOENCODING=ascii {} | grep outcome",
    ],
)
def test_a_run_goes_on_though_nobody_can_hear_it(command, tmp_path):
    environment = processes.environment(PYTHONPATH=os.pathsep.join(sys.path))
    result = processes.run(["bash", "-c", command.format(PYTHON)], cwd=tmp_path, env=environment)
    assert (result.returncode, result.stderr, (tmp_path / "trained").exists()) == (0, "", True)


def test_a_terminal_that_is_gone(monkeypatch, clock):
    reader, writer = pty.openpty()
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting_output(), progress("policy", 3, clock=clock) as tick:
            os.close(reader)
            for _ in range(3):
                clock.now += 1
                tick()
