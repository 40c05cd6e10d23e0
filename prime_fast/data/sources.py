"""Rows from files and from the Hugging Face hub, and the cache of what is made of them.

The first row that has a prompt decides which of the shapes in `shapes` its file has.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from prime_fast.data.shapes import normalise, shape_of, unfilled

READ_ROWS = 256  # rows held as Python objects at a time; the shape is looked for in as many
HUB_NAME = re.compile(r"(?:hf://([\w.-]+/[\w.-]+)(?:/([\w.-]+))?|([\w.-]+/[\w.-]+))(?:@([\w.-]+))?(?::(.+))?")
CACHE_FROM_BYTES = 16 << 20  # smaller files are tokenised in seconds
CACHE_DAYS = 14  # what was not used for so long is deleted when something new is written


class Where(NamedTuple):
    """The place of a row, counted from 1; in a .jsonl, the line."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}, row {self.number}"


Item = tuple[Where, dict | ValueError]


def read(name: str) -> tuple[str, Iterator[Item]]:
    """The shape of a file or hub dataset, and its rows in order: (where it stands, the row, normalised),
    with a ValueError in place of a broken row.

    name: a .jsonl, .json or .parquet file, or "hf://org/name[/configuration][@revision][:split]" (split "train" unless
        given), or "org/name[@revision][:split]" where that is no file.

    Raises FileNotFoundError, or ValueError if the whole file is unreadable.
    """
    raw = read_raw(name)
    head = list(islice(raw, READ_ROWS))
    shape = next((shape for _, row in head if isinstance(row, dict) and (shape := shape_of(row))), "verl")
    return shape, (_normalised(Where(name, number), row, shape) for number, row in chain(head, raw))


@contextmanager
def place(source: list[str], content: list, tokenizer) -> Iterator[tuple[Path, bool]]:
    """Where what is made of these sources is to be, and whether it is there; if not, the caller writes it.

    content: what else it depends on (JSON). Small sources have a temporary place, whose file lives on while it is
    mapped. Big ones have one in the cache: a process that is writing it makes the others wait, and a rename puts it
    there when it is whole.
    """
    big = sum(map(_size, source)) >= CACHE_FROM_BYTES
    final = _cache_file([*map(_identify, source), content], tokenizer) if big else None
    with _alone(final), tempfile.TemporaryDirectory(dir=final and final.parent) as folder:
        if final and final.exists():
            os.utime(final)
            yield final, True
            return
        path = Path(folder, "rows.arrow")
        yield path, False
        if final:
            os.replace(path, final)
            for old in final.parent.iterdir():
                with suppress(FileNotFoundError):  # another process is at it too
                    if old.stat().st_mtime < time.time() - CACHE_DAYS * 86400:
                        shutil.rmtree(old) if old.is_dir() else old.unlink()


def _cache_file(content: list, tokenizer) -> Path | None:
    """None where there can be no cache: its directory cannot be written, or the tokenizer cannot say what it is."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    root = Path(os.environ.get("PRIME_FAST_CACHE") or Path.home() / ".cache" / "prime-fast", "rows")
    with suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
    if backend is None or not os.access(root, os.W_OK):
        return None
    key = [content, source_of(__file__), version("transformers"), backend.to_str(), tokenizer.chat_template]
    key += [tokenizer.eos_token_id, tokenizer.special_tokens_map]
    return root / f"{hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()}.arrow"


def source_of(file: str) -> list[str]:
    """The code of a module and its neighbours."""
    return [path.read_text("utf-8") for path in sorted(Path(file).parent.glob("*.py"))]


@contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with path.with_suffix(".lock").open("w") as lock:
        with suppress(OSError):  # where the file system has no locks, the work is done more than once, no worse
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _identify(name: str) -> list:
    """What changes when the content does: size and time of a file, the fingerprint of a hub dataset."""
    if _is_hub(name):
        return [name, _hub(name)._fingerprint]
    path = _file(name)
    return [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]


def _size(name: str) -> int:
    """Bytes on disk."""
    return _hub(name).dataset_size or 0 if _is_hub(name) else _file(name).stat().st_size


def _normalised(where: Where, row: Any, shape: str) -> Item:
    try:
        if isinstance(row, ValueError):
            raise row
        return where, normalise(row, shape)
    except ValueError as error:
        return where, ValueError(f"{where} {error}")


def read_raw(name: str) -> Iterator[tuple[int, Any]]:
    """(number, row as it stands, with a ValueError in place of one that is not JSON); otherwise as `read`."""
    if _is_hub(name):
        tables = _hub(name).with_format("arrow").iter(READ_ROWS)
        return enumerate((unfilled(row) for table in tables for row in table.to_pylist()), 1)
    path = _file(name)
    return READERS[path.suffix](path)


def _file(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"data file {name} does not exist")
    if path.suffix not in READERS:
        raise ValueError(f"data file {name}: the name must end in {', '.join(READERS)}")
    return path


def _is_hub(name: str) -> bool:
    path = Path(name)
    return bool(HUB_NAME.fullmatch(name)) and not path.exists() and path.suffix not in READERS


@lru_cache(8)
def _hub(name: str):
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    full, configuration, short, revision, split = HUB_NAME.fullmatch(name).groups()
    try:
        return load_dataset(full or short, configuration, split=split or "train", revision=revision)
    except Exception as error:  # of a dozen kinds, some of libraries below datasets
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{name} is no file here, and the Hugging Face hub does not give it ({type(error).__name__}: {reason}); "
            "without a network, give the path of a .jsonl or .parquet file"
        ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    row = ValueError(f"is not JSON: {error}")
                yield number, row


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        if not file.read(READ_ROWS).lstrip().startswith(b"["):  # JSON lines are often called .json too
            yield from _read_jsonl(path)
            return
        file.seek(0)
        try:
            rows = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    yield from enumerate(rows, 1)


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        batches = pq.ParquetFile(path, memory_map=True).iter_batches(READ_ROWS)
        yield from enumerate((unfilled(row) for batch in batches for row in batch.to_pylist()), 1)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not a parquet file, or a damaged one: {reason}") from None


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
