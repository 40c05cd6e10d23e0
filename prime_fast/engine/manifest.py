"""What a checkpoint consists of: manifest.json holds the size and the SHA-256 of every file in it.

It finds damage (a torn copy, a bad disk, a file that somebody changed), and that before a byte is parsed. It is not
signed: who can write into a checkpoint can write its manifest too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prime_fast import durable
from prime_fast.durable import Written

MANIFEST = "manifest.json"


def seal(directory: Path, files: Mapping[str, Written], score: float | None = None) -> None:
    """files: by their path in the checkpoint. score: of its weights on held-out rows, the higher the better."""
    known = {name: {"size": size, "sha256": sha256} for name, (size, sha256) in files.items()}
    content = {"score": score if score is not None and math.isfinite(score) else None, "files": known}
    text = json.dumps({"sha256": _digest(content), **content}, indent=1)
    durable.replace(directory / MANIFEST, text)


def score(directory: Path) -> float | None:
    content = _read(directory)
    return content["score"] if isinstance(content, dict) else None


def forget_score(directory: Path) -> None:
    content = _read(directory)
    if isinstance(content, dict) and content["score"] is not None:
        seal(directory, {name: Written(**made) for name, made in content["files"].items()})


def problem(directory: Path, part: str = "", worker: int = 0, workers: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None: a file that is missing, has another size or other bytes, or is none of
    it. Names with a dot in front do not count.

    part: look at this folder alone. worker, workers: of the bytes only the worker-th of so many shares.
    """
    content = _read(directory)
    if isinstance(content, str):
        return content
    files = {name: made for name, made in content["files"].items() if name.startswith(part)}
    for name, made in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != made["size"]:
            return f"{name} has {size} bytes instead of {made['size']}"
    for path in sorted((directory / part).rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in files and name != MANIFEST and not path.name.startswith("."):
            return f"{name} is none of its files"
    for name in sorted(files, key=lambda name: files[name]["size"])[worker::workers]:
        try:
            found = durable.sha256(directory / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != files[name]["sha256"]:
            return f"{name} holds other bytes than were written (its SHA-256 differs)"
    return None


def _read(directory: Path) -> dict[str, Any] | str:
    """Its content, or what is wrong with it."""
    try:
        content = json.loads((directory / MANIFEST).read_text("utf-8"))
        intact = content.pop("sha256") == _digest(content)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, AttributeError, KeyError):
        intact = False
    return content if intact else f"{MANIFEST} is damaged"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
