"""Scores responses in worker processes that can be killed, so that a deadline holds whatever a sample does."""

import json
import logging
import math
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from prime_fast.data.shapes import prefill
from prime_fast.rewards.functions import BUILT_IN, RowCheck, abilities, check_name

MAX_DEFAULT_WORKERS = 16
START_SECONDS = 120.0  # for a worker to import what it needs; not counted against any sample
END_SECONDS = 30.0  # for a killed worker and its descendants to be gone
RECEIVE_BYTES = 1 << 16
HEADER = struct.Struct("<I")  # a frame: the length of its body, then the body, JSON
SANDBOXES = ("namespaces", "rlimits-only")  # of code rewards, see `rewards.sandbox`

logger = logging.getLogger(__name__)


def score(
    responses: list[str],
    rows: list[dict],
    *,
    workers: int | None = None,
    timeout: float = 10.0,
    reward: str = "math",
    sandbox: str = "namespaces",
) -> list[float]:
    """The outcome in [0, 1] of each response to its row, in order: a `RewardPool` for one call."""
    with RewardPool(reward, workers, timeout, sandbox) as pool:
        return pool.score(responses, rows)


class RewardPool:
    """Worker processes that score responses; keep one open for a run and close it at the end (or use `with`).

    reward: "math" (math-verify), "code" (the share of its tests that a program passes, in a sandbox) or "auto" (either,
        by the row's ability); with "-strict" only \\boxed{} is an answer, and a program must pass all its tests. Or a
        callable of yours, "path/to/file.py:function" or "package.module:function", with verl's or TRL's signature
        (`functions.load_reward`). It runs in the workers, one sample at a time, and what it prints is dropped.
    workers: number of processes; None means one per CPU, at most 16. They start when first needed and stay.
    timeout: seconds a sample may run, counted from when it starts running. Past it the worker and the processes it
        started are killed and the sample scores 0.0. A program is stopped a little before, and keeps its share.
    sandbox: "namespaces", or "rlimits-only" to run programs without isolation (`rewards.sandbox`).
    counts: {"timeouts", "errors", "crashes"}: how many samples so far ran out of time; scored 0.0 because the reward
        function raised; because the worker died.

    Raises ValueError if the reward is unknown, cannot be imported or has another signature, or if this machine cannot
    isolate programs as asked. One thread at a time.
    """

    def __init__(
        self, reward: str = "math", workers: int | None = None, timeout: float = 10.0, sandbox: str = "namespaces"
    ):
        check_name(reward)
        if sandbox not in SANDBOXES:
            raise ValueError(f'unknown sandbox "{sandbox}": use "{SANDBOXES[0]}" or "{SANDBOXES[1]}"')
        if workers is not None and workers < 1:
            raise ValueError(f"reward workers is {workers}: at least 1 is needed")
        if not timeout > 0:
            raise ValueError(f"reward timeout is {timeout}: a positive number of seconds is needed")
        self.reward, self.timeout, self.sandbox = reward, timeout, sandbox
        self.workers = workers or min(os.cpu_count() or 1, MAX_DEFAULT_WORKERS)
        self.counts = {"timeouts": 0, "errors": 0, "crashes": 0}
        self._pool: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        if sandbox == "rlimits-only" and "code" in abilities(reward):
            logger.warning(
                "SANDBOX OFF (rlimits-only): model-written programs run without isolation. They can read and write "
                "what this user can (what nobody can, if this user is root); only limits and a filter hold them"
            )
        if abilities(reward) != ("math",):  # find out now, not after the first rollouts, that it cannot work
            self._guard(self._start_first)

    def score(self, responses: list[str], rows: list[dict], tick: Callable[[], None] = lambda: None) -> list[float]:
        """The outcome in [0, 1] of each response (text) to its row (verl shape), in order. A built-in reward grades the
        answer that a prompt begins together with the response that continues it. `tick` is called after each.

        Raises ValueError if a row cannot be scored by this reward, or the reward function returns anything but a finite
        number in [0, 1], which the PRM's cross-entropy needs.
        """
        if len(responses) != len(rows):
            raise ValueError(f"{len(responses)} responses for {len(rows)} rows")
        if self.reward in BUILT_IN:
            _check_rows(rows, self.reward)
        return self._guard(self._score, responses, rows, tick)

    def processes(self) -> list[int]:
        """The ids of the workers; what they run are their descendants."""
        return [worker.process.pid for worker in self._pool]

    def close(self) -> None:
        """Ends every worker; none is left behind, not even as a zombie."""
        self._kill_all()
        self._selector.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _score(self, responses, rows, tick):
        outcomes, waiting, left = [0.0] * len(rows), deque(range(len(rows))), len(rows)
        self._wait(0)  # notices workers that died since the last call
        while left:
            while len(self._pool) < min(self.workers, left):
                self._start()
            for worker in self._pool:
                if waiting and worker.idle:
                    sample = waiting.popleft()
                    worker.send(sample, self._request(responses[sample], rows[sample]), self.timeout)
                    self._watch(worker)
            for sample, reply in self._wait():
                outcomes[sample] = self._outcome(reply, sample, rows[sample])
                left -= 1
                tick()
        return outcomes

    def _request(self, response, row):
        if self.reward in BUILT_IN:
            response = prefill(row) + response
            truth = {"ground_truth": row["reward_model"]["ground_truth"]}
            row = {"ability": row.get("ability"), "reward_model": truth}
        else:
            row = {key: value for key, value in row.items() if key != "prompt_ids"}
        return json.dumps([response, row], default=lambda value: value.tolist()).encode()

    def _outcome(self, reply, sample, row):
        if "score" in reply:
            self.counts["timeouts"] += reply.get("timeout", False)
            value = reply["score"]
            if math.isfinite(value) and 0.0 <= value <= 1.0:
                return value
            origin = f"data_source {row.get('data_source')}, extra_info {row.get('extra_info')}"
            where = f"row {sample} of the batch ({origin:.200})"
            raise ValueError(f'reward "{self.reward}" returned {value} for {where}: outcomes must lie in [0, 1]')
        if "error" in reply and not self.counts["errors"]:
            logger.warning(
                'reward "%s" raised %s; scored 0.0, further errors are only counted', self.reward, reply["error"]
            )
        self.counts[{"error": "errors", "timeout": "timeouts", "crash": "crashes"}[next(iter(reply))]] += 1
        return 0.0

    def _wait(self, seconds=None) -> list[tuple[int, dict]]:
        """Waits until something happens, or `seconds`; returns the samples that came to an end, with their replies."""
        if seconds is None:
            seconds = max(0.0, min(worker.deadline for worker in self._pool) - time.monotonic())
        ended = []
        for key, events in self._selector.select(seconds if seconds < math.inf else None):
            worker = key.data
            try:
                if events & selectors.EVENT_WRITE:
                    worker.flush()
                    self._watch(worker)
                replies = worker.receive() if events & selectors.EVENT_READ else []
            except (EOFError, OSError):
                self._lose(worker, "crash", ended)
                continue
            for reply in replies:
                if "fatal" in reply:
                    raise ValueError(reply["fatal"])
                if worker.sample is not None:
                    ended.append((worker.sample, reply))
                worker.rest()
        now = time.monotonic()
        for worker in [worker for worker in self._pool if worker.deadline <= now]:
            self._lose(worker, "timeout", ended)
        return ended

    def _lose(self, worker, reason, ended):
        self._remove(worker)
        if worker.starting:
            code = worker.process.returncode
            raise RuntimeError(f'a worker for reward "{self.reward}" was not ready ({reason}, exit code {code})')
        if worker.sample is not None:
            ended.append((worker.sample, {reason: True}))

    def _start(self):
        worker = _Worker(self.reward, str(self.timeout), self.sandbox)
        self._pool.append(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)

    def _start_first(self):
        self._start()
        while not self._pool[0].idle:
            self._wait()

    def _watch(self, worker):
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.unsent else 0)
        if self._selector.get_key(worker.socket).events != events:
            self._selector.modify(worker.socket, events, worker)

    def _remove(self, worker):
        self._pool.remove(worker)
        self._selector.unregister(worker.socket)
        worker.kill()

    def _kill_all(self):
        for worker in list(self._pool):
            self._remove(worker)

    def _guard(self, work, *arguments):
        try:
            return work(*arguments)
        except BaseException:
            self._kill_all()  # what they are doing is of no use any more; they start again when needed
            raise


