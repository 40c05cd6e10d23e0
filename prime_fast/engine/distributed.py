"""The few collective operations the trainer needs, on torch.distributed. A lone process is a world of one."""

from __future__ import annotations

import atexit
import os
import socket
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
HANG = 1800.0  # seconds, see LogConfig.hang
# A rank may wait for one that gets on, with a long generation, longer than the watchdog lets all of them stand still
TIMEOUT_PER_HANG = 4
NEVER = timedelta(days=365)
collective_timeout = timedelta(seconds=TIMEOUT_PER_HANG * HANG)


class Stop(RuntimeError):
    """The run cannot go on. Every rank raises it at the same point, so that a checkpoint can be left."""

    code = 1  # with which the program then ends


def initialize(hang: float = HANG) -> torch.device:
    """Join the process group that torchrun described, or form a world of one; returns this rank's device.

    hang: seconds without any progress after which the watchdog ends a run; 0 = never. It is to speak first.
    """
    global collective_timeout
    collective_timeout = timedelta(seconds=TIMEOUT_PER_HANG * hang) if hang else NEVER
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    here, on_gpu = device(), torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=collective_timeout)
        atexit.register(dist.destroy_process_group)
    return here


def device() -> torch.device:
    """This rank's, with its index, which "cuda" alone does not have."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def sum_(tensor: Tensor) -> Tensor:
    """All-reduce in place. Where every rank fills its own places of a zero tensor, this shares them exactly."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_lists(items: list[T]) -> list[T]:
    """Every rank's list, concatenated in rank order, on every rank."""
    if world_size() == 1:
        return items
    lists: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def max_(value: float) -> float:
    """The largest of all ranks' values, on every rank."""
    return max(gather_lists([value]))
