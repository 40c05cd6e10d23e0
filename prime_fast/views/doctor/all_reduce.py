"""Do the devices of this machine reach each other? One all-reduce between processes, one process a device.

`python -m prime_fast.views.doctor.all_reduce BACKEND` is such a process, with RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT set.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack

ELEMENTS = 1 << 22  # float32: 16 MiB, enough for NCCL to use the links it would use in training


def problem(ranks: int, backend: str, seconds: float) -> str | None:
    """Why `ranks` processes cannot sum a tensor over torch.distributed's `backend`; None if they can."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        processes = []
        for rank in range(ranks):
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [sys.executable, "-W", "ignore", "-m", __name__, backend]
            environment = os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append((process, log))
        while (codes := [process.poll() for process, _ in processes]) != [0] * ranks:
            if time.monotonic() > deadline:
                late = [rank for rank, code in enumerate(codes) if code is None]
                return f"all-reduce over {backend} had no end after {seconds:.0f} s on ranks {late}"
            for rank, code in enumerate(codes):
                if code:
                    return f"rank {rank}: {_last_line(processes[rank][1])}"
            time.sleep(0.1)
    return None


def _last_line(log) -> str:
    log.seek(0)
    return (log.read().strip().splitlines() or ["ended and said nothing"])[-1]


def main() -> None:
    import torch
    import torch.distributed as dist

    backend, rank, ranks = sys.argv[1], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    values = torch.full((ELEMENTS,), float(rank + 1), device=device)
    dist.all_reduce(values)
    wanted = ranks * (ranks + 1) / 2
    if not (values == wanted).all():
        sys.exit(f"the sum of 1..{ranks} came out as {values.unique().tolist()[:4]}, not {wanted}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
