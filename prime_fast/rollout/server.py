"""The far end of `process.EngineProcess`: `python -m prime_fast.rollout.server FD PARENT`; FD is the socket.

Requests are tuples (verb, *arguments), answered by ("ok", result) in their order, but for "submit", which has no
answer: while groups are in work ("done", loads, groups, ended) comes whenever some finish, and at least every second as
a sign of life; `loads` counts the weights taken so far, `ended` the finished sequences of unfinished groups. An
exception is reported as ("error", is it a ValueError, text), and ends the process. Whether anyone listens now does not
matter: a trainer at work does not, and the engine goes on.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from prime_fast.engine import interrupt
from prime_fast.engine.batch import Sample

BEAT_SECONDS = 1.0
PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, connection = int(sys.argv[2]), Connection(int(sys.argv[1]))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the trainer's end is ours, however it comes
    if os.getppid() != parent:
        return
    for number in interrupt.SIGNALS:  # as Ctrl-C: the trainer takes care of it, and of this process
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)  # stdout belongs to the trainer
    outbox: queue.Queue = queue.Queue()
    threading.Thread(target=deliver, args=(connection, outbox), daemon=True).start()
    try:
        serve(connection, outbox.put)
    except (EOFError, ConnectionError):
        os._exit(0)  # nothing here is to be saved, and vLLM takes seconds to take itself apart
    except Exception as error:
        outbox.put(("error", isinstance(error, ValueError), f"{type(error).__name__}: {error}"))
        outbox.join()
        raise


def deliver(connection: Connection, outbox: queue.Queue) -> None:
    """Send what is put there, in order, however long the trainer does not listen."""
    try:
        while True:
            connection.send(outbox.get())
            outbox.task_done()
    except ConnectionError:
        os._exit(0)


def serve(connection: Connection, send: Callable[[tuple], None]) -> None:
    from prime_fast.rollout.vllm import VLLMEngine

    engine = VLLMEngine(**connection.recv())
    send(("ok", None))
    loads, last = 0, time.monotonic()
    while True:
        while connection.poll(0 if engine.busy else None):
            verb, *arguments = connection.recv()
            if verb == "load_bytes":
                (entries,) = arguments
                data = bytearray(entries[-1].start + entries[-1].size)
                connection.recv_bytes_into(data)
                verb, arguments = "load_bucket", (entries, torch.frombuffer(data, dtype=torch.uint8))
            result = getattr(engine, verb)(*arguments)
            loads += verb == "end_load"
            if verb != "submit":
                send(("ok", result))
        done, now = engine.step(), time.monotonic()
        if done or now - last > BEAT_SECONDS:
            packed = [(key, [pack(sample) for sample in samples]) for key, samples in done]
            send(("done", loads, packed, engine.ended))
            last = now


def pack(sample: Sample) -> tuple:
    """With arrays, for a tensor would travel as a file descriptor of shared memory."""
    return sample.tokens.numpy(), sample.logprob.numpy(), *sample[2:]


def unpack(packed: tuple) -> Sample:
    tokens, logprob, *rest = packed
    return Sample(torch.from_numpy(tokens), torch.from_numpy(logprob), *rest)


if __name__ == "__main__":
    main()
