"""Scores responses in worker processes that can be killed, so that a deadline holds whatever a sample does."""

import json
import logging
import math
import os
import selectors
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from prime_fast.data.shapes import WHERE, named, prefill
from prime_fast.rewards.code import Usage
from prime_fast.rewards.functions import BUILT_IN, RowCheck, abilities, check_name
from prime_fast.rewards.process import Worker

MAX_DEFAULT_WORKERS = 16
SANDBOXES = ("namespaces", "rlimits-only")  # of code rewards, see `rewards.sandbox`
UNSEEN = ("prompt_ids", WHERE)  # keys of a row that no reward function is given

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


class Verdict(NamedTuple):
    """What a reward said about a response."""

    outcome: float  # in [0, 1]; 0.0 where there is no verdict
    failure: str = ""  # why not: "errors", "timeouts", "crashes"; or "stopped": a program that keeps what it reached
    reason: str = ""  # in words
    usage: Usage | None = None  # of a program


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
        function raised; because the worker died, twice.
    sources: {module: digest} of your function's code (`sources.of`), once a worker has started.

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
        self.sources: dict[str, str] = {}
        self._told = False
        self._pool: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        if sandbox == "rlimits-only" and "code" in abilities(reward):
            logger.warning(
                "SANDBOX OFF (rlimits-only): model-written programs run without isolation. They can read and write "
                "what this user can (what nobody can, if this user is root); only limits and a filter hold them"
            )
        if abilities(reward) != ("math",):  # find out now, not after the first rollouts, that it cannot work
            self._guard(self._start_first)

    def score(self, responses: list[str], rows: list[dict], tick: Callable[[], None] = lambda: None) -> list[float]:
        """The outcome in [0, 1] of each response (text) to its row (verl shape), in order; as `judge`."""
        return [verdict.outcome for verdict in self.judge(responses, rows, tick)]

    def judge(
        self, responses: list[str], rows: list[dict], tick: Callable[[], None] = lambda: None, quiet: bool = False
    ) -> list[Verdict]:
        """The verdict on each response (text) to its row (verl shape), in order. A built-in reward grades the
        answer that a prompt begins together with the response that continues it. `tick` is called after each. The
        pool's first error is logged, unless `quiet`.

        Raises ValueError if a row cannot be scored by this reward, or the reward function returns anything but a finite
        number in [0, 1], which the PRM's cross-entropy needs.
        """
        if len(responses) != len(rows):
            raise ValueError(f"{len(responses)} responses for {len(rows)} rows")
        if self.reward in BUILT_IN:
            _check_rows(rows, self.reward)
        verdicts = self._guard(self._judge, responses, rows, tick)
        errors = (i for i, verdict in enumerate(verdicts) if verdict.failure == "errors")
        if not (quiet or self._told) and (first := next(errors, None)) is not None:
            self._told = True
            what = verdicts[first].reason, named(rows[first], f"row {first} of the batch")
            logger.warning('reward "%s" raised %s for %s; scored 0.0, more are only counted', self.reward, *what)
        return verdicts

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

    def _judge(self, responses, rows, tick):
        verdicts, waiting, left = [None] * len(rows), deque(range(len(rows))), len(rows)
        crashed = set()
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
                if "crash" in reply and sample not in crashed:  # maybe of something else: out of memory, a kill
                    crashed.add(sample)
                    waiting.append(sample)
                    continue
                verdicts[sample] = self._verdict(reply, rows[sample], f"row {sample} of the batch")
                left -= 1
                tick()
        return verdicts

    def _request(self, response, row):
        if self.reward in BUILT_IN:
            response = prefill(row) + response
            truth = {"ground_truth": row["reward_model"]["ground_truth"]}
            row = {"ability": row.get("ability"), "reward_model": truth}
        else:
            row = {key: value for key, value in row.items() if key not in UNSEEN}
        return json.dumps([response, row], default=lambda value: value.tolist()).encode()

    def _verdict(self, reply, row, place):
        if "fatal" in reply:
            raise ValueError(f"{named(row, place)}: {reply['fatal']}")
        if "score" in reply:
            value = reply["score"]
            if not (math.isfinite(value) and 0.0 <= value <= 1.0):
                what = f'reward "{self.reward}" returned {value}; outcomes must lie in [0, 1]'
                raise ValueError(f"{named(row, place)}: {what}")
            usage = None
            if "usage" in reply:
                seconds, memory, limits = reply["usage"]
                usage = Usage(seconds, memory, tuple(limits))
            if not reply.get("timeout"):
                return Verdict(value, usage=usage)
            verdict = Verdict(value, "stopped", "the program had to be stopped", usage)
        elif "error" in reply:
            verdict = Verdict(0.0, "errors", reply["error"])
        elif "timeout" in reply:
            verdict = Verdict(0.0, "timeouts", f"no verdict within {self.timeout:g} s")
        else:
            verdict = Verdict(0.0, "crashes", "the worker's process died")
        self.counts["timeouts" if verdict.failure == "stopped" else verdict.failure] += 1
        return verdict

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
                if "fatal" in reply and worker.sample is None:
                    raise ValueError(reply["fatal"])
                self.sources = reply.get("sources", self.sources)
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
            raise ValueError(f'reward "{self.reward}" was not ready to score: {reason} of its worker, exit code {code}')
        if worker.sample is not None:
            ended.append((worker.sample, {reason: True}))

    def _start(self):
        worker = Worker(self.reward, self.timeout, self.sandbox)
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


def _check_rows(rows: list[dict], reward: str) -> None:
    check = RowCheck(reward, truths=False)
    for index, row in enumerate(rows):
        try:
            check(row)
        except ValueError as error:
            raise ValueError(f"row {index} {error}") from error
