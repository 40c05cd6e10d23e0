"""The settings in a launch script, a list of Hydra overrides, or a Hydra YAML: one flat mapping."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prime_fast import yaml_text

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
OVERRIDE = re.compile(r"[+~]*([A-Za-z_]\w*(?:\.\w+)+)=(.*)", re.DOTALL)  # a dotted key, which no shell variable has
VARIABLE = re.compile(r"\$(?:\{(\w+|[@*])\}|(\w+|[@*#?]))")
ARITHMETIC = re.compile(r"\$\(\(((?:[^()]|\([^()]*\))*)\)\)")
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}
REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # of Hydra
Lookup = Callable[[str, str], list[str]]  # a variable's name and default -> its words, several if it is an array


def settings_of(text: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """{dotted key: value}, of a later setting where one comes twice.

    A script's variables are those that it assigns before, then those of `environment`. It is read, not run: what other
    programs compute for it, `$(...)`, stays as it stands. Raises ValueError where there is no setting at all.
    """
    found = dict(_overrides(text, environment))
    if not found and isinstance(tree := yaml_text.read(text), dict):
        found = dict(_flat(tree))
    if not found:
        raise ValueError("no setting of the form section.key=value, or YAML with sections, was found")
    return {key: _followed(value, found) for key, value in found.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _followed(value: Any, settings: Mapping[str, Any]) -> Any:
    """With Hydra's ${other.key} in the place of which that value comes."""
    for _ in range(8):  # a reference to a reference, and no circle without end
        whole = REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if whole is None or whole[1] not in settings:
            break
        value = settings[whole[1]]
    if isinstance(value, str):
        return REFERENCE.sub(lambda name: str(settings.get(name[1], name[0])), value)
    return value


def _overrides(text: str, environment: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    variables: dict[str, list[str]] = {}

    def value_of(name: str, default: str) -> list[str]:
        return variables.get(name) or [environment.get(name, default)]

    for words in _commands(text):
        for word in words:
            plain = _unquoted(word, value_of)
            settings = [found for found in map(OVERRIDE.fullmatch, plain) if found]
            if settings:  # several of an array
                yield from ((found[1], _value(found[2])) for found in settings)
            elif (assigned := ASSIGNMENT.fullmatch(word)) and assigned[2].startswith("("):
                inner = (word for words in _commands(assigned[2][1:-1]) for word in words)
                variables[assigned[1]] = [part for word in inner for part in _unquoted(word, value_of)]
            elif assigned:
                variables[assigned[1]] = _unquoted(assigned[2], value_of)


def _value(text: str) -> Any:
    try:
        return yaml_text.read(text)
    except ValueError:
        return text


def _commands(text: str) -> Iterator[list[str]]:
    """The words of each command, with their quotes; whitespace within quotes or parentheses ends none."""
    words, word, quote, depth, comment = [], "", "", 0, False
    text = (text + "\n").replace("\\\n", "\r")  # a line that goes on, unless it is a comment
    for before, character in zip("\n" + text, text, strict=False):
        ends = character in "\n\r;" or character.isspace()
        comment = comment and character not in "\n\r"
        if comment or (character == "#" and before.isspace() and not quote):
            comment = True
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character == "(") - (character == ")")
        if not ends or quote or depth > 0:
            word += character
            continue
        words += [word] if word else []
        word = ""
        if character in "\n;":
            yield words
            words, depth = [], 0


def _unquoted(word: str, value_of: Lookup) -> list[str]:
    """What bash makes of a word: quotes removed, variables filled in outside of single ones; an array gives several."""
    array = re.fullmatch(r'"?\$\{(\w+)\[@\]\}"?', word)
    if array:
        return value_of(array[1], "")
    word = _with_defaults(word, value_of)
    parts = re.findall(r"'[^']*'|\"(?:\\.|[^\"\\])*\"|[^'\"]+", word)
    text = ""
    for part in parts:
        if part.startswith("'"):
            text += part[1:-1]
            continue
        inner = part[1:-1].replace('\\"', '"').replace("\\$", "$") if part.startswith('"') else part

        def filled(match: re.Match) -> str:
            name = match[1] or match[2]
            return "" if name in "@*#?" else " ".join(value_of(name, ""))

        named = ARITHMETIC.sub(lambda found: re.sub(r"(?<![$\w{])([A-Za-z_]\w*)", r"$\1", found[0]), inner)
        text += ARITHMETIC.sub(_computed, VARIABLE.sub(filled, named))
    return [text]


def _with_defaults(word: str, value_of: Lookup) -> str:
    """With what is meant in the place of each ${NAME:-default}, whose default may hold others."""
    while found := re.search(r"\$\{(\w+):?-", word):
        depth, end = 1, found.end()
        while depth and end < len(word):
            depth += (word[end] == "{") - (word[end] == "}")
            end += 1
        default = "".join(_unquoted(word[found.end() : end - 1], value_of))
        word = word[: found.start()] + " ".join(value_of(found[1], default)) + word[end:]
    return word


def _computed(match: re.Match) -> str:
    """Of $((...)), with whole numbers; any other stays as it stands."""

    def of(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](of(node.left), of(node.right))
        raise ValueError

    try:
        return str(of(ast.parse(match[1].strip(), mode="eval").body))
    except (ValueError, SyntaxError, ZeroDivisionError):
        return match[0]
