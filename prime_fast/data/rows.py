"""Prompts and demonstrations for training: rows tokenised once, kept on disk, read as needed."""

import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from prime_fast.data import sources
from prime_fast.data.shapes import GSM8K_ANSWER, WHERE
from prime_fast.data.template import Template
from prime_fast.progress import progress

IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "row": pa.string(),
        "file": pa.int32(),
        "number": pa.int64(),
        "prompt_ids": IDS,
        "response_ids": IDS,
        "label": pa.float64(),
        "part": pa.int32(),
    }
)
DROPS = ("broken", "duplicates")
MAX_KINDS = 64
DIGEST_CHARS = 12


class Answer(NamedTuple):
    """The response of a row."""

    text: str
    ends: bool = True  # whether an EOS token follows
    label: float | None = None  # how good it is, where that is known
    part: int = 0  # after how many steps it was cut; 0: it was not


class Rows:
    """Tokenised rows in a memory-mapped file: `len(rows)`, and `rows[i]`, a dict with token ids as lists of int.

    A row has every key it had in its file, those of the verl shape (None if the file has none), its token ids, and
    (under WHERE) its place.
    source: the files they came from; shape: that of each (`shapes`). dropped, broken, duplicates: how many rows were
    left out for being too long, and for the two reasons of `drop`; raw: how many stand without a chat template.
    kinds: {ability and data_source: index of the first such row}, of the first MAX_KINDS of them.
    """

    def __init__(
        self,
        table: pa.Table,
        source: list[str],
        shape: list[str],
        dropped: int,
        broken: int,
        duplicates: int,
        raw: int,
        kinds: dict[str, int],
    ):
        self._table, self.source, self.shape, self.kinds = table, source, shape, kinds
        self.dropped, self.broken, self.duplicates, self.raw = dropped, broken, duplicates, raw

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        (row,) = self._table.slice(index, 1).to_pylist()
        ids = {key: value for key, value in row.items() if key.endswith("_ids") and value is not None}
        return json.loads(row["row"]) | ids | {WHERE: str(sources.Where(self.source[row["file"]], row["number"]))}

    def digest(self) -> str:
        """Of the rows' content, in their order; token ids are no part of it."""
        texts = (text for batch in self._table.select(["row"]).to_batches() for text in batch.column(0).to_pylist())
        return digest(texts)

    def select(self, indices: Sequence[int]) -> "Rows":
        """Some of them, in this order; the counts stay those of all."""
        left = self.dropped, self.broken, self.duplicates, self.raw
        return Rows(self._table.take(pa.array(indices, pa.int64())), self.source, self.shape, *left, self.kinds)

    def column(self, name: str) -> Iterator[pa.Array]:
        """Of the rows' ids or labels, a part after the other, without a copy."""
        return iter(self._table.column(name).chunks)

    def __str__(self) -> str:
        """`1319 rows of test.jsonl (verl shape), 2 too long`."""
        files = ", ".join(f"{name} ({shape} shape)" for name, shape in zip(self.source, self.shape, strict=True))
        left = {"too long": self.dropped, "broken": self.broken, "duplicates": self.duplicates}
        left |= {"as they stand, not through a chat template (data.template)": self.raw}
        return f"{len(self)} rows of {files}" + "".join(f", {count} {why}" for why, count in left.items() if count)


def load_rows(
    paths,
    tokenizer,
    *,
    max_prompt_tokens: int,
    limit: int | None = None,
    drop: Collection[str] = (),
    template: str = "auto",
    template_args: dict[str, Any] | None = None,
    check: Callable[[dict], None] | None = None,
) -> Rows:
    """Prompts for rollouts: rows with `prompt_ids`; `prompt` is a text where it stands raw or its file has one.

    paths: one or several .jsonl, .json or .parquet files or hub datasets (`sources.read`).
    tokenizer: a Hugging Face tokenizer. template, template_args: the mode and arguments of a `Template`.
    max_prompt_tokens: longer prompts are dropped and counted. limit: at most that many rows are kept.
    drop: any of "broken" (rows that would be an error) and "duplicates" (rows of the same tokens as an earlier one).
    check: raises ValueError, a sentence without its subject, for a row that is of no use (`rewards.row_check`). Without
        a limit, all rows of all files are read and checked before the first is tokenised.

    Big files are tokenised once for all processes and runs, into a cache: PRIME_FAST_CACHE, or ~/.cache/prime-fast.

    Raises ValueError naming file, row (counted from 1; the line, in a .jsonl) and what is wrong with it, ValueError if
    nothing is left, FileNotFoundError.
    """

    def prepare(row, shape):
        if shape == "verl" and (row["reward_model"] or {}).get("ground_truth") in (None, ""):
            raise ValueError("has no reward_model.ground_truth")
        if check:
            check(row)

    checked_by = [repr(check), *sources.source_of(sys.modules[check.__module__].__file__)] if check else []
    how = Template(tokenizer, template, template_args)
    return load(paths, how, prepare, checked_by, max_prompt_tokens, limit, drop, "data.max_prompt")


