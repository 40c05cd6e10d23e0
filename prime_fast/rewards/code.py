"""Grading of a program against its tests: in the shapes of Eurus-2 (APPS, TACO, CodeContests, Codeforces) and LeetCode.

The program runs in a sandbox (`rewards.sandbox`) that is given inputs one by one and never an expected output: what
comes back is compared here, so that the program can forge nothing but its own answers.

Differences from the verifier of the published run: each program is run once, not up to eleven times; a test that runs
out of time ends the run; whole numbers must be equal (not within 1e-5), and lines must be in order.
"""

import ast
import json
import math
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from prime_fast.rewards.guest import decode, encode
from prime_fast.rewards.sandbox import Sandbox

# Of a response's time: what one test may compute, which no busy machine shortens, and what all may take by the clock.
TEST_SHARE, GRADE_SHARE = 0.4, 0.9
STOPPED = (-signal.SIGKILL, -signal.SIGXCPU)
REL_TOL, ABS_TOL = 1e-5, 1e-8  # of floats
PYTHON_FENCE, ANY_FENCE = re.compile(r"```[ \t]*(?:python3?|py)\b[^\n]*\n", re.I), re.compile(r"```[^\n]*\n")
WHOLE = re.compile(r"([+-]?)0*(\d+)")


class OutOfTime(Exception):
    """The program had to be stopped; `score` is what it had reached."""

    def __init__(self, score: float):
        self.score = score


@dataclass(frozen=True)
class Test:
    request: dict  # what the program is told
    passes: Callable[[dict], bool]  # whether its reply is right


@dataclass(frozen=True)
class Task:
    tests: list[Test]
    calls: bool  # whether values are asked for, not what is printed
    function: str | None = None  # the one to call; None with calls: an expression of each test


def grade(response: str, ground_truth: str | dict, *, seconds: float, strict: bool = False, sandbox: str) -> float:
    """The share of the tests that the program in `response` passes; `strict`: 1.0 if it passes all, else 0.0.

    ground_truth: JSON text or its object, {"inputs", "outputs"[, "fn_name"]} or {"asserts": source}.
    seconds: what the response may take in all; one test may compute for 0.4 of it. Raises OutOfTime if the program had
        to be stopped, ValueError if the ground truth has another shape.
    """
    task, program = read_task(ground_truth), extract_program(response)
    deadline = time.monotonic() + GRADE_SHARE * seconds
    passed = 0
    try:
        with Sandbox(sandbox, math.ceil(TEST_SHARE * seconds), math.ceil(seconds)) as box:
            start = {"code": program, "function": task.function, "calls": task.calls}
            loaded = "loaded" in _ask(box, start, deadline)
            for test in task.tests if loaded else []:
                if _passes(test, _ask(box, test.request, deadline)):
                    passed += 1
                elif strict:
                    break
    except TimeoutError:
        raise OutOfTime(0.0 if strict else passed / len(task.tests)) from None
    except (EOFError, ValueError, RecursionError):
        pass  # it died, or sent what is no reply
    return float(passed == len(task.tests)) if strict else passed / len(task.tests)


def extract_program(response: str) -> str:
    """The text between the last opening ```python and the next fence; else the first fenced block; else everything."""
    if openings := list(PYTHON_FENCE.finditer(response)):
        return response[openings[-1].end() :].partition("```")[0]
    opening = ANY_FENCE.search(response)
    return response[opening.end() :].partition("```")[0] if opening else response


def read_task(ground_truth: str | dict) -> Task:
    truth = read_truth(ground_truth)
    if "asserts" in truth:
        task = Task(_assert_tests(truth["asserts"]), calls=True)
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


def same_text(output: str, expected: str) -> bool:
    """Line by line, word by word; blank lines and spacing do not count; 0.5 is .50 and 1.0 is 1, but 1 is not 2."""
    if output == expected:
        return True
    found, wanted = ([line.split() for line in text.splitlines() if line.strip()] for text in (output, expected))
    if len(found) != len(wanted):
        return False
    return all(
        len(ours) == len(theirs) and all(map(_same_word, ours, theirs))
        for ours, theirs in zip(found, wanted, strict=True)
    )


