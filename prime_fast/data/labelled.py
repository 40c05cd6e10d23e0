"""Responses that are known to be good or bad: what a PRM is trained on and judged by.

A row holds one or several, beside a prompt in any of the shapes of `shapes`:

response      {"response": text, "label": 0 to 1}
responses     {"responses": [text, ...], "label" or "labels": [0 to 1, ...]}: what `prime-fast rollouts` writes
conversation  {"response" or "messages": [turn, ...], "label"}, the last turn the assistant's: EurusPRM's, ImplicitPRM's
completions   {"prompt": text of a user, "completions": [text, ...], "correctness": [bool, ...]}: ImplicitPRM's rollouts
pairs         {"chosen": text or conversation, "rejected": the same}
steps         {"steps": [text, ...], "label": the first wrong one from 0, or -1, "final_answer_correct"}: ProcessBench's

`truncated` (true, or a list) marks responses that were cut off: no EOS follows them. `step_labels` (0 to 1 each) are of
the parts of a response that end with a separator, or of `steps`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from prime_fast.data import rows as tokenised
from prime_fast.data import sources
from prime_fast.data.rows import Answer, Rows
from prime_fast.data.shapes import normalise, shape_of, text_of
from prime_fast.data.template import Template

OURS = {"response", "responses", "label", "labels", "step_labels", "steps", "truncated", "ends", "part"}
OURS |= {"completions", "correctness", "chosen", "rejected", "final_answer_correct"}
STEP_END = "\n\n"  # joins the steps of a row that has nothing but them
REMEDY = "data.max_prompt or rollout.max_response"


@dataclass(frozen=True)
class Labelled:
    """rows: with `response`, its token ids and `label`; if it is not cut, with `step_ends`, the characters that precede
    the end of each of its steps, and with `step_labels`.
    label: (R,) float64, nan where there is none. group: (R,) int64, one number for the responses to one prompt, of cut
    ones for those of as many steps. tokens: (R,) int64, of the response."""

    rows: Rows
    label: np.ndarray
    group: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> Labelled:
        return Labelled(self.rows.select(indices), self.label[indices], self.group[indices], self.tokens[indices])

    def sample(self, limit: int) -> Labelled:
        """About `limit` of them, of prompts with all their responses; always the same random ones."""
        _, group, sizes = np.unique(self.group, return_inverse=True, return_counts=True)
        order = np.random.default_rng(0).permutation(len(sizes))
        chosen = order[: np.searchsorted(np.cumsum(sizes[order]), limit) + 1]
        return self.select(np.flatnonzero(np.isin(group, chosen)))

    def digest(self) -> str:
        """Of all token ids."""
        made = sha256()
        for name in ("prompt_ids", "response_ids"):
            for part in self.rows.column(name):
                made.update(np.diff(part.offsets.to_numpy()).tobytes() + _values(part).tobytes())
        return made.hexdigest()


class Reading(NamedTuple):
    """How rows become responses.

    cut: a response with `step_labels` becomes one row for each of its steps, which ends with it; its label is the
        smallest so far. Responses without stay whole.
    separators: a regular expression; each match ends a step of a response that is not given as `steps`.
    unlabelled: responses without a label are taken too.
    numbered: `Step 1: ` and so on begins the steps of a row that has nothing but them, as EurusPRM's responses have it.
    """

    cut: bool = True
    separators: str = "\n"
    unlabelled: bool = False
    numbered: bool = False


READING = Reading()


def load_labelled(
    paths: str | Sequence[str],
    tokenizer: Any,
    *,
    max_tokens: int,
    reading: Reading = READING,
    limit: int | None = None,
    drop: Collection[str] = (),
    template: str = "auto",
    template_args: dict[str, Any] | None = None,
) -> Labelled:
    """Tokenised responses, one a row.

    max_tokens: of prompt and response together; longer rows are dropped and counted.
    Everything else, and the errors, as in `rows.load_rows`.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so a response could not end; set its eos_token")

    def read(name: str) -> tuple[str, Iterator[sources.Item]]:
        return "labelled", _exploded(name, reading)

    def prepare(row: dict, shape: str) -> Answer:
        return Answer(row["response"], row["ends"], row["label"], row["part"])

    how = Template(tokenizer, template, template_args)
    options = ["labelled", *reading]
    rows = tokenised.load(paths, how, prepare, options, max_tokens, limit, drop, REMEDY, read)
    part = _joined(rows, "part")
    lengths = [np.diff(ids.offsets.to_numpy()) for ids in rows.column("response_ids")]
    return Labelled(rows, _joined(rows, "label"), _groups(rows, part), np.concatenate(lengths).astype(np.int64))