def load_demonstrations(
    paths,
    tokenizer,
    *,
    max_tokens: int,
    response: str = "{solution}",
    solution: str = "extra_info.solution",
    limit: int | None = None,
    drop: Collection[str] = (),
    template: str = "auto",
    template_args: dict[str, Any] | None = None,
) -> Rows:
    r"""Demonstrations for supervised training: rows with `prompt_ids` and `response_ids`, which ends in the EOS token.

    response: str.format template of what the model should answer, with the keys {solution}, {ground_truth} and
        {reasoning}, the solution without a last line `#### x`. GSM8K's prompts ask for \boxed{} and its solutions have
        `#### x`: "{reasoning}\n\\boxed{{{ground_truth}}}" makes them agree.
    solution: dotted path of the worked solution in a row; a row without it may have a string `response` instead.
    max_tokens: of prompt and response together; longer rows are dropped and counted.
    Everything else as in `load_rows`.
    """

    def prepare(row, _):
        text = row
        for key in solution.split("."):
            text = text.get(key) if isinstance(text, dict) else None
        text = text if text is not None else row.get("response")
        if not isinstance(text, str) or not text:
            raise ValueError(f"has no {solution} (and no response)")
        values = {"solution": text, "reasoning": GSM8K_ANSWER.sub("", text)}
        if (truth := (row.get("reward_model") or {}).get("ground_truth")) is not None:
            values["ground_truth"] = truth
        try:
            return Answer(response.format(**values))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"has nothing for the response template {response!r}, which cannot be filled ({error!r}); it may use "
                f"{sorted(values)}, and braces meant literally are doubled"
            ) from None

    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so a response could not end; set its eos_token")
    remedy = "data.max_prompt or rollout.max_response"
    how = Template(tokenizer, template, template_args)
    return load(paths, how, prepare, [response, solution], max_tokens, limit, drop, remedy)


class PromptSampler:
    """Endless shuffled indices: each epoch is a permutation of range(size), made from (seed, epoch) alone."""

    def __init__(self, size: int, seed: int):
        if size < 1:
            raise ValueError("a sampler needs at least one row")
        self.size, self.seed, self._epoch, self._position = size, seed, 0, 0
        self._order = self._permutation()

    def take(self, n: int) -> list[int]:
        """The next n indices, continuing into the following epochs."""
        taken = []
        while len(taken) < n:
            if self._position == self.size:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._permutation()
            part = self._order[self._position : self._position + n - len(taken)].tolist()
            taken += part
            self._position += len(part)
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"size": self.size, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int], renewed: bool = False) -> None:
        """Continues where `state` was taken; with `renewed` rows, which need not be as many, by a new epoch.

        Raises ValueError if the data has another number of rows now.
        """
        if renewed:
            state = {"size": self.size, "epoch": state["epoch"] + 1, "position": 0}
        if state["size"] != self.size:
            raise ValueError(f"the checkpoint was made with {state['size']} rows of data, now there are {self.size}")
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self._epoch]).permutation(self.size)


def digest(texts: Iterable[str]) -> str:
    """Of texts without line breaks, in their order."""
    made = hashlib.sha256()
    for text in texts:
        made.update(text.encode() + b"\n")
    return made.hexdigest()[:DIGEST_CHARS]


