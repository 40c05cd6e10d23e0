"""Reward functions by name: the built-in ones, or a Python callable of the user's with verl's or TRL's signature."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prime_fast.data.shapes import ADDED, TRUTHS, WHERE, decoded

ABILITIES = {"math": ("math",), "code": ("code",), "auto": ("math", "code")}  # of the rows each built-in one scores
ALIASES = {  # what rows call them, in any case
    **dict.fromkeys(("math", "maths", "mathematics"), "math"),
    **dict.fromkeys(("code", "coding", "codegen", "programming"), "code"),
}
NOT_COLUMNS = ("prompt", "completion", "completion_ids", "prompt_ids", ADDED, WHERE)  # of a row, for a TRL function
STRICT = "-strict"
BUILT_IN = (*ABILITIES, *(name + STRICT for name in ABILITIES))
OWN_REWARD = 'set the reward to a function of yours, "path/to/file.py:function"'
SIGNATURES = (
    "verl's compute_score(data_source, solution_str, ground_truth, extra_info) -> float "
    "or TRL's reward(prompts, completions, **columns) -> list of floats"
)

RewardFunction = Callable[[str, dict], float]


class BadReward(ValueError):
    """The reward function cannot score any row: it does not import, or asks for what rows do not have."""


def check_name(reward: str) -> None:
    """ValueError unless `reward` is built in, "path/to/file.py:function" or "package.module:function"."""
    place, _, function = reward.rpartition(":")
    if reward in BUILT_IN or (place and function.isidentifier()):
        return
    raise ValueError(
        f'unknown reward "{reward}": use "math", "code", "auto" (by the row\'s ability), one of these with "{STRICT}", '
        '"path/to/file.py:function" or "package.module:function"'
    )


def abilities(reward: str) -> tuple[str, ...]:
    """The abilities of the rows a built-in reward scores; () for a function of the user's, which is asked about all."""
    return ABILITIES[reward.removesuffix(STRICT)] if reward in BUILT_IN else ()


def ability_of(row: dict) -> Any:
    """A row's ability under its one name; as it is if it is none of ALIASES."""
    ability = row.get("ability")
    return ALIASES.get(ability.strip().casefold(), ability) if isinstance(ability, str) else ability


@dataclass(frozen=True)
class RowCheck:
    """Raises ValueError, a sentence without its subject, for a row that a built-in reward cannot score.

    truths: whether the ground truth is looked at too, beyond that there is one. That tests of code run, no look tells.
    """

    reward: str
    truths: bool = True

    def __call__(self, row: dict) -> None:
        known = abilities(self.reward)
        ability, truth = ability_of(row) or known[0], truth_of(row)
        if ability not in known:
            fix = f'use "{ability}" or "auto"' if ability in ABILITIES["auto"] else OWN_REWARD
            raise ValueError(f'has ability "{ability}", which reward "{self.reward}" cannot score: {fix}')
        if truth is None or (self.truths and str(truth).strip() == ""):
            raise ValueError(f"has no reward_model.ground_truth (nor a truth in a column {', '.join(TRUTHS)})")
        if self.truths:
            (_check_tests if ability == "code" else _check_answer)(truth)


def _check_answer(truth: Any) -> None:
    tests = decoded(truth)
    if isinstance(tests, dict) and ("inputs" in tests or "asserts" in tests):
        raise ValueError('has tests for its ground truth but no ability that says so: set it to "code"')
    if not isinstance(truth, str | int | float):
        raise ValueError(f"has a ground truth that is neither text nor number but {truth!r:.60}: {OWN_REWARD}")


