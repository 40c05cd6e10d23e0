"""One self-contained HTML page of responses with a number for each token."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prime_fast.views.show import record as records
from prime_fast.views.show.record import PER_TOKEN, NoJson, parsed, steps_of, tokens_file, visible

PAGE_BYTES = 32 << 20  # of the records that a page is made of
NAMED = 12  # steps or rows that a message lists
TEMPLATE = Path(__file__).with_name("page.html")


class Line(NamedTuple):
    """Where a record is, and what chooses it."""

    start: int  # byte of the file
    size: int
    number: int
    step: int | None
    row: int
    group: tuple  # the same for the responses that stand side by side


class Choice(NamedTuple):
    """Groups of records, and what of the file they are, in words."""

    groups: list[list[dict[str, Any]]]
    note: str


def show(source: str, out: str | None = None, step: int | None = None, row: int | None = None) -> tuple[Path, str]:
    """Write the page; returns its path and what is on it.

    source: a run_dir, or a file of JSON lines as record.py describes them. out: by default report/show.html in the run,
    or beside the file. step, row: only these; `row` is a record's, else the number of its line from 0.
    Raises ValueError where there is none, or a line is no such record.
    """
    file = tokens_file(source)
    choice = choose(file, step, row)
    default = Path(source) / "report/show.html" if Path(source).is_dir() else file.with_suffix(".html")
    path = Path(out) if out else default
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(str(source), choice), encoding="utf-8")
    return path, choice.note


def choose(file: Path, step: int | None, row: int | None, limit: int = PAGE_BYTES) -> Choice:
    """The groups of this step and row. Of more than fits in, every second, third, ... step, and the last."""
    lines = list(_lines(file))
    if not lines:
        raise ValueError(f"{file} holds no response yet")
    if step is not None:
        lines = _only(lines, "step", step, f"{file} has no response of step {step}")
    if row is not None:
        among = "" if step is None else f" in step {step}"
        lines = _only(lines, "row", row, f"{file} has no response to row {row}{among}")
    by_step = lines[0].step is not None and lines[-1].step != lines[0].step
    sizes: dict[Any, int] = {}
    for line in lines:
        part = line.step if by_step else line.group
        sizes[part] = sizes.get(part, 0) + line.size
    kept, stride = list(sizes), 1
    while len(kept) > 1 and sum(map(sizes.get, kept)) > limit:
        stride += 1
        kept = list(sizes)[::-1][::stride][::-1]
    chosen = set(kept)
    groups: dict[tuple, list[dict]] = {}
    with open(file, "rb") as opened:
        for line in lines:
            if (line.step if by_step else line.group) in chosen:
                opened.seek(line.start)
                groups.setdefault(line.group, []).append(parsed(opened.read(line.size), f"{file} line {line.number}"))
    return Choice(list(groups.values()), _note(list(groups.values()), len(kept), len(sizes), by_step))


def page(title: str, choice: Choice) -> str:
    """The HTML, with all it needs in it. What models have written is JSON there, and only ever becomes text."""
    found = {"title": visible(title), "note": choice.note, "scale": scales(choice.groups)}
    found["groups"] = [_group(group) for group in choice.groups]
    data = json.dumps(found, allow_nan=False, separators=(",", ":"))  # ASCII alone
    for character in "<>&":  # nothing in it ends the script element
        data = data.replace(character, f"\\u{ord(character):04x}")
    template = TEMPLATE.read_text("utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # no other script runs in the page
    return template.replace("{{script}}", f"sha256-{digest}", 1).replace("{{data}}", data, 1)


def scales(groups: list[list[dict[str, Any]]]) -> dict[str, float]:
    """What gets the full colour on this page: of a token's reward and advantage, and of a step's sum of rewards."""
    responses = [response for group in groups for response in group]
    found = {name: records.scale(r[name] for r in responses if name in r) for name in ("reward", "advantage")}
    sums = ([sum(r["reward"][start:end]) for start, end in steps_of(r)] for r in responses if "reward" in r)
    return found | {"step": records.scale(sums)}


def _group(group: list[dict[str, Any]]) -> dict[str, Any]:
    first, names = group[0], [*PER_TOKEN, "outcome", "truncated"]
    about = {name: first[name] for name in ("step", "row") if first.get(name) is not None}
    responses = [
        {name: response[name] for name in names if response.get(name) is not None}
        | {"pieces": [visible(piece) for piece in response["pieces"]], "steps": steps_of(response)}
        for response in group
    ]
    return about | {"prompt": visible(first.get("prompt") or ""), "responses": responses}


def _lines(file: Path) -> Iterator[Line]:
    """Where the records are; a line that a kill has left half-written at the end is left out."""
    start = 0
    with open(file, "rb") as opened:
        for number, text in enumerate(opened, 1):
            try:
                found = parsed(text, f"{file} line {number}") if text.strip() else None
            except NoJson:
                if text.endswith(b"\n"):
                    raise
                return
            if found:
                step, *together = map(found.get, ("step", "group", "row"))
                together = next((pair for pair in enumerate(together) if pair[1] is not None), (2, number))
                row = number - 1 if found.get("row") is None else found["row"]
                yield Line(start, len(text), number, step, row, (step, *together))
            start += len(text)


def _only(lines: list[Line], name: str, wanted: int, nothing: str) -> list[Line]:
    found = [line for line in lines if getattr(line, name) == wanted]
    if found:
        return found
    there = sorted({getattr(line, name) for line in lines} - {None})
    if not there:
        raise ValueError(f"{nothing}: its responses have no {name}; leave --{name} away")
    listed = ", ".join(map(str, there[:NAMED]))
    more = f", ... {there[-1]}" if len(there) > NAMED else ""
    raise ValueError(f"{nothing}; there {'is' if len(there) == 1 else 'are'} {listed}{more}")


def _note(groups: list[list[dict]], kept: int, there: int, by_step: bool) -> str:
    responses, unit = sum(map(len, groups)), "step" if by_step else "group"
    words = f"{responses:,} response{'s' * (responses != 1)}"
    words += f" in {len(groups):,} groups" if len(groups) > 1 else ""
    if kept < there:
        return f"{words}: {kept:,} of {there:,} {unit}s fit in, evenly spread"
    return f"{words}, {there:,} steps" if by_step else words