def load(
    paths,
    template: Template,
    prepare: Callable[[dict, str], Answer | None],
    options: list,
    max_tokens: int,
    limit: int | None,
    drop: Collection[str],
    remedy: str,
    read: Callable[[str], tuple[str, Iterator[sources.Item]]] = sources.read,
) -> Rows:
    """What the loaders share. prepare: (row, shape) -> its response, ValueError without a subject for a bad row;
    options: what else it depends on; remedy: the keys to raise where all rows are longer than max_tokens; read: a file
    as a shape and its rows."""
    source = [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if unknown := set(drop) - set(DROPS):
        raise ValueError(f"rows can be dropped as {' or '.join(DROPS)}, not as {sorted(unknown)}")
    content = [options, max_tokens, limit, sorted(drop), template.mode, template.arguments]
    with sources.place(source, content, template.tokenizer) as (path, is_there):
        if not is_there:
            if limit is None and "broken" not in drop:
                with progress("checking", unit="rows") as tick:
                    _check(source, prepare, read, tick)
            with (
                pa.OSFile(str(path), "wb") as file,
                pa.ipc.new_stream(file, SCHEMA) as writer,
                progress("tokenising", unit="rows") as tick,
            ):
                _write(writer, source, template, prepare, max_tokens, limit, drop, remedy, read, tick)
        reader = pa.ipc.open_stream(pa.memory_map(str(path)))
        pieces = list(reader.iter_batches_with_custom_metadata())
    counts = json.loads(pieces[-1].custom_metadata["counts"])
    return Rows(pa.Table.from_batches([piece.batch for piece in pieces]), source, **counts)


def _check(source, prepare, read, tick) -> None:
    """A wrong row is told before the minutes that tokenising those before it takes."""
    for name in source:
        shape, rows = read(name)
        for where, row in rows:
            _prepare(where, row, shape, prepare)
            tick()


def _prepare(where: sources.Where, row: dict | ValueError, shape: str, prepare) -> Any:
    if isinstance(row, ValueError):
        raise row
    try:
        return prepare(row, shape)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error


def _write(writer, source, template: Template, prepare, max_tokens, limit, drop, remedy, read, tick) -> None:
    """Rows as record batches; the last one, which is empty, says what was left out. What is not token ids is kept as
    JSON text, since Arrow would want the same keys and types of extra_info in every row."""
    counts = {"shape": [], "dropped": 0, "broken": 0, "duplicates": 0, "raw": 0, "kinds": {}}
    kept, too_long, seen = 0, [], set()
    for file, name in enumerate(source):
        shape, rows = read(name)
        counts["shape"].append(shape)
        for chunk in _chunks(rows, sources.READ_ROWS):
            if kept == limit:
                break
            items = []
            for is_raw, kind, item in _tokenised(_prepared(chunk, shape, template, prepare, drop, counts), template):
                ids = tuple(item["prompt_ids"]), tuple(item.get("response_ids", ()))
                if kept + len(items) == limit:
                    break
                if sum(map(len, ids)) > max_tokens:
                    too_long.append(sum(map(len, ids)))
                elif "duplicates" in drop and hash(ids) in seen:
                    counts["duplicates"] += 1
                else:
                    if "duplicates" in drop:
                        seen.add(hash(ids))
                    counts["raw"] += is_raw
                    if len(counts["kinds"]) < MAX_KINDS:
                        counts["kinds"].setdefault(kind, kept + len(items))
                    items.append(item | {"file": file})
            writer.write_batch(pa.RecordBatch.from_pylist(items, SCHEMA))
            kept += len(items)
            tick(len(chunk))
    if too_long and not kept:
        raise ValueError(
            f"empty dataset: all {len(too_long)} rows of {', '.join(source)} are longer than {max_tokens} tokens "
            f"(they have {min(too_long)} to {max(too_long)}): raise {remedy}"
        )
    if not kept:
        broken = f" but {counts['broken']} broken ones" if counts["broken"] else ""
        raise ValueError(f"empty dataset: no rows in {', '.join(source)}{broken}")
    counts["dropped"] = len(too_long)
    writer.write_batch(pa.RecordBatch.from_pylist([], SCHEMA), custom_metadata={"counts": json.dumps(counts)})


def _prepared(
    chunk, shape, template: Template, prepare, drop, counts
) -> Iterator[tuple[int, dict, tuple[str, bool], Answer | None]]:
    """(its number, row, its prompt as text and whether that is raw, response or None) of the rows that are whole."""
    for where, row in chunk:
        try:
            answer = _prepare(where, row, shape, prepare)
            yield where.number, row, _prepare(where, row, shape, template.apply), answer
        except ValueError:
            if "broken" not in drop:
                raise
            counts["broken"] += 1


def _tokenised(prepared, template: Template) -> Iterator[tuple[bool, str, dict]]:
    if not (prepared := list(prepared)):
        return
    numbers, rows, prompts, answers = zip(*prepared, strict=True)
    made = zip(numbers, rows, prompts, template.ids(prompts), answers, strict=True)
    for number, row, (text, is_raw), ids, answer in made:
        row = row | {"prompt": text} if is_raw else row
        item = {"row": json.dumps(row, default=str), "number": number, "prompt_ids": ids}
        if answer is not None:
            response_ids = template.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
            item["response_ids"] = response_ids + [template.tokenizer.eos_token_id] * answer.ends
            item |= {"label": answer.label, "part": answer.part}
        yield is_raw, json.dumps([row.get("ability"), row.get("data_source")], default=str), item


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
