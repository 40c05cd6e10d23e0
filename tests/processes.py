"""Other programs, run by tests: nothing they start can outlive its time or keep a test waiting."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path

GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a process group this one may be in


def environment(**changes: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in GROUP} | changes


def start(command: list[str], **options) -> subprocess.Popen:
    """In a session of its own, so that `end` reaches its children."""
    return subprocess.Popen(command, text=True, start_new_session=True, **{"env": environment()} | options)


def end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def run(
    command: list[str], *, input: str | None = None, timeout: float = 240, **options
) -> subprocess.CompletedProcess:
    """Like subprocess.run with its output captured, but past `timeout` seconds all it started is killed.

    subprocess.run kills the command alone, then waits for as long as any child of it holds the pipes.
    """
    process = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        out, err = process.communicate(input, timeout)
    except BaseException:
        end(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def torchrun(ranks: int, *words: object) -> subprocess.CompletedProcess:
    """What `torchrun --standalone --nproc-per-node RANKS WORDS` does, in less time: every rank is forked from a process
    that has imported what the trainer needs, which is most of a short run's work. torchrun itself is run by
    test_resume.py and test_vllm.py.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent holds one
    group = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    group |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    words, processes = [str(word) for word in words], []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("out", "err")]
        try:
            for rank in range(ranks):
                here = {name: str(value) for name, value in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()}
                process = _forks().Process(target=_rank, args=(words, outputs, environment(**here)))
                process.start()
                processes.append(process)
            _wait(processes)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        failed = any(process.exitcode for process in processes)
        return subprocess.CompletedProcess(words, int(failed), *(path.read_text() for path in outputs))


@cache
def _forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prime_fast.trainer", "transformers.models.llama", "transformers.models.qwen2"])
    return context


def _rank(words: list[str], outputs: list[Path], environment: dict[str, str]) -> None:
    os.setsid()
    for number, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def _wait(processes: list, seconds: float = 480, alone: float = 10) -> None:
    """For all of them; once one has failed the others have little time to end, too."""
    deadline, left = time.monotonic() + seconds, set(processes)
    while left:
        ended = wait([process.sentinel for process in left], max(0.0, deadline - time.monotonic()))
        failed = any(process.exitcode for process in processes)
        if not ended and not failed:
            raise TimeoutError(f"{len(left)} of {len(processes)} ranks have not ended after {seconds:g} s")
        if not ended:
            return
        left = {process for process in left if process.exitcode is None}
        if failed:
            deadline = min(deadline, time.monotonic() + alone)
