"""Grading of a program against its tests: in the shapes of Eurus-2 (APPS, TACO, CodeContests, Codeforces) and LeetCode.

The program runs in a sandbox (`rewards.sandbox`) that is given inputs one by one and never an expected output: what
comes back is compared out here (`compare`, `asserts`), so that the program can forge nothing but its own answers.

Differences from the verifier of the published run: each program is run once, not up to eleven times; a test that runs
out of time ends the run; whole numbers must be equal (not within 1e-5), and lines must be in order.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from prime_fast.rewards.asserts import Claim, read_asserts
from prime_fast.rewards.compare import read_value, same_text, same_value
from prime_fast.rewards.guest import encode
from prime_fast.rewards.sandbox import Sandbox

# Of a response's time: what one test may compute, which no busy machine shortens, and what all may take by the clock.
TEST_SHARE, GRADE_SHARE = 0.4, 0.9
LIMITS = ("cpu", "time", "memory", "output", "files", "threads")
FENCE, PYTHON = "```", ("python", "python3", "py")


class Stopped(Exception):
    """The program had used up its CPU time, or the machine's memory."""


class Usage(NamedTuple):
    """What a program took, over all its tests."""

    seconds: float = 0.0  # of CPU time
    memory: int = 0  # bytes, the most that a process of it held
    limits: tuple[str, ...] = ()  # that it hit, of LIMITS

    def hit(self, limit: str | None) -> "Usage":
        return self._replace(limits=tuple(name for name in LIMITS if name in (limit, *self.limits)))

    def with_reply(self, reply: dict) -> "Usage":
        """reply: of the sandbox's own process, see `guest`."""
        each = "output" in reply  # the process of one test; else the program's only one
        cpu = reply.get("cpu", 0.0)
        seconds = self.seconds + cpu if each else max(self.seconds, cpu)
        return Usage(seconds, max(self.memory, reply.get("memory", 0)), self.limits).hit(reply.get("limit"))


class Score(float):
    """The share of the tests that a program passed (or 1.0, 0.0), and its `usage`; `stopped` if it had to be."""

    def __new__(cls, value: float, usage: Usage, stopped: bool = False):
        self = super().__new__(cls, value)
        self.usage, self.stopped = usage, stopped
        return self


@dataclass(frozen=True)
class Test:
    request: dict  # what the program is told
    passes: Callable[[dict], bool]  # whether its reply is right


@dataclass(frozen=True)
class Task:
    tests: list[Test]
    calls: bool  # whether values are asked for, not what is printed
    function: str | None = None  # the one to call; None with calls: expressions of each test


def grade(response: str, ground_truth: str | dict, *, seconds: float, strict: bool = False, sandbox: str) -> Score:
    """The share of the tests that the program in `response` passes; `strict`: 1.0 if it passes all, else 0.0.

    ground_truth: JSON text or its object, {"inputs", "outputs"[, "fn_name"]} or {"asserts": source}.
    seconds: what the response may take in all; one test may compute for 0.4 of it. A program that had to be stopped
        keeps what it had reached. Raises ValueError if the ground truth has another shape.
    """
    task, program = read_task(ground_truth), extract_program(response)
    talk, passed, stopped = _Talk(time.monotonic() + GRADE_SHARE * seconds), 0, False
    try:
        with Sandbox(sandbox, math.ceil(TEST_SHARE * seconds), math.ceil(seconds)) as talk.box:
            loaded = "loaded" in talk.ask({"code": program, "function": task.function, "calls": task.calls})
            for test in task.tests if loaded else []:
                if _passes(test, talk.ask(test.request)):
                    passed += 1
                elif strict:
                    break
            if loaded and task.calls:
                talk.ask({"end": True})
    except (Stopped, TimeoutError) as error:
        stopped = True
        talk.usage = talk.usage.hit("time" if isinstance(error, TimeoutError) else None)
    except (EOFError, ValueError, RecursionError):
        pass  # it ended, or died
    talk.usage = talk.usage.with_reply(talk.box.took)
    share = float(passed == len(task.tests)) if strict else passed / len(task.tests)
    return Score(share, talk.usage, stopped)


def extract_program(response: str) -> str:
    """The last fenced block of Python that is closed, else the last that is not; without any, the first block of
    another kind; without that, everything. A fence opens at the end of a line and closes at the start or end of one."""
    blocks = list(_blocks(response))
    python = [block for block in blocks if block[0]]
    for _, closed, program in reversed(python):
        if closed:
            return program
    if python:
        return python[-1][2]
    return blocks[0][2] if blocks else response


def read_task(ground_truth: str | dict) -> Task:
    with _any_digits():
        truth = read_truth(ground_truth)
        if "asserts" in truth:
            task = Task([_assert_test(claim) for claim in read_asserts(truth["asserts"])], calls=True)
        else:
            pairs, function = zip(truth["inputs"], truth["outputs"], strict=True), truth.get("fn_name")
            make = _call_test if function else _stdin_test
            task = Task([make(*pair) for pair in pairs], calls=bool(function), function=function)
    if not task.tests:
        raise ValueError("the ground truth holds no test")
    return task