class _Worker:
    """One worker: starting, then idle (no sample) or running (sample is its index in the batch)."""

    def __init__(self, reward: str, *options: str):
        self.socket, theirs = socket.socketpair()
        life, self.life = os.pipe()  # ours is closed when this process ends, however it ends
        command = [sys.executable, "-m", "prime_fast.rewards.worker", reward, str(theirs.fileno()), str(life), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=(theirs.fileno(), life),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        os.close(life)
        self.socket.setblocking(False)
        self.starting, self.sample, self.unsent, self.received = True, None, b"", bytearray()
        self.deadline = time.monotonic() + START_SECONDS

    @property
    def idle(self) -> bool:
        return not self.starting and self.sample is None

    def send(self, sample: int, body: bytes, timeout: float) -> None:
        self.sample, self.deadline = sample, time.monotonic() + timeout
        self.unsent = memoryview(HEADER.pack(len(body)) + body)
        with suppress(OSError):  # the worker is dead: its end of file tells
            self.flush()

    def flush(self) -> None:
        with suppress(BlockingIOError):
            self.unsent = self.unsent[self.socket.send(self.unsent) :]

    def receive(self) -> list[dict]:
        chunk = self.socket.recv(RECEIVE_BYTES)
        if not chunk:
            raise EOFError
        self.received += chunk
        replies = []
        while len(self.received) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self.received)[0]
            if len(self.received) < end:
                break
            replies.append(json.loads(self.received[HEADER.size : end]))
            del self.received[:end]
        return replies

    def rest(self) -> None:
        self.starting, self.sample, self.deadline = False, None, math.inf

    def kill(self) -> None:
        """Ends the worker and, through its watcher, all its descendants."""
        os.close(self.life)
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            logger.warning("a reward worker's processes did not all end within %g s", END_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # until the wait nobody else can have its id
            self.process.wait()
        self.socket.close()


def _check_rows(rows: list[dict], reward: str) -> None:
    check = RowCheck(reward, truths=False)
    for index, row in enumerate(rows):
        try:
            check(row)
        except ValueError as error:
            raise ValueError(f"row {index} {error}") from error
