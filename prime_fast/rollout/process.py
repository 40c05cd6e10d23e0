"""A vLLM engine in a process of its own: it can die, hang or be killed without taking the trainer along.

Weights travel as CUDA IPC handles (the engine's workers read the trainer's bucket where it lies) or, on a CPU, as bytes
through the socket; never over the disk. One bucket is gathered while the engine loads the one before.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from prime_fast.config import Config
from prime_fast.engine import distributed
from prime_fast.engine.batch import Sample
from prime_fast.rollout import TICK_SECONDS, EngineDied, EngineError, Request, RolloutEngine, release_cached
from prime_fast.rollout.server import unpack
from prime_fast.rollout.vllm import GPU_SHARE, SLEEP_LEVEL, check_installed
from prime_fast.rollout.weights import BUCKET_BYTES, Entry, transfer

CPU_BUCKET_BYTES = 32 << 20
CLOSE_SECONDS = 5.0
# of a process group that is not the engine's
FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
IPC_DEVICE = 6  # where the device's index stands among the arguments of torch's rebuild_cuda_tensor


class Deadlines(NamedTuple):
    """Seconds after which the engine counts as dead."""

    start: float = 900.0
    request: float = 600.0  # for an answer: a bucket of weights, sleep, wake
    silence: float = 300.0  # without a sign of life while it generates


class EngineProcess(RolloutEngine):
    """Runs `VLLMEngine(**settings)` behind a socket.

    gpus: what the engine may see, as CUDA_VISIBLE_DEVICES would name it. source: which of these the trainer's buckets
    lie on. Raises EngineDied where a call finds the process gone or past a deadline.
    """

    concurrent = True

    def __init__(
        self,
        settings: dict[str, Any],
        device: torch.device,
        *,
        gpus: Sequence[str] = (),
        source: int = 0,
        bucket_bytes: int = CPU_BUCKET_BYTES,
        deadlines: Deadlines = Deadlines(),  # noqa: B008
    ) -> None:
        check_installed()
        self.settings, self.device, self.gpus, self.source = settings, device, gpus, source
        self.bucket_bytes, self.deadlines, self.started = bucket_bytes, deadlines, False
        self.start(settings)

    @property
    def batch(self) -> int:
        return self.settings["batch"]

    @property
    def forgets(self) -> bool:
        return self.settings["sleep_level"] == 2

    @classmethod
    def for_config(
        cls,
        config: Config,
        path: str,
        eos_ids: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        trains: bool = True,
    ) -> EngineProcess | None:
        """This rank's engine, or None where another rank's serves it too (tensor parallel, or fewer GPUs than ranks).

        rollout.vllm: arguments of `vllm.LLM`, and three of ours: `gpus`, those of each node that the engines have to
        themselves (default: engine and trainer share), `sleep_level` of engines that share, and `bucket_mib`, the size
        of a weight bucket. trains: it will sleep and take other weights.
        """
        options = dict(config.rollout.vllm)
        own, width = options.pop("gpus", None), options.get("tensor_parallel_size", 1)
        default = BUCKET_BYTES if device.type == "cuda" else CPU_BUCKET_BYTES
        bucket_bytes = options.pop("bucket_mib", default >> 20) << 20
        sleep_level = options.pop("sleep_level", SLEEP_LEVEL if trains else 0)
        gpus, source = [], 0
        if device.type == "cuda":
            if trains:
                _check_allocator()
            index, ranks = device.index, distributed.local_world_size()
            names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
            visible = names.split(",")
            if own is None:
                if ranks % width:
                    raise ValueError(f"rollout.vllm.tensor_parallel_size={width} does not divide {ranks} ranks a node")
                gpus = visible[index : index + width] if index % width == 0 else []
            else:
                if wrong := [gpu for gpu in own if gpu not in range(ranks, len(visible))]:
                    raise ValueError(
                        f"rollout.vllm.gpus names GPU {wrong[0]}, but the trainer has 0 to {ranks - 1} of the "
                        f"{len(visible)} that this node shows; leave it out, or start fewer ranks"
                    )
                gpus = [visible[gpu] for gpu in own[index * width : (index + 1) * width]]
                source, sleep_level = len(gpus), 0
                options.setdefault("gpu_memory_utilization", 0.9)
            release_cached()
            distributed.barrier()  # an engine of several GPUs needs what other ranks give back
            if len(gpus) < width:
                return None
            gpus += [visible[index]] * (own is not None)
        settings = {
            "path": path,
            "eos_ids": list(eos_ids),
            "dtype": dtype,
            "longest": config.data.max_prompt + config.rollout.max_response,
            "batch": config.rollout.batch,
            "sleep_level": 0 if config.rollout.ahead else sleep_level,  # it works while the trainer does
            "options": options,
        }
        return cls(settings, device, gpus=gpus, source=source, bucket_bytes=bucket_bytes)

    def start(self, settings: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        wait = struct.pack("ll", int(self.deadlines.request), 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        command = [sys.executable, "-m", "prime_fast.rollout.server", str(theirs.fileno()), str(os.getpid())]
        self.process = subprocess.Popen(  # in a session of its own: Ctrl-C is for the trainer, which then ends it
            command, pass_fds=[theirs.fileno()], env=self._environment(), start_new_session=True
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self.finalizer = weakref.finalize(self, _end, self.process, self.connection)
        self.heard, self.loads = time.monotonic(), 0
        self.working: set[int] = set()
        self.ended = 0
        self.finished: list[tuple[int, list[Sample]]] = []
        self._send(settings)
        self._answer(self.deadlines.start, "starting")
        self.started = True

    def restart(self, room: float) -> None:
        """vLLM refuses to start where less is free than it is to take: beside a trainer at work it takes less."""
        self.finalizer()
        options = self.settings["options"]
        shared = self.source == 0
        if shared and room < options.get("gpu_memory_utilization", GPU_SHARE):
            options = options | {"gpu_memory_utilization": room}
        self.start(self.settings | {"options": options})
        self.sleep()
        self.wake()

    def submit(self, request: Request) -> None:
        if not self.working:
            self.heard = time.monotonic()
        self.working.add(request.key)
        self._send(("submit", request))

    def step(self) -> list[tuple[int, list[Sample]]]:
        """Listen until groups finish, but not long."""
        seconds = 0.0 if self.finished else self.patience
        while self.working and self.connection.poll(seconds):
            self._note(self._receive())
            seconds = 0.0
        if self.working and not self.finished and time.monotonic() - self.heard > self.deadlines.silence:
            self._hangs(f"gave no sign of life for {self.deadlines.silence:g} s while generating")
        done, self.finished = self.finished, []
        self.working -= {key for key, _ in done}
        return done

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        flats = [torch.empty(self.bucket_bytes, dtype=torch.uint8, device=self.device) for _ in range(2)]
        travelling: deque[Tensor] = deque()

        def landed() -> None:
            self._answer(self.deadlines.request, "loading weights")
            travelling.popleft()

        def load(entries: list[Entry], flat: Tensor) -> None:
            self._send_bucket(entries, flat)
            travelling.append(flat)
            if len(travelling) == len(flats):
                landed()

        def finish() -> Any:
            while travelling:
                landed()
            return self._call("end_load")

        self._call("begin_load", self.version)
        transfer(weights, cycle(flats), load, finish)
        self.loads += 1

    def sleep(self) -> None:
        self._call("sleep")

    def wake(self) -> None:
        self._call("wake")

    def ready(self) -> None:
        self._call("ready")

    def close(self) -> None:
        self.finalizer()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _send_bucket(self, entries: list[Entry], flat: Tensor) -> None:
        if flat.is_cuda:
            torch.cuda.current_stream().synchronize()  # the reader is in another process: its stream cannot wait
            rebuild, arguments = reduce_tensor(flat)
            arguments = (*arguments[:IPC_DEVICE], self.source, *arguments[IPC_DEVICE + 1 :])
            self._send(("load_bucket", entries, (rebuild, arguments)))
        else:
            self._send(("load_bytes", entries))
            self._send(memoryview(flat.numpy())[: entries[-1].start + entries[-1].size])

    def _call(self, verb: str, *arguments: Any) -> Any:
        self._send((verb, *arguments))
        return self._answer(self.deadlines.request, verb)

    def _send(self, message: Any) -> None:
        try:
            if isinstance(message, memoryview):
                self.connection.send_bytes(message)
            else:
                self.connection.send(message)
        except BlockingIOError:
            self._hangs(f"took no message for {self.deadlines.request:g} s")
        except OSError:
            self._died("ended")

    def _answer(self, seconds: float, doing: str) -> Any:
        """The result of the oldest request; groups that finish meanwhile are kept for `step`."""
        deadline = time.monotonic() + seconds
        while True:
            if not self.connection.poll(max(0.0, deadline - time.monotonic())):
                self._hangs(f"did not answer within {seconds:g} s while {doing}")
            kind, *content = self._receive()
            if kind == "ok":
                return content[0]
            self._note((kind, *content))

    def _receive(self) -> tuple:
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self._died("ended")
        self.heard = time.monotonic()
        if message[0] == "error":
            _, mistake, text = message
            if mistake and not self.started:  # later it is no longer the user's
                self.close()
                raise ValueError(f"the rollout engine refused: {text.removeprefix('ValueError: ')}")
            self._died(f"failed with {text}")
        return message

    def _note(self, message: tuple) -> None:
        _, loads, groups, self.ended = message
        if loads != self.loads:
            raise EngineError(f"the rollout engine generates with weights {loads}, the trainer sent it {self.loads}")
        self.finished += [(key, [unpack(sample) for sample in samples]) for key, samples in groups]

    def _hangs(self, how: str) -> None:
        self.process.kill()  # it would not hear that it should end
        self._died(how)

    def _died(self, how: str) -> None:
        self.finalizer()
        raise EngineDied(f"the rollout engine's process {how}; exit code {self.process.returncode}")

    def _environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        ours["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        ours.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # vLLM's, about torch
        if self.gpus:
            ours["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
            # torch.compile's results are written there by name and not at once: engines must not share them
            root = Path(ours.get("VLLM_CACHE_ROOT") or Path(ours.get("XDG_CACHE_HOME") or "~/.cache", "vllm"))
            place = "-".join([platform.node(), *self.gpus]).replace("/", "-")
            ours["VLLM_CACHE_ROOT"] = str(root.expanduser() / "prime-fast" / place)
        return ours


def _check_allocator() -> None:
    """Another process opens expandable segments with pidfd_getfd, which containers forbid (pytorch #165685)."""
    for name in ALLOCATOR:
        if re.search(r"expandable_segments\s*:\s*True", os.environ.get(name, "")):
            raise ValueError(
                f"{name} asks for expandable segments, which rollout.engine=vllm cannot read weights from; "
                "take expandable_segments out of it, or set rollout.engine=hf"
            )


def _end(process: subprocess.Popen, connection: Connection) -> None:
    """End the process, whatever it started, and reap it. A closed socket asks it to go by itself.

    Its workers count as well, for the next engine needs their GPUs; what nobody reaps is not waited for long.
    """
    connection.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(CLOSE_SECONDS if process.poll() is None else 0)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + CLOSE_SECONDS
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(TICK_SECONDS / 10)
    process.wait()
