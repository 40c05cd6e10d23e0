"""torch, the driver and the GPUs: whether they fit together, compute right and reach each other."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from collections.abc import Iterator

from prime_fast.views.doctor import all_reduce
from prime_fast.views.doctor.check import GIB, Check, raised

ALL_REDUCE_SECONDS = 120.0
SHM_BYTES = GIB  # of /dev/shm, for NCCL; containers have 64 MiB unless told otherwise
SMALLEST_CHIP = (8, 0)  # compute capability
GPU_TORCH = "pip install torch==2.11.0, or `make env` anew on this machine"
KERNEL_TOLERANCE = 1e-4  # float32 arithmetic against float64


def torch_build() -> Iterator[Check]:
    """The build of torch, and whether it can use the driver that is here."""
    import torch

    cuda, driver = torch.version.cuda, _driver_cuda()
    yield Check("torch", "ok", f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'no CUDA in this build'}")
    if driver is None:
        fix = "install the NVIDIA driver; in a container, start it with --gpus all" if cuda else ""
        yield Check("driver", "note", "no NVIDIA driver: training runs on the CPU, for small models alone", fix)
        return
    found = f"NVIDIA, for CUDA up to {driver // 1000}.{driver % 1000 // 10}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cuda is None:
        yield Check("driver", "FAIL", f"{found}, but this torch is a CPU build", GPU_TORCH)
    elif driver // 1000 < int(cuda.split(".")[0]):
        yield Check("driver", "FAIL", f"{found}; this torch needs CUDA {cuda}", "install a newer NVIDIA driver")
    elif torch.cuda.is_available():
        yield Check("driver", "ok", found)
    elif hidden is not None:
        yield Check("driver", "note", f"{found}; CUDA_VISIBLE_DEVICES={hidden} hides every GPU", "unset it to use them")
    else:
        fix = "nvidia-smi says whether the GPU is well; a reboot loads a driver that was just installed"
        yield Check("driver", "FAIL", f"{found}, but torch sees no GPU", fix)


def gpus() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        yield Check("GPU", "note", "none")
        return
    for index in range(torch.cuda.device_count()):
        chip = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found = f"{chip.name}, sm_{chip.major}{chip.minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        if (chip.major, chip.minor) < SMALLEST_CHIP:
            fix = "hide it with CUDA_VISIBLE_DEVICES; use an A100, H100, H200 or another of sm_80 and newer"
            yield Check(f"GPU {index}", "FAIL", f"{found}: too old for bfloat16 and our kernels", fix)
        elif free < 0.9 * total:
            yield Check(f"GPU {index}", "note", found, "end what else runs on it; nvidia-smi lists that")
        else:
            yield Check(f"GPU {index}", "ok", found)


def kernels() -> Iterator[Check]:
    """Each back-end: why it cannot run here, or its largest error against float64 after it ran."""
    import torch

    import prime_kernels
    from prime_kernels.dispatch import BACKENDS, IMPLEMENTATIONS

    gpu = torch.cuda.is_available()
    table = prime_kernels.backends()
    for backend in BACKENDS:
        has = [op for op in table if backend in IMPLEMENTATIONS[op]]
        reason = next((table[op][backend] for op in has if table[op][backend] != "ok"), None)
        name = f"kernels: {backend}"
        if reason:
            needed = gpu and backend == "triton"
            yield Check(name, "FAIL" if needed else "note", *reason.rsplit(": ", 1))
            continue
        try:
            errors = {op: _kernel_error(op, backend, "cuda" if gpu and backend != "cpu" else "cpu") for op in has}
        except Exception as error:
            yield raised(name, error)
            continue
        worst = max(errors, key=errors.get)
        if errors[worst] < KERNEL_TOLERANCE:
            yield Check(name, "ok", f"{', '.join(has)}; largest error {errors[worst]:.1e}")
        else:
            fix = "run `python -m pytest tests/kernels` in the repository and report what fails"
            yield Check(name, "FAIL", f"{worst} is off by {errors[worst]:.1e}", fix)


def _kernel_error(op: str, backend: str, device: str) -> float:
    """The largest deviation of a small call, in the dtype of training there, from the torch back-end in float64."""
    import torch

    import prime_kernels

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 64, generator=draw).to(dtype) for rows in (48, 300))
    targets = torch.randint(300, (48,), generator=draw)
    old, reference = (-5 - torch.rand(48, generator=draw) for _ in range(2))
    cu_seqlens, outcome = torch.tensor([0, 7, 24, 40, 48]).int(), torch.tensor([1.0, 0.0, 0.0, 1.0])
    group = torch.tensor([0, 0, 1, 1])
    arguments = {
        "linear_logprob": (hidden, weight, targets),
        "linear_policy_loss": (hidden, weight, targets, old, reference + 5, torch.full((48,), 1 / 48)),
        "linear_prm_loss": (hidden, weight, targets, reference, outcome, cu_seqlens),
        "prime_advantage": (old, reference, outcome, cu_seqlens, group),
    }[op]
    results = []
    exact = [x.double() if x.is_floating_point() else x for x in arguments]
    for tensors, name in (([x.to(device) for x in arguments], backend), (exact, "torch")):
        out = getattr(prime_kernels, op)(*tensors, backend=name)
        parts = [out] if isinstance(out, torch.Tensor) else [part for part in out if part is not None]
        results.append(torch.cat([part.double().cpu().flatten() for part in parts]))
    return (results[0] - results[1]).abs().max().item()


def shared_memory() -> Iterator[Check]:
    size = shutil.disk_usage("/dev/shm")
    found = f"{size.free / GIB:.2f} of {size.total / GIB:.2f} GiB free"
    if size.free < SHM_BYTES:
        fix = "docker run --shm-size=16g, or mount -o remount,size=16g /dev/shm"
        yield Check("/dev/shm", "FAIL" if _gpu_count() > 1 else "note", f"{found}: NCCL needs more between GPUs", fix)
    else:
        yield Check("/dev/shm", "ok", found)


def nccl() -> Iterator[Check]:
    """A real all-reduce between all GPUs here."""
    count = _gpu_count()
    if count < 2:
        yield Check("NCCL", "note", f"not tried: it connects GPUs, and here is {'one' if count else 'none'}")
        return
    start = time.monotonic()
    if problem := all_reduce.problem(count, "nccl", ALL_REDUCE_SECONDS):
        fix = "NCCL_DEBUG=INFO says where it stops; NCCL_P2P_DISABLE=1 shows whether it is the link between the GPUs"
        yield Check("NCCL", "FAIL", problem, fix)
    else:
        yield Check("NCCL", "ok", f"all-reduce between {count} GPUs, {time.monotonic() - start:.0f} s with its start")


def _driver_cuda() -> int | None:
    """The newest CUDA that the driver here serves (13000 is 13.0); None without a driver."""
    try:
        version = ctypes.c_int()
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed or not version.value else version.value


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
