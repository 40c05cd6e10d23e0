"""The engines of all ranks, driven together: who serves which group, weight syncs, and what happens when one dies.

Every method is called by every rank at the same point, for gathering ZeRO-3 weights takes all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from prime_fast.engine import distributed, interrupt
from prime_fast.engine.batch import Sample
from prime_fast.progress import say
from prime_fast.rollout import TICK_SECONDS, EngineDied, EngineError, Request, RolloutEngine, release_cached
from prime_fast.rollout.binding import Binding

Weights = Callable[[], Iterator[tuple[str, Tensor]]]
RESERVE_BYTES = 4 << 30  # of a GPU, for what a new engine takes beyond its share and for gathering weights


class Fleet:
    """engine: this rank's own, or None where another rank's serves it too. weights: a fresh pass over the policy's.

    An engine that dies is restarted, gets the weights and redoes its unfinished groups from their start: once, until
    the next step has been made (`settled`). A second death raises EngineError on every rank.

    version: how many steps have changed the policy's weights; whoever changes them counts.
    """

    def __init__(self, engine: RolloutEngine | None, weights: Weights) -> None:
        self.engine, self.weights = engine, weights
        batches = enumerate(distributed.gather_lists([engine and engine.batch]))
        self.binding = Binding({rank: batch for rank, batch in batches if batch})
        if not self.binding.load:
            raise ValueError("no rank has a rollout engine; give rollout.vllm.gpus at least tensor_parallel_size GPUs")
        self.forgets = any(distributed.gather_lists([engine is not None and engine.forgets]))
        self.pending: dict[int, Request] = {}  # this rank's unfinished groups
        self.restarts, self.asleep = 0, False  # asleep: until it is ready again
        self.version = 0
        self.patience = TICK_SECONDS  # of `step`, where nothing finishes

    @property
    def concurrent(self) -> bool:
        return self.engine is None or self.engine.concurrent

    @property
    def engines(self) -> int:
        return len(self.binding.load)

    def submit(self, requests: list[Request]) -> None:
        """Have groups generated, by whichever engine has room first. Every rank gives the same ones."""
        self.binding.add(requests)
        self.bind()

    def bind(self, everything: bool = False) -> None:
        """Hand waiting groups to the engines that have room; everything: to all, for nobody will look after them."""
        bound = list(self.binding.take(everything))
        if not bound:  # on no rank
            return
        mine = [request for rank, request in bound if rank == distributed.rank()]
        self.pending |= {request.key: request for request in mine}

        def submit() -> None:
            for request in mine:
                self.engine.submit(request)

        self._together(submit)

    def step(self) -> list[tuple[int, list[Sample]]]:
        """Groups of this rank's engine that have finished since the last call; others take their place."""
        done: list[tuple[int, list[Sample]]] = []

        def work() -> list[tuple[int, list[int], int]]:
            if not self.pending:
                return []
            self.engine.patience = self.patience
            done.extend(self.engine.step())
            return [(distributed.rank(), [key for key, _ in done], self.engine.ended)]

        for rank, keys, ended in self._together(work):
            self.binding.finished(rank, keys, ended)
        for key, _ in done:
            del self.pending[key]
        self.bind()
        return done

    def generate(self, requests: list[Request]) -> dict[int, list[Sample]]:
        """All requests' samples by key, on every rank; every rank gives the same requests."""
        self.submit(requests)
        results: dict[int, list[Sample]] = {}
        while len(results) < len(requests):
            if interrupt.agreed():
                raise interrupt.Preempted("asked to leave before the first step")
            results |= dict(distributed.gather_lists(self.step()))
        return results

    def sync(self) -> None:
        """Give every engine the policy's present weights, and make sure that it holds them."""
        self._together(self._push)

    def sleep(self) -> None:
        self.asleep = True
        self._together(lambda: self.engine and self.engine.sleep(), again=True)

    def wake(self, changed: bool) -> None:
        """Be ready to generate. changed: the policy's weights are no longer those of the last sync.

        Before each part that an engine maps, every rank gives back what it keeps in store.
        """
        if self.asleep:
            self._together(release_cached)
            self._together(lambda: self.engine and self.engine.wake(), again=True)
        if changed or self.asleep and self.forgets:
            self.sync()
        if self.asleep:
            self._together(release_cached)
            self._together(lambda: self.engine and self.engine.ready(), again=True)
            self.asleep = False

    def settled(self) -> None:
        """A step was completed: an engine that dies from now on gets its second chance again."""
        self.restarts = 0

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()

    def kill(self) -> None:
        """From any thread, at once, before this process ends without a word."""
        if self.engine is not None:
            self.engine.kill()

    def _push(self) -> None:
        weights = self.weights()
        try:
            if self.engine is not None:
                self.engine.version = self.version
                self.engine.load_weights(weights)
        finally:
            for _ in weights:  # the other ranks go on gathering
                pass

    def _together(self, action: Callable[[], list | None], again: bool = False) -> list:
        """Do it on every rank; where an engine died, bring it back with weights and work. Other errors go to all.

        again: the new engine has to do it too. Returns what the ranks' actions returned, in the order of the ranks.
        """
        result, own = None, None
        try:
            result = action()
        except EngineError as error:
            own = error
        everywhere = distributed.gather_lists([(result or [], own)])
        results = [item for part, _ in everywhere for item in part]
        errors = [error for _, error in everywhere if error is not None]
        if not errors:
            return results
        fatal = [error for error in errors if not isinstance(error, EngineDied)]
        if fatal or self.restarts:
            raise own or EngineError(str((fatal or errors)[0]))
        self.restarts += 1
        if distributed.rank() == 0:
            say(f"{errors[0]}; restarting it")
        died = own is not None
        del own, errors, fatal, everywhere  # their tracebacks hold the buckets of a sync
        self._together(release_cached)
        room = min(distributed.gather_lists([_room()]))
        self._together(lambda: died and self.engine.restart(room))
        self._together(self._push if died else self._follow)
        self._together(release_cached)
        self._together(lambda: died and self._take_up())
        if again:
            self._together(lambda: died and action())
        return results

    def _take_up(self) -> None:
        if not self.asleep:
            self.engine.ready()
        for request in self.pending.values():
            self.engine.submit(request)

    def _follow(self) -> None:
        for _ in self.weights():
            pass


def _room() -> float:
    """The share of this rank's GPU that a new engine may take."""
    if not torch.cuda.is_available():
        return 1.0
    free, total = torch.cuda.mem_get_info()
    return (free - RESERVE_BYTES) / total
