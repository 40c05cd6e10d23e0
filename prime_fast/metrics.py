"""What a run writes down: seconds and memory per phase, metrics.jsonl, samples.jsonl, tokens.jsonl, one progress line
a step."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from prime_fast import durable
from prime_fast.progress import duration, thousands

METRICS, SAMPLES, TOKENS = "metrics.jsonl", "samples.jsonl", "tokens.jsonl"
GIB = 1 << 30
ETA_WINDOW = 20  # steps whose mean duration predicts the rest


class Phases:
    """A stopwatch of named phases: `with phases("generate"): ...`, then `phases.seconds()` and `phases.memory()`.

    Phases are meant to follow one another; a nested one is counted in its parent too.
    """

    def __init__(self) -> None:
        self._total: dict[str, float] = {}
        self._peak: dict[str, int] = {}
        self._running: list[str] = []
        self.mark: Callable[[str], AbstractContextManager] = nullcontext  # entered around each phase, with its name
        self.begins: Callable[[str], None] = lambda name: None  # called before each phase

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.begins(name)
        self._note_peak()
        self._running.append(name)
        start = _now()
        try:
            with self.mark(name):
                yield
        finally:
            self._total[name] = self._total.get(name, 0.0) + _now() - start
            self._note_peak()
            self._running.remove(name)

    def seconds(self) -> dict[str, float]:
        """{"seconds/<name>": wall seconds since the last reset}, in the order in which the phases first ran."""
        return {f"seconds/{name}": total for name, total in self._total.items()}

    def memory(self) -> dict[str, float]:
        """{"memory/<name>": GiB at the phase's peak}, of torch's GPU allocator, or of the process without a GPU."""
        return {f"memory/{name}": peak / GIB for name, peak in self._peak.items()}

    def reset(self) -> None:
        self._total.clear()
        self._peak.clear()

    def _note_peak(self) -> None:
        """The peak since it was last asked for belongs to every phase that was running."""
        peak = _memory.take()
        for name in self._running:
            self._peak[name] = max(peak, self._peak.get(name, 0))


class _Memory:
    """The process's peak memory, asked for again and again: the meters are set back, so the highest is kept here."""

    CLEAR = "/proc/self/clear_refs"  # writing 5 sets the peak resident size back (man proc_pid_clear_refs)

    def __init__(self) -> None:
        self.highest = 0

    def take(self) -> int:
        """Bytes at the peak since the last call: GPU memory where there is one, else resident host memory (where the
        kernel does not let its peak be set back: what is resident now)."""
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            peak = resident("VmHWM" if os.access(self.CLEAR, os.W_OK) else "VmRSS")
            with suppress(OSError), open(self.CLEAR, "w") as file:
                file.write("5")
        self.highest = max(self.highest, peak)
        return peak


def resident(line: str = "VmRSS") -> int:
    """Bytes of this process in memory, by a line of /proc/self/status: VmRSS now, VmHWM at the peak."""
    with open("/proc/self/status", encoding="ascii") as file:
        for name, _, value in (text.partition(":") for text in file):
            if name == line:
                return int(value.split()[0]) << 10  # kB
    raise ValueError(f"/proc/self/status has no line {line}")


_memory = _Memory()


class MetricsLog:
    """Appends one record a step to run_dir/metrics.jsonl; only rank 0 may hold one.

    `resume_step=k` keeps the records of steps <= k, in samples.jsonl and tokens.jsonl too, so that a step run again
    appears once; `resume_step=None` starts all three anew. `tensorboard=True` also writes every number to
    run_dir/tensorboard.
    """

    def __init__(
        self, run_dir: str | Path, total_steps: int, tensorboard: bool = False, resume_step: int | None = None
    ) -> None:
        self.path = Path(run_dir) / METRICS
        self.total_steps = total_steps
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.path.with_name(name) for name in (METRICS, SAMPLES, TOKENS)):
            if resume_step is None:
                path.unlink(missing_ok=True)
            elif path.is_file():
                _keep_until(path, resume_step)
        self._durations: deque[float] = deque(maxlen=ETA_WINDOW)
        self._board = _tensorboard(self.path.parent, resume_step) if tensorboard else None

    def write(self, record: dict) -> None:
        """Append one flat record with a "step" and flush. NaN and infinity become null."""
        _append(self.path, [record])
        if self._board:
            for key, value in record.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(key, value, record["step"])
            self._board.flush()

    def progress(self, record: dict) -> str:
        """Print, and return, one plain line on the step with the time left at the pace of the last steps."""
        step = record["step"]
        parts = [f"step {step:{len(str(self.total_steps))}d}/{self.total_steps}"]
        parts += [text.format(record[key]) for key, text in PROGRESS.items() if record.get(key) is not None]
        if record.get("tokens_per_second") is not None:
            parts.append(f"{thousands(record['tokens_per_second'])} tok/s")
        if record.get("seconds") is not None:
            parts.append(f"{record['seconds']:.1f} s")
            if step > 0:  # step 0 is an evaluation, not a step
                self._durations.append(record["seconds"])
        if self._durations and step < self.total_steps:
            left = (self.total_steps - step) * sum(self._durations) / len(self._durations)
            parts.append(f"eta {duration(left)}")
        if record.get("eval_accuracy") is not None:  # last, so that the columns of all lines stay aligned
            parts.append(f"eval {record['eval_accuracy']:.3f}")
        for name, label in (("policy", "applied"), ("prm", "prm applied")):
            if record.get(f"{name}_applied") != record.get(f"{name}_updates"):
                parts.append(f"{label} {record[f'{name}_applied']} of {record[f'{name}_updates']}")
        if record.get("eval_loss") is not None:
            parts.append(f"eval loss {record['eval_loss']:.4f}")
        if record.get("eval_auc") is not None:
            parts.append(f"auc {record['eval_auc']:.3f}")
        parts += [f"{label} {record[key]:.1%}" for key, label in FAILURES.items() if record.get(key)]
        if record.get("skipped"):
            parts.append(f"skipped {record['skipped']}")
        line = "  ".join(parts)
        print(line, flush=True)
        return line


