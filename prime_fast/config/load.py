"""YAML file + key=value overrides -> one validated tree, or one sentence that says what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ValidationError

from prime_fast import durable, yaml_text
from prime_fast.config.sections import section_of
from prime_fast.config.tree import Config
from prime_fast.values import check_name, describe, key_of, shortened

REPLACED = {
    "model.gradient_checkpointing": "model.recompute has taken its place: all is true, none is false, and without it "
    "as few layers are recomputed as fit"
}


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, in the order of declaration."""
    keys = []
    for name, field in section.model_fields.items():
        if below := section_of(field.annotation):
            keys += known_keys(below, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides (dotted keys, YAML values) and validate the result.

    Raises ValueError with one sentence that names the key, what it got and the fix (the nearest key for a typo).
    """
    tree = _read(path)
    for key, value in parse_assignments(overrides).items():
        _set(tree, key, value)
    return make_config(tree, f"{path}: ")


def make_config(tree: dict, where: str = "") -> Config:
    """The tree validated; ValueError with one sentence, which begins with `where`."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{where}{_explain(error)}") from error


def _read(path: str | Path) -> dict:
    example = "give the path of a YAML file such as configs/quickstart.yaml"
    try:
        text = Path(check_name(str(path))).read_text("utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"config file {path} does not exist; {example}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config file {path} is not text in UTF-8; {example}") from error
    except OSError as error:  # a directory, no permission, ...
        raise ValueError(f"config file {path} cannot be read ({error.strerror}); {example}") from error
    try:
        tree = yaml_text.read(text)
    except ValueError as error:
        raise ValueError(f"config file {path} {error}") from error
    if not isinstance(tree, dict | None):
        raise ValueError(f"config file {path} must hold a mapping of keys, got {type(tree).__name__}")
    return tree or {}


def parse_assignments(words: Iterable[str]) -> dict[str, object]:
    """{key: YAML value} of words `key=value`; ValueError naming one that is not."""
    assignments = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise ValueError(f"override {shortened(word)} is not of the form key=value")
        try:
            assignments[key] = yaml_text.read(value)
        except ValueError as error:
            raise ValueError(f"override {shortened(word)}: its value {error}") from error
    return assignments


def save_config(config: Config, path: str | Path) -> None:
    durable.replace(Path(path), yaml_text.write(config.model_dump(mode="json")))


def _set(tree: dict, dotted: str, value: object) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        section = tree.get(parent)
        if not isinstance(section, dict | None):
            raise ValueError(
                f"override {dotted:.80}: {parent:.80} is a value, not a section; see the config file for its keys"
            )
        tree[parent] = dict(section or {})  # a copy: an alias may name the same section elsewhere
        tree = tree[parent]
    tree[leaf] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = key_of(first)
    if key in REPLACED:
        return f"key {key} is gone; {REPLACED[key]}"
    if first["type"] == "extra_forbidden":
        keys = known_keys()
        leaf = {name.rsplit(".", 1)[-1]: name for name in keys}
        near = difflib.get_close_matches(key, keys, 1, 0.5) or [
            leaf[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaf, 1, 0.5)
        ]
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(keys)}"
        return f"unknown key {key}; {hint}"
    if first["type"] == "missing":
        return f"key {key} is required and missing"
    return describe(first) if key else str(first["ctx"]["error"])