def read_truth(ground_truth: str | dict) -> dict:
    """{"inputs", "outputs"[, "fn_name"]} or {"asserts"}, as it is written; ValueError if it is neither."""
    truth = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    if isinstance(truth, dict) and isinstance(truth.get("asserts"), str):
        return {"asserts": truth["asserts"]}
    if not isinstance(truth, dict) or not all(isinstance(truth.get(key), list) for key in ("inputs", "outputs")):
        raise ValueError('the ground truth of code must be {"inputs", "outputs"[, "fn_name"]} or {"asserts"}')
    if len(truth["inputs"]) != len(truth["outputs"]):
        raise ValueError(f"ground truth has {len(truth['inputs'])} inputs and {len(truth['outputs'])} outputs")
    return {key: truth.get(key) for key in ("inputs", "outputs", "fn_name")}


def _blocks(response: str) -> Iterator[tuple[bool, bool, str]]:
    """(whether it is Python, whether it is closed, its text) of each fenced block."""
    python, indent, lines = None, "", []
    for line in response.splitlines(keepends=True):
        bare = line.strip()
        before, fence, kind = bare.rpartition(FENCE)
        opens = fence and kind.partition(" ")[0].casefold() in PYTHON
        if python is None or opens:
            if python is not None:
                yield python, False, "".join(lines)
                python = None
            if opens or (fence and not before):
                python, lines = bool(opens), []
                indent = line[: len(line) - len(line.lstrip())] if not before else ""
        elif bare.startswith(FENCE) or bare.endswith(FENCE):
            if not bare.startswith(FENCE):
                lines.append(_without(indent, line).rstrip()[: -len(FENCE)] + "\n")
            yield python, True, "".join(lines)
            python = None
        else:
            lines.append(_without(indent, line))
    if python is not None and "".join(lines).strip():
        yield python, False, "".join(lines)


def _without(indent: str, line: str) -> str:
    """A line of a block whose fence is indented."""
    return line.removeprefix(indent) if line.startswith(indent) else line.lstrip(" \t")


class _Talk:
    """With the sandbox of one program, until `deadline`; what the program took so far is its `usage`."""

    def __init__(self, deadline: float):
        self.deadline, self.usage = deadline, Usage()

    def ask(self, request: dict) -> dict:
        """The reply. Raises Stopped or TimeoutError where the program had to be stopped, EOFError if it ended."""
        reply = self.box.ask(request, self.deadline)
        self.usage = self.usage.with_reply(reply)
        if reply.get("stopped"):
            raise Stopped
        if "reply" in reply:  # what the program's process says
            said = None
            with suppress(ValueError, RecursionError):
                said = json.loads(reply["reply"])
            if not isinstance(said, dict):
                return {}
            self.usage = self.usage.hit(next((limit for limit in LIMITS if limit == said.get("limit")), None))
            return said
        if "exit" in reply and "output" not in reply:
            raise EOFError
        return reply


def _passes(test: Test, reply: dict) -> bool:
    with suppress(ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return bool(test.passes(reply))
    return False  # a reply of another shape is wrong


def _stdin_test(given: str | list, expected: str | list) -> Test:
    given, expected = ("\n".join(map(str, part)) if isinstance(part, list) else str(part) for part in (given, expected))
    return Test({"stdin": given}, lambda reply: reply["exit"] == 0 and same_text(reply["output"], expected))


def _call_test(given: str | list, expected: Any) -> Test:
    """given: a list of arguments, or a text with one JSON value a line; then the expected value is JSON text too."""
    if isinstance(given, str):
        given = [json.loads(line) for line in given.split("\n") if line.strip()]
        expected = json.loads(expected) if isinstance(expected, str) else expected
    wanted = _number_keys(expected)

    def passes(reply: dict) -> bool:
        value = read_value(reply["value"])
        wrapped = isinstance(wanted, list) and len(wanted) == 1  # APPS often wraps the value in a list
        return same_value(value, wanted) or (wrapped and same_value(value, wanted[0]))

    return Test({"args": encode(_number_keys(given))}, passes)


def _assert_test(claim: Claim) -> Test:
    return Test(claim.request, lambda reply: claim.holds(reply["values"]))


def _number_keys(value: Any) -> Any:
    """JSON's keys are text; where all of a dict's are whole numbers, numbers were meant."""
    if isinstance(value, dict):
        with suppress(ValueError):
            return {int(key): item for key, item in value.items()}
    return [_number_keys(item) for item in value] if isinstance(value, list) else value


@contextmanager
def _any_digits() -> Iterator[None]:
    """Numbers of the ground truth may be as long as they like; those of a program are never read as decimals."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(limit)
