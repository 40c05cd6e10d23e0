"""A reward worker's process, as the pool sees it: started, asked, heard, killed."""

import json
import logging
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

START_SECONDS = 120.0  # for a worker to import what it needs; not counted against any sample
END_SECONDS = 30.0  # for a killed worker and its descendants to be gone
RECEIVE_BYTES = 1 << 16
HEADER = struct.Struct("<I")  # a frame: the length of its body, then the body, JSON

logger = logging.getLogger(__name__)


class Worker:
    """One worker: starting, then idle (no sample) or running (sample is its index in the batch)."""

    def __init__(self, reward: str, timeout: float, sandbox: str):
        self.folder = None
        if sandbox == "rlimits-only":  # where programs write; removed whoever is killed
            self.folder = tempfile.mkdtemp(prefix="prime-fast-")
            os.chmod(self.folder, 0o711)
        self.socket, theirs = socket.socketpair()
        life, self.life = os.pipe()  # ours is closed when this process ends, however it ends
        options = [str(theirs.fileno()), str(life), str(timeout), sandbox, *([self.folder] if self.folder else [])]
        command = [sys.executable, "-m", "prime_fast.rewards.worker", reward, *options]
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
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