PROGRESS = {
    "outcome": "outcome {:.2f}",
    "groups_kept": "kept {:.2f}",
    "prm_pair_accuracy": "prm {:.2f} pair",
    "approx_kl": "kl {:z.4f}",
    "loss": "loss {:.4f}",
    "response_length": "{:.0f} tok/row",
}
FAILURES = {
    "reward_errors": "reward errors",
    "reward_timeouts": "reward timeouts",
    "reward_crashes": "reward crashes",
    "eval_reward_failures": "eval reward failures",
}


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The records of run_dir/metrics.jsonl, oldest first. A line that a kill left half-written at the end is left out.

    Raises ValueError if there is no such file, or if a line before the last one is not JSON.
    """
    path = Path(run_dir) / METRICS
    if not path.is_file():
        raise ValueError(f"{run_dir} holds no {METRICS}; give the run_dir of a run that has made at least one step")
    return _read(path)


def write_samples(run_dir: str | Path, records: list[dict]) -> None:
    """Append records with a "step" (prompt, response, outcome, ...) to run_dir/samples.jsonl."""
    _append(Path(run_dir) / SAMPLES, records)


def write_tokens(run_dir: str | Path, records: list[dict]) -> None:
    """Append records with a "step" (`views.show.record`) to run_dir/tokens.jsonl."""
    _append(Path(run_dir) / TOKENS, records)


def peak_gib() -> float:
    """Highest memory in use in this process so far: GPU memory where there is one, else resident host memory."""
    _memory.take()
    return _memory.highest / GIB


def _append(path: Path, records: list[dict]) -> None:
    durable.append(path, _lines(records))


def _lines(records: list[dict]) -> str:
    finite = (
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        for record in records
    )
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in finite)


def _read(path: Path) -> list[dict]:
    return [record for _, record in _written(path)]


def _written(path: Path) -> Iterator[tuple[bytes, dict]]:
    """Each line of the file and the record in it."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):  # a whole record ends its line; only a kill leaves a rest
                return
            try:
                yield line, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is not JSON ({error}); remove that line") from error


def _keep_until(path: Path, step: int) -> None:
    """Replace the file, in one move, by its records of steps <= `step`."""
    durable.replace(path, (line for line, record in _written(path) if record["step"] <= step))


def _tensorboard(run_dir: Path, resume_step: int | None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "log.tensorboard=true needs the package tensorboard; pip install tensorboard, or set it to false"
        ) from error
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=0 if resume_step is None else resume_step + 1)


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # kernels still queued belong to the phase that launched them
    return time.perf_counter()