def steps_of(response: str, separators: str) -> list[str]:
    """The response in parts that end with a match of the regular expression; blank ones belong to those before."""
    ends = [match.end() for match in re.finditer(separators, response) if match.end() > 0]
    parts: list[str] = []
    for start, end in zip([0, *ends], [*ends, len(response)], strict=True):
        if parts and not response[start:end].strip():
            parts[-1] += response[start:end]
        elif start < end:
            parts.append(response[start:end])
    return parts


def ends_of(response: str, steps: Sequence[str]) -> list[int]:
    """Where each step ends in the response, with the blanks that follow it; the last one where the response does."""
    ends, end = [], 0
    for step in steps:
        start = response.find(step, end)
        if start < 0:
            raise ValueError(f"has a step that is not in its response: {step!r:.60}")
        end = start + len(step)
        ends.append(end + len(response[end:]) - len(response[end:].lstrip()))
    return [*ends[:-1], len(response)]


def _exploded(name: str, reading: Reading) -> Iterator[sources.Item]:
    for number, row in sources.read_raw(name):
        where = sources.Where(name, number)
        try:
            if isinstance(row, ValueError):
                raise row
            made = list(_responses(row, reading))
        except ValueError as error:
            yield where, ValueError(f"{where} {error}")
            continue
        yield from ((where, one) for one in made)


def _responses(row: Any, reading: Reading) -> Iterator[dict]:
    """Each response of a row, or each of its cut ones, as a row. ValueError, a sentence without its subject."""
    if not isinstance(row, dict):
        raise ValueError(f"is not an object but {type(row).__name__}")
    base = {key: value for key, value in row.items() if key not in OURS}
    for prompt, text, label, truncated, steps, step_labels in _found(row, reading.numbered):
        if not isinstance(text, str) or not text:
            raise ValueError(f"has a response that is no text or an empty one but {text!r:.60}")
        if label is None and not reading.unlabelled and not (reading.cut and step_labels):
            raise ValueError("has a response without a label")
        asked = base | prompt
        whole = normalise(asked, shape_of(asked) or "verl") | {"response": text, "ends": not truncated, "part": 0}
        whole["label"] = None if label is None else _number("label", label)
        labels = [_number("step_labels", value) for value in step_labels or ()]
        ends = ends_of(text, steps if steps is not None else steps_of(text, reading.separators))
        if labels and len(labels) != len(ends):
            raise ValueError(f"has {len(labels)} step_labels for a response of {len(ends)} steps")
        if not labels or not reading.cut:
            yield whole | {"step_ends": ends, "step_labels": labels}
            continue
        if not ends[0]:
            raise ValueError("has an empty first step, of which there is nothing to learn")
        for k, end in enumerate(ends, 1):
            last = k == len(ends)
            yield whole | {"response": text[:end], "ends": last and not truncated, "label": min(labels[:k]), "part": k}


