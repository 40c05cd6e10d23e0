"""The settings in a launch script, a list of Hydra overrides, or a Hydra YAML: one flat mapping."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prime_fast import yaml_text

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
KEY = r"([A-Za-z_]\w*(?:\.\w+)+)"  # dotted, as no shell variable is
OVERRIDE = re.compile(rf"\+*{KEY}=(.*)", re.DOTALL)
DELETION = re.compile(rf"~{KEY}(?:=.*)?", re.DOTALL)
VARIABLE = re.compile(r"(?<!\\)\$(?:\{(\w+|[@*])\}|(\w+|[@*#?]))")
ARITHMETIC = re.compile(r"\$\(\(((?:[^()]|\([^()]*\))*)\)\)")
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}
REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # of Hydra
Lookup = Callable[[str], list[str] | None]  # a variable's name -> its words, several if it is an array; None: not known


def settings_of(text: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """{dotted key: value}, of a later setting where one comes twice.

    A script's variables are those that it assigns before, then those of `environment`. It is read, not run: what other
    programs compute for it, `$(...)`, and variables that are none of those stay as they stand. A key that is deleted
    (`~key`) has the value None. Raises ValueError where there is no setting at all.
    """
    if text.startswith("- ") and isinstance(listed := yaml_text.read(text), list):  # .hydra/overrides.yaml
        found = dict(pair for pair in map(_setting, map(str, listed)) if pair)
    else:
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

    def value_of(name: str) -> list[str] | None:
        known = [environment[name]] if name in environment else None
        return variables.get(name, known)

    for words in _commands(text):
        for word in words:
            plain = _unquoted(word, value_of)
            settings = [pair for pair in map(_setting, plain) if pair]
            if settings:  # several of an array
                yield from settings
            elif assigned := ASSIGNMENT.fullmatch(word):
                name, adds, value = assigned.groups()
                before = (value_of(name) or []) if adds else []
                if value.startswith("("):
                    inner = (word for words in _commands(value[1:-1]) for word in words)
                    variables[name] = before + [part for word in inner for part in _unquoted(word, value_of)]
                else:
                    variables[name] = ["".join(before + _unquoted(value, value_of, splits=False))]


def _setting(text: str) -> tuple[str, Any] | None:
    if deleted := DELETION.fullmatch(text):
        return deleted[1], None
    if not (found := OVERRIDE.fullmatch(text)):
        return None
    try:
        return found[1], yaml_text.read(found[2])
    except ValueError:
        return found[1], found[2]


def _commands(text: str) -> Iterator[list[str]]:
    """The words of each command, with their quotes; whitespace within quotes or parentheses ends none."""
    words, word, quote, depth, comment, literal = [], "", "", 0, False, False
    text = (text + "\n").replace("\\\n", "\r")  # a line that goes on, unless it is a comment
    for before, character in zip("\n" + text, text, strict=False):
        literal = before == "\\" and not literal and quote != "'"  # behind a backslash
        ends = (character in "\n\r;|&" or character.isspace()) and not literal
        comment = comment and character not in "\n\r"
        if comment or (character == "#" and before.isspace() and not quote):
            comment = True
            continue
        if literal:
            pass
        elif quote:
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
        if character in "\n;|&":
            yield words
            words, depth = [], 0


def _unquoted(word: str, value_of: Lookup, splits: bool = True) -> list[str]:
    """What bash makes of a word: quotes removed, variables filled in outside of single ones. An array gives several,
    and so does a variable with blanks in it that is the whole word, without quotes, if the word `splits`."""
    array = re.fullmatch(r'"?\$\{(\w+)\[[@*]\]\}"?', word)
    if array:
        return value_of(array[1]) or []
    whole = re.fullmatch(r"\$(?:\{(\w+)\}|(\w+))", word)
    if whole and splits:
        return [part for known in value_of(whole[1] or whole[2]) or [word] for part in known.split()]
    word = _with_defaults(word, value_of)
    parts = re.findall(r"'[^']*'|\"(?:\\.|[^\"\\])*\"|(?:\\.|[^'\"\\])+", word, re.DOTALL)
    text = ""
    for part in parts:
        if part.startswith("'"):
            text += part[1:-1]
            continue

        def filled(match: re.Match) -> str:
            name = match[1] or match[2]
            known = [] if name in "@*#?" else value_of(name)
            return match[0] if known is None else " ".join(known)

        inner = part[1:-1] if part.startswith('"') else part
        named = ARITHMETIC.sub(lambda found: re.sub(r"(?<![$\w{])([A-Za-z_]\w*)", r"$\1", found[0]), inner)
        filled_in = ARITHMETIC.sub(_computed, VARIABLE.sub(filled, named))
        text += re.sub(r'\\(["$`\\])' if part.startswith('"') else r"\\(.)", r"\1", filled_in, flags=re.DOTALL)
    return [text]


def _with_defaults(word: str, value_of: Lookup) -> str:
    """With what is meant in the place of each ${NAME:-default}, whose default may hold others; also of := and :+."""
    while found := re.search(r"\$\{(\w+)(:?)([-=+])", word):
        depth, end = 1, found.end()
        while depth and end < len(word):
            depth += (word[end] == "{") - (word[end] == "}")
            end += 1
        other = "".join(_unquoted(word[found.end() : end - 1], value_of, splits=False))
        known = value_of(found[1])
        counts = known is not None and (not found[2] or any(known))  # with a colon an empty one is as none
        meant = other if counts == (found[3] == "+") else "" if known is None else " ".join(known)
        word = word[: found.start()] + meant + word[end:]
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