def same_value(found: Any, expected: Any) -> bool:
    """Equality with tolerance for floats and without a difference between lists and tuples."""
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same_value, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same_value(found[key], expected[key]) for key in expected)
    if isinstance(found, float) or isinstance(expected, float):
        numbers = isinstance(found, int | float) and isinstance(expected, int | float)
        return numbers and (found == expected or _close(found, expected))
    return found == expected


def _ask(box: Sandbox, request: dict, deadline: float) -> dict:
    reply = box.ask(request, deadline)
    if reply.get("exit") in STOPPED:  # by the limit on CPU time, or by the machine for want of memory
        raise TimeoutError
    return reply


def _passes(test: Test, reply: dict) -> bool:
    with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):  # a reply of another shape is wrong
        return bool(test.passes(reply))
    return False


def _stdin_test(given: str | list, expected: str | list) -> Test:
    given, expected = ("\n".join(map(str, part)) if isinstance(part, list) else str(part) for part in (given, expected))
    return Test({"stdin": given}, lambda reply: reply["exit"] == 0 and same_text(reply["output"], expected))


def _call_test(given: str | list, expected: Any) -> Test:
    """given: a list of arguments, or a text with one JSON value a line; then the expected value is JSON text too."""
    if isinstance(given, str):
        given = [json.loads(line) for line in given.split("\n") if line.strip()]
        expected = json.loads(expected) if isinstance(expected, str) else expected
    request = {"args": encode(_number_keys(given))}

    def passes(reply: dict) -> bool:
        value = decode(reply["value"])
        wanted = _number_keys(expected)
        wrapped = isinstance(wanted, list) and len(wanted) == 1  # APPS often wraps the value in a list
        return same_value(value, wanted) or (wrapped and same_value(value, wanted[0]))

    return Test(request, passes)


def _assert_tests(source: str) -> list[Test]:
    """Each assert with the statements before it: its expression is valued in the sandbox and compared here."""
    tests, setup = [], []
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Assert):
            setup.append(ast.unparse(statement))
            continue
        expression, passes = _assertion(statement)
        tests.append(Test({"setup": "\n".join(setup), "value": ast.unparse(expression)}, passes))
        setup = []
    return tests


def _assertion(statement: ast.Assert) -> tuple[ast.expr, Callable[[dict], bool]]:
    """The expression to value and the check of its value, for `value == literal`, `value` and `not value`."""
    test = statement.test
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq | ast.Is):
        for expression, other in ((test.left, test.comparators[0]), (test.comparators[0], test.left)):
            with suppress(ValueError):
                return expression, partial(_equals, ast.literal_eval(other))
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return test.operand, lambda reply: not _truth(reply)
    if isinstance(test, ast.Call | ast.Name | ast.Attribute | ast.Subscript):
        return test, _truth
    raise ValueError(f"cannot check `{ast.unparse(statement):.200}` outside the sandbox: use `assert value == literal`")


def _equals(expected: Any, reply: dict) -> bool:
    return decode(reply["value"]) == expected


def _truth(reply: dict) -> bool:
    value = reply["value"]
    if isinstance(value, dict) and "object" in value:
        raise ValueError("an object's truth is only its own word")
    return bool(decode(value))


def _number_keys(value: Any) -> Any:
    """JSON's keys are text; where all of a dict's are whole numbers, numbers were meant."""
    if isinstance(value, dict):
        with suppress(ValueError):
            return {int(key): item for key, item in value.items()}
    return [_number_keys(item) for item in value] if isinstance(value, list) else value


def _same_word(found: str, expected: str) -> bool:
    if found == expected:
        return True
    ours, theirs = WHOLE.fullmatch(found), WHOLE.fullmatch(expected)
    if ours and theirs:
        return (ours[1].replace("+", ""), ours[2]) == (theirs[1].replace("+", ""), theirs[2])
    with suppress(ValueError):
        return _close(float(found), float(expected))
    return False


def _close(found: float, expected: float) -> bool:
    return math.isfinite(expected) and math.isclose(found, expected, rel_tol=REL_TOL, abs_tol=ABS_TOL)
