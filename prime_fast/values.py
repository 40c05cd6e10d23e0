"""What may stand behind a key of the configuration: types with their ranges, and what is said of a wrong value."""

from __future__ import annotations

import difflib
import json
import re
import reprlib
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, JsonValue, ValidationError

from prime_fast.watch import WATCHERS

LARGEST = (1 << 31) - 1  # of a count
DAY = 86400.0  # seconds
ALL_LINEAR = "all-linear"  # layers that an adapter may be put on
RECOMPUTE = ("auto", "none", "attention-saved", "all")
ANSWERS = ("solution", "reasoning", "ground_truth")  # what sft.response may name
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def shortened(value: Any) -> str:
    """On one line, however long, large or nested it is."""
    return _REPR.repr(value)


def key_of(error: dict[str, Any]) -> str:
    """The dotted key that one of pydantic's errors is about."""
    key = ".".join(str(part) for part in error["loc"])
    return key if key.isprintable() and len(key) < 80 else shortened(key)


def describe(error: dict[str, Any]) -> str:
    """key=value: what is wrong with it."""
    message = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    return f"{key_of(error)}={shortened(error['input'])}: {message[0].lower() + message[1:]}"


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


def check_name(value: str) -> str:
    if not value.isprintable():
        raise ValueError("control characters cannot be part of a path or name")
    if len(value.encode()) > 4095 or max(len(part.encode()) for part in value.split("/")) > 255:
        raise ValueError("no path or name is that long")
    return value


def _token(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("a token is given as its text or its id")
    str(value).encode()
    return value


def _plain(value: dict) -> dict:
    """Raises ValueError unless it is JSON as others read it: no nan, no infinity, whole characters."""
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    return value


def _recompute(value: Any) -> Any:
    if value in RECOMPUTE or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST):
        return value
    raise ValueError(f"give {', '.join(RECOMPUTE)}, or how many layers are recomputed")


def _targets(value: Any) -> Any:
    if value == ALL_LINEAR or (isinstance(value, list) and value and all(isinstance(name, str) for name in value)):
        return value
    raise ValueError(f"give {ALL_LINEAR}, or a list of linear layers such as [q_proj, v_proj]")


def _separators(value: Any) -> Any:
    if isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"this is no regular expression: {error}") from error
        value.encode()
        return value
    if isinstance(value, list) and all(type(i) is int and 0 <= i <= LARGEST for i in value) and value:
        return value
    raise ValueError("give a regular expression, or a list of token ids")


def _answer(template: str) -> str:
    template.encode()
    for _, name, specification, conversion in Formatter().parse(template):
        if name is not None and (name not in ANSWERS or specification or conversion):
            raise ValueError(
                f"only {{{'}, {'.join(ANSWERS)}}} can be filled in, and braces meant literally are doubled"
            )
    return template


def _watched(name: str) -> str:
    if name in WATCHERS:
        return name
    near = difflib.get_close_matches(name, WATCHERS, 1, 0.5)
    raise ValueError(
        f"no watcher has this name; did you mean {near[0]}?" if near else f"give one of {', '.join(WATCHERS)}"
    )


Number = BeforeValidator(_no_bool)
NotNegative = Annotated[int, Number, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Number, Field(gt=0, le=LARGEST)]
Rate = Annotated[float, Number, Field(ge=0, allow_inf_nan=False)]
Discount = Share = Annotated[float, Number, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1), AfterValidator(check_name)]
Paths = Annotated[list[Name], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Tokens = Annotated[
    list[Annotated[int | str, BeforeValidator(_token)]],
    BeforeValidator(lambda value: [value] if isinstance(value, int | str) else value),
]
Separators = Annotated[str | list[int], BeforeValidator(_separators)]
Recompute = Annotated[int | str, BeforeValidator(_recompute)]
Targets = Annotated[str | list[str], BeforeValidator(_targets)]
Arguments = Annotated[dict[str, JsonValue], AfterValidator(_plain)]
Watched = Annotated[str, AfterValidator(_watched)]
Limits = dict[Watched, Annotated[float, Number, Field(allow_inf_nan=False)] | None]
Answer = Annotated[str, AfterValidator(_answer)]


class OwnVllmOptions(BaseModel):
    """Those of rollout.vllm that we read ourselves; the others are for vLLM to judge. Only the types count here."""

    gpus: list[NotNegative] | None = None
    sleep_level: Literal[0, 1, 2] = 2
    bucket_mib: Positive = 1
    tensor_parallel_size: Annotated[int, Number, Field(gt=0, le=1024)] = 1
    gpu_memory_utilization: Annotated[float, Number, Field(gt=0, le=1)] = 0.9
    kv_cache_memory_bytes: Annotated[int, Number, Field(gt=0, lt=1 << 63)] | None = None


def _vllm(value: dict) -> dict:
    try:
        OwnVllmOptions.model_validate(value)
    except ValidationError as error:
        raise ValueError(describe(error.errors()[0])) from error
    return value


VllmArguments = Annotated[Arguments, AfterValidator(_vllm)]