def _found(row: dict, numbered: bool) -> Iterator[tuple[dict, Any, Any, bool, list[str] | None, Any]]:
    """(what its prompt is where that is not in the row, text, label, truncated, steps, labels of steps) of each."""
    label = row["label"] if row.get("label") is not None else row.get("labels")
    if row.get("chosen") is not None and row.get("rejected") is not None:
        for key, value in (("chosen", 1), ("rejected", 0)):
            prompt, text = _split(row[key])
            yield prompt, text, value, False, None, None
    elif row.get("completions") is not None:
        if not isinstance(row.get("prompt"), str):
            raise ValueError(f"has completions of a prompt that is no text but {row.get('prompt')!r:.60}")
        prompt = {"prompt": [{"role": "user", "content": row["prompt"]}]}
        given = row["correctness"] if row.get("correctness") is not None else label
        yield from ((prompt, *one) for one in _several(row, row["completions"], given))
    elif row.get("responses") is not None:
        yield from (({}, *one) for one in _several(row, row["responses"], label))
    elif row.get("response") is None and _are_texts(row.get("steps")):
        yield _process_bench(row, label, numbered)
    else:
        given = row["response"] if row.get("response") is not None else row.get("messages")
        if given is None:
            raise ValueError("has no response: it has none of response, responses, completions, chosen and steps")
        prompt, text = _split(given)
        steps = row["steps"] if _are_texts(row.get("steps")) else None
        yield prompt, text, label, _flag(row.get("truncated")), steps, row.get("step_labels")


def _several(row: dict, texts: Any, labels: Any) -> Iterator[tuple[Any, Any, bool, None, Any]]:
    columns = []
    for name, values in (
        ("labels", labels),
        ("truncated", row.get("truncated")),
        ("step_labels", row.get("step_labels")),
    ):
        if values is not None and (not isinstance(values, list) or not isinstance(texts, list)):
            raise ValueError(f"has several responses, whose {name} must be a list, not {values!r:.60}")
        if values is not None and len(values) != len(texts):
            raise ValueError(f"has {len(texts)} responses and {len(values)} {name}")
        columns.append(values if values is not None else [None] * len(texts))
    for text, label, truncated, step_labels in zip(texts, *columns, strict=True):
        yield text, label, _flag(truncated), None, step_labels


def _process_bench(row: dict, label: Any, numbered: bool) -> tuple[dict, str, Any, bool, list[str], Any]:
    """The labels of steps behind the first wrong one are 0 as well: what they are a part of is wrong."""
    steps, step_labels = row["steps"], row.get("step_labels")
    if numbered:
        steps = [f"Step {k}: {step}" for k, step in enumerate(steps, 1)]
    text = STEP_END.join(steps)
    if "final_answer_correct" in row:
        if not isinstance(label, int) or not -1 <= label < len(steps):
            raise ValueError(f"has steps and a label {label!r:.60}, which is neither -1 nor the number of one from 0")
        right = len(steps) if label == -1 else label
        step_labels, label = [1] * right + [0] * (len(steps) - right), row["final_answer_correct"]
    return {}, text, label, False, steps, step_labels


def _split(response: Any) -> tuple[dict, Any]:
    """A conversation as its prompt and the text of its last turn; a text as it is."""
    if not isinstance(response, list):
        return {}, response
    turns = all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in response)
    if len(response) < 2 or not turns or response[-1]["role"] != "assistant":
        raise ValueError("has a response of messages whose last turn is not the assistant's after a prompt")
    return {"prompt": response[:-1], "messages": None}, text_of(response[-1]["content"])


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _flag(truncated: Any) -> bool:
    if truncated not in (None, False, True):
        raise ValueError(f"has truncated {truncated!r:.60}, which is neither true nor false")
    return bool(truncated)


def _number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"has {key} {value!r:.60}, which is no number from 0 to 1")
    return float(value)


def _groups(rows: Rows, part: np.ndarray) -> np.ndarray:
    numbers: dict[tuple[bytes, int], int] = {}
    parts, groups = iter(part.tolist()), []
    for ids in rows.column("prompt_ids"):
        values, offsets = _values(ids), ids.offsets.to_numpy() - ids.offsets[0].as_py()
        for start, end in zip(offsets, offsets[1:], strict=False):
            groups.append(numbers.setdefault((values[start:end].tobytes(), next(parts)), len(numbers)))
    return np.array(groups, dtype=np.int64)


def _joined(rows: Rows, name: str) -> np.ndarray:
    return np.concatenate([part.to_numpy(zero_copy_only=False) for part in rows.column(name)])


def _values(ids: Any) -> np.ndarray:
    """Of an array of lists, the values that are its own, end to end."""
    return ids.flatten().to_numpy()