def _check_tests(truth: Any) -> None:
    from prime_fast.rewards.asserts import read_asserts
    from prime_fast.rewards.code import read_truth

    try:
        tests = read_truth(truth)
        if "asserts" in tests:
            read_asserts(tests["asserts"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has tests that cannot be run: {error}") from error
    if not tests.get("inputs") and "assert" not in tests.get("asserts", ""):
        raise ValueError("has no test in its ground truth")


def row_check(reward: str) -> RowCheck | None:
    """None for a function of the user's, which takes the rows as they are."""
    return RowCheck(reward) if reward in BUILT_IN else None


def truth_of(row: dict) -> Any:
    """The ground truth a built-in reward goes by; a list of one stands for its element."""
    truth = (row.get("reward_model") or {}).get("ground_truth")
    return truth[0] if isinstance(truth, list) and len(truth) == 1 else truth


def load_reward(reward: str, timeout: float = 10.0, sandbox: str = "namespaces") -> RewardFunction:
    """The named reward as a function of (response, row); BadReward with one clear sentence if there is none.

    A verl function may return a dict with a "score". A TRL function is called with lists of length 1: prompts is
    [row["prompt"]]; completions is [[{"role": "assistant", "content": response}]] if that prompt is a list of messages,
    else [response]; and the columns its file has, as TRL does it. If it names `ground_truth`, or the file has a
    `reward_model`, it gets that too. Its None ("does not apply") counts as 0.0.

    For a row that lacks what it asks for it raises BadReward; any other exception is the user's function's own.
    """
    check_name(reward)
    if reward in BUILT_IN:
        return _built_in(reward, timeout, sandbox)
    function = import_function(reward, "reward")
    names = inspect.signature(function).parameters
    if {"data_source", "solution_str", "ground_truth"} <= set(names):
        return _verl(function, reward)
    if "completions" in names:
        return _trl(function, reward)
    raise BadReward(f'reward "{reward}" takes ({", ".join(names)}): it must have {SIGNATURES}')


def _built_in(reward: str, timeout: float, sandbox: str) -> RewardFunction:
    graders, strict = {}, reward.endswith(STRICT)
    if "math" in abilities(reward):
        from prime_fast.rewards import math

        graders["math"] = partial(math.grade, strict=strict)
    if "code" in abilities(reward):
        from prime_fast.rewards import code
        from prime_fast.rewards.isolate import Refused
        from prime_fast.rewards.sandbox import isolation

        try:
            isolation(sandbox)
        except Refused as error:
            raise BadReward(str(error)) from error
        graders["code"] = partial(code.grade, seconds=timeout, strict=strict, sandbox=sandbox)
    default = abilities(reward)[0]
    return lambda response, row: graders[ability_of(row) or default](response, truth_of(row))


def import_function(name: str, what: str) -> Callable:
    """`path/to/file.py:function` or `package.module:function`; BadReward if there is none. what: the setting."""
    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            path = Path(place).resolve()
            sys.path.insert(0, str(path.parent))  # the file may import its neighbours
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:
        raise BadReward(f'{what} "{name}" cannot be imported: {type(error).__name__}: {error}') from error
    found = getattr(module, function, None)
    if not callable(found):
        raise BadReward(f'{what} "{name}": there is no function "{function}" in {place}')
    return found


def _verl(function: Callable, reward: str) -> RewardFunction:
    accepts = _accepted(function)

    def arguments(response: str, row: dict) -> dict:
        model = row.get("reward_model")
        if not isinstance(model, dict) or "ground_truth" not in model:
            raise BadReward(
                f'reward "{reward}" requires ground_truth, which the rows do not have: give them '
                f"reward_model.ground_truth or one of the columns {', '.join(TRUTHS)}, or use TRL's signature"
            )
        given = {"data_source": row.get("data_source"), "ground_truth": model["ground_truth"]}
        extra = {"extra_info": row.get("extra_info")} if accepts("extra_info") else {}
        return given | extra | {"solution_str": response}

    return _calling(function, reward, arguments, lambda result: result["score"] if isinstance(result, dict) else result)


def _trl(function: Callable, reward: str) -> RewardFunction:
    accepts, parameters = _accepted(function), inspect.signature(function).parameters
    optional = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    needed = {name for name, p in parameters.items() if p.default is p.empty and p.kind not in optional}

    def arguments(response: str, row: dict) -> dict:
        prompt, model = row["prompt"], row.get("reward_model")
        columns = {key: row[key] for key in row if key not in NOT_COLUMNS and key not in row.get(ADDED, ())}
        if isinstance(model, dict) and ("ground_truth" in parameters or "reward_model" in columns):
            columns = {"ground_truth": model.get("ground_truth")} | columns
        completion = response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]
        values = columns | {"prompts": prompt, "completions": completion}
        if missing := sorted(needed - values.keys()):
            raise BadReward(
                f'reward "{reward}" requires {missing}, which the rows do not have: they have {sorted(columns)}'
            )
        return {name: [value] for name, value in values.items() if accepts(name)}

    def outcome(result: list) -> float:
        (value,) = result
        return 0.0 if value is None else value

    return _calling(function, reward, arguments, outcome)


def _calling(function: Callable, reward: str, arguments: Callable, outcome: Callable) -> RewardFunction:
    """What goes wrong before the user's function is called is no fault of a sample, so that none may score 0 for it."""

    def run(response: str, row: dict) -> float:
        try:
            given = arguments(response, row)
        except BadReward:
            raise
        except Exception as error:
            raise BadReward(f'reward "{reward}" cannot be given a row: {type(error).__name__}: {error}') from error
        return outcome(function(**given))

    return run


def _accepted(function: Callable) -> Callable[[str], bool]:
    parameters = inspect.signature(function).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return lambda name: anything or name in parameters
