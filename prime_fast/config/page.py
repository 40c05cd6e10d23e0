"""docs/settings.md, written from the configuration's own source: python -m prime_fast.config docs/settings.md

Keys, types and defaults come from the tree; what a key means is the comment above or beside it in the source.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import tokenize
from functools import cache

from pydantic import BaseModel

from prime_fast.config.sections import section_of
from prime_fast.config.tree import Config
from prime_fast.values import LARGEST

INTRODUCTION = """# Settings

Written from `prime_fast/config/sections.py` by `python -m prime_fast.config docs/settings.md`; a test compares them, so
change the source and not this page.

A configuration is a YAML file of these keys. `section.key=value` on the command line sets any of them, with a YAML
value behind the `=`. An unknown key is refused with the nearest name, a value that does not fit with one sentence.
`RUN_DIR/config.yaml` is the resolved tree of a run. The defaults are the published run's; *required* keys have none.

What they do together: [algorithm.md](algorithm.md) for `prime`, [credit.md](credit.md) for `prime.credit`,
[scaling.md](scaling.md) for `engine` and `rollout.vllm`, [rewards.md](rewards.md) for `reward`,
[watching.md](watching.md) for `watch`, [running.md](running.md) for `log`.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_section(Config, "")])


def _section(section: type[BaseModel], prefix: str) -> list[str]:
    """The tables of a section: its own keys, then those of the sections below it."""
    schema, told, below = section.model_json_schema(), descriptions(section), []
    lines = [f"## {prefix.rstrip('.') or 'The run'}", "", "| key | default | takes | |", "| --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        if found := section_of(field.annotation):
            below += _section(found, f"{prefix}{name}.")
            continue
        default = "*required*" if field.is_required() else f"`{_value(field.default)}`"
        cells = f"`{prefix}{name}`", default, takes(schema["properties"][name]), told.get(name, "")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return [*lines, "", *below]


def _value(value: object) -> str:
    """As YAML has it, on one line."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def takes(schema: dict) -> str:
    """What a key's JSON schema lets through, in words."""
    if "anyOf" in schema:
        return " or ".join(takes(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return f"{'whole number' if kind == 'integer' else 'number'}{_range(schema)}"
    if kind == "array" and "prefixItems" in schema:
        return "[" + ", ".join(takes(item) for item in schema["prefixItems"]) + "]"
    if kind == "array":
        return f"list of {takes(schema['items'])}"
    return {"string": "text", "boolean": "`true`, `false`", "object": "mapping", "null": "nothing"}[kind]


def _range(schema: dict) -> str:
    low, high = schema.get("ge", schema.get("gt")), schema.get("le", schema.get("lt"))
    high = None if high == LARGEST else high
    if "ge" in schema and "le" in schema and high is not None:
        return f" from {low:g} to {high:g}"
    words = [] if low is None else [f"{low:g} or more" if "ge" in schema else f"above {low:g}"]
    words += [] if high is None else [f"at most {high:g}" if "le" in schema else f"below {high}"]
    return " " + ", ".join(words) if words else ""


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """{key: the comment above or beside it}; a key of a parent class has the parent's unless it brings its own."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if issubclass(kind, BaseModel) and kind is not BaseModel:
            found |= _comments(kind)
    return found


@cache
def _comments(section: type[BaseModel]) -> dict[str, str]:
    source = inspect.getsource(section)
    lines = source.splitlines()
    comment = {
        token.start[0]: token.string.lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        first = node.lineno
        while lines[first - 2].lstrip().startswith("#"):
            first -= 1
        if told := [comment[line] for line in range(first, node.end_lineno + 1) if line in comment]:
            found[node.target.id] = " ".join(told)
    return found
