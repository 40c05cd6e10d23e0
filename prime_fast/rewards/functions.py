"""Reward functions by name: the built-in ones, or a Python callable of the user's with verl's or TRL's signature."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ABILITIES = {"math": ("math",), "code": ("code",), "auto": ("math", "code")}  # of the rows each built-in one scores
STRICT = "-strict"
BUILT_IN = (*ABILITIES, *(name + STRICT for name in ABILITIES))
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


def load_reward(reward: str, timeout: float = 10.0, sandbox: str = "namespaces") -> RewardFunction:
    """The named reward as a function of (response, row); BadReward with one clear sentence if there is none.

    A verl function may return a dict with a "score". A TRL function is called with lists of length 1: prompts is
    [row["prompt"]] as it is; completions is [[{"role": "assistant", "content": response}]] if that prompt is a list of
    messages, else [response]; the columns are the row's other keys and `ground_truth`, each a list of one. Its None
    ("does not apply") counts as 0.0.
    """
    check_name(reward)
    if reward in BUILT_IN:
        return _built_in(reward, timeout, sandbox)
    function = _import(reward)
    names = inspect.signature(function).parameters
    if {"data_source", "solution_str", "ground_truth"} <= set(names):
        return _verl(function)
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
    return lambda response, row: graders[row.get("ability") or default](response, row["reward_model"]["ground_truth"])


def _import(reward: str) -> Callable:
    place, _, name = reward.rpartition(":")
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
        raise BadReward(f'reward "{reward}" cannot be imported: {type(error).__name__}: {error}') from error
    function = getattr(module, name, None)
    if not callable(function):
        raise BadReward(f'reward "{reward}": there is no function "{name}" in {place}')
    return function


def _verl(function: Callable) -> RewardFunction:
    accepts = _accepted(function)

    def run(response: str, row: dict) -> float:
        truth = row["reward_model"]["ground_truth"]
        extra = {"extra_info": row.get("extra_info")} if accepts("extra_info") else {}
        result = function(data_source=row.get("data_source"), solution_str=response, ground_truth=truth, **extra)
        return result["score"] if isinstance(result, dict) else result

    return run


def _trl(function: Callable, reward: str) -> RewardFunction:
    accepts = _accepted(function)
    parameters = inspect.signature(function).parameters.values()
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}

    def run(response: str, row: dict) -> float:
        prompt = row["prompt"]
        completion = response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]
        columns = {"ground_truth": row.get("reward_model", {}).get("ground_truth")} | row
        values = columns | {"prompts": prompt, "completions": completion}
        if missing := sorted(needed - values.keys()):
            raise BadReward(
                f'reward "{reward}" requires {missing}, which the rows do not have: they have {sorted(columns)}'
            )
        (result,) = function(**{name: [value] for name, value in values.items() if accepts(name)})
        return 0.0 if result is None else result

    return run


def _accepted(function: Callable) -> Callable[[str], bool]:
    parameters = inspect.signature(function).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return lambda name: anything or name in parameters
