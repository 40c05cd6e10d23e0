"""One response with numbers for its tokens: a line of RUN/tokens.jsonl, and of any file that `prime-fast show` reads.

    pieces     [str]           the text of each token; joined they are the response, special tokens included
    reward     [float]         of each token: beta * (log PRM - log reference)
    advantage  [float]         of each token
    value      [float]         chance of success after each token, 0..1
    tokens     [int]           ids
    steps      [[int, int]]    first token and end of each step, one after the other; else steps are lines
    outcome    float           prompt  str, may be its end alone          truncated  bool
    step       int             of the training                            row        int, of the prompt in the data
    group      int             the same for the responses to one prompt that are shown together

All but `pieces` may be missing; in its place `response`, the text as one piece.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DIGITS = 4  # significant ones that are kept of a number
PER_TOKEN = {"reward": float, "advantage": float, "value": float, "tokens": int}
ABOUT = {"step": int, "row": int, "group": int, "outcome": float, "prompt": str, "truncated": bool}
LARGEST = 1e100  # number; beyond, sums have no end
JOINERS = "\n\t\u200c\u200d"  # characters without a picture of their own that belong into text


def record(tokens: Sequence[int], tokenizer: Any, **known: Any) -> dict[str, Any]:
    """The record of a response with these token ids. known: fields of it; numbers may be arrays or tensors on the CPU,
    and fields that are None are left out."""
    known = {name: value for name, value in known.items() if value is not None}
    numbers = {name: rounded(known.pop(name)) for name in PER_TOKEN if name in known}
    return known | {"pieces": pieces(tokens, tokenizer), "tokens": list(tokens)} | numbers


def pieces(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """The text that each token adds. A character whose bytes several tokens share is the last one's, and so are bytes
    at the end that are no character."""
    step, found = _decoder(tokenizer), []
    for token in tokens:
        found.append(step(token))
    if found:
        found[-1] += tokenizer.decode(tokens)[sum(map(len, found)) :]
    return found


def _decoder(tokenizer: Any) -> Callable[[int], str]:
    """Takes a text's tokens one by one and gives what each adds to it: '' in the middle of a character."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        return lambda token: stream.step(backend, token) or ""
    seen, whole = [], 0  # tokens since the last but one whole character; how many of them are in the text so far

    def step(token: int) -> str:
        nonlocal seen, whole
        seen.append(token)
        before, after = tokenizer.decode(seen[:whole]), tokenizer.decode(seen)
        if after.endswith("\ufffd"):
            return ""
        seen, whole = seen[whole:], len(seen) - whole
        return after[len(before) :]

    return step


def rounded(values: Any) -> list[float]:
    """To DIGITS significant digits, so that JSON writes no more."""
    x = np.asarray(values, np.float64)
    size = np.abs(x)
    digits = DIGITS - 1 - np.floor(np.log10(np.where(size > 0, size, 1.0)))
    unit = 10.0 ** np.clip(digits, -22, 22)  # powers that float64 holds exactly
    return (np.rint(x * unit) / unit).tolist()


class NoJson(ValueError):
    """A line that is none, as the last one is that a kill has left half-written."""


def parsed(line: str | bytes, where: str) -> dict[str, Any]:
    """A record out of a line of JSON; ValueError, which begins with `where`, if it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NoJson(f"{where} is not JSON ({error})") from None
    if not isinstance(found, dict) or not ("pieces" in found or isinstance(found.get("response"), str)):
        raise ValueError(f'{where} is no object with "pieces", the texts of a response\'s tokens')
    found.setdefault("pieces", [found.get("response")])
    count = len(found["pieces"]) if _all(found["pieces"], str) else 0
    if not count:
        raise ValueError(f'{where}: "pieces" is no list of texts')
    for name, kind in PER_TOKEN.items():
        if name in found and not (_all(found[name], kind) and len(found[name]) == count):
            raise ValueError(f'{where}: "{name}" is no list of {count} numbers, one for each of "pieces"')
    for name, kind in ABOUT.items():
        if found.get(name) is not None and not _all([found[name]], kind):
            raise ValueError(f'{where}: "{name}" is {found[name]!r}, no {kind.__name__}')
    if "steps" in found and not _are_steps(found["steps"], count):
        raise ValueError(f'{where}: "steps" are not [first, end] of one step after the other, from 0 to {count}')
    if "steps" in found:  # one that begins and ends within a token has no text of its own
        found["steps"] = [step for step in found["steps"] if step[0] < step[1]]
    return found


def _all(values: Any, kind: type) -> bool:
    types = {int, float} if kind is float else {kind}
    fits = isinstance(values, list) and set(map(type, values)) <= types
    return fits and (kind is not float or all(abs(value) <= LARGEST for value in values))


def _are_steps(steps: Any, count: int) -> bool:
    if not isinstance(steps, list) or not all(_all(step, int) and len(step) == 2 for step in steps):
        return False
    edges = [edge for step in steps for edge in step]
    follows = all(end == start for end, start in zip(edges[1:-1:2], edges[2::2], strict=True))
    return bool(edges) and (edges[0], edges[-1]) == (0, count) and follows and all(a <= b for a, b in steps)


def steps_of(found: dict[str, Any]) -> list[list[int]]:
    """[first token, end] of each step: those of the record, else its lines."""
    if "steps" in found:
        return found["steps"]
    ends = [i for i, piece in enumerate(found["pieces"], 1) if "\n" in piece]
    ends = list(dict.fromkeys([*ends, len(found["pieces"])]))
    return [list(step) for step in zip([0, *ends], ends, strict=False)]


def visible(text: str) -> str:
    """The same, with a picture for what has none or would move its neighbours: controls, overrides of the direction,
    surrogates, tags."""
    return text if text.isprintable() else "".join(map(_picture, text))


def _picture(character: str) -> str:
    if character in JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 32 else f"⟨{code:04X}⟩"


def scale(values: Iterable[Sequence[float]], share: float = 0.98) -> float:
    """The size that gets the full colour, the same on both sides of 0: a few extreme tokens may go beyond it."""
    parts = [np.abs(np.asarray(part, np.float64)) for part in values]
    sizes = np.concatenate(parts) if parts else np.zeros(1)
    return float(np.quantile(sizes, share)) or float(sizes.max()) or 1.0


def tokens_file(source: str) -> Path:
    """Of a run, or the file itself; ValueError where there is none."""
    from prime_fast.metrics import TOKENS

    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{source} is no run_dir and no file; give the run_dir of a run, or JSON lines of responses")
    if not (path / TOKENS).is_file():
        raise ValueError(
            f"{source} holds no {TOKENS}; give the run_dir of a run that has trained on at least one group"
        )
    return path / TOKENS
