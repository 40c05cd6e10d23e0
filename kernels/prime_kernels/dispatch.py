"""Which back-ends an op has, and which one a call gets."""

import functools
import importlib
import importlib.util
import os
import platform
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prime_kernels import linear_torch, reference

BACKENDS = ("cuda", "triton", "cpu", "torch")  # fastest first
DEVICE = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}  # where the tensors of a back-end must be
TRITON = {"2.11": "3.6.0", "2.12": "3.7.1", "2.13": "3.7.1"}  # the release that a torch release is built with


class Lazy(NamedTuple):
    """An implementation imported at its first use, so that a missing Triton or compiler costs only its back-end."""

    module: str  # in this package
    name: str


# A back-end joins by adding its implementation to the line of its op; each takes what the reference one takes.
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "linear_logprob": {
        "triton": Lazy("linear_loss_triton", "logprob"),
        "cpu": Lazy("linear_cpu", "logprob"),
        "torch": (linear_torch.logprob, linear_torch.logprob_backward),
    },
    "linear_policy_loss": {
        "triton": Lazy("linear_loss_triton", "policy_loss"),
        "cpu": Lazy("linear_cpu", "policy_loss"),
        "torch": linear_torch.policy_loss,
    },
    "linear_prm_loss": {
        "triton": Lazy("linear_loss_triton", "prm_loss"),
        "cpu": Lazy("linear_cpu", "prm_loss"),
        "torch": linear_torch.prm_loss,
    },
    "prime_advantage": {
        "cuda": Lazy("advantage_cuda", "advantage"),
        "triton": Lazy("advantage_triton", "advantage"),
        "cpu": Lazy("advantage_cpu", "advantage"),
        "torch": reference.advantage,
    },
}


last_used: dict[str, str] = {}  # op -> the back-end of its last call in this process


def backends() -> dict[str, dict[str, str]]:
    """What is usable here: op -> {back-end: "ok", or the reason why not and the fix}."""
    return {op: {name: _problem(op, name) or "ok" for name in BACKENDS} for op in IMPLEMENTATIONS}


def resolve(op: str, backend: str | None = None, tensors: Iterable[Tensor | None] = ()):
    """The implementation of `op` for these arguments: the fastest usable one for None, else the one named.

    The fastest is cuda > triton > torch for CUDA tensors and cpu > torch for others. Any float64 tensor means torch,
    whose arithmetic is the only one in float64; so does a call without tensors. Nothing falls back from a named one.
    TRITON_INTERPRET=1, set before Triton is imported, lets "triton" run on CPU tensors (bfloat16 excepted: the
    interpreter gets it wrong), for tests.

    Raises ValueError for a name that is no back-end, RuntimeError for a back-end that cannot run this.
    """
    tensors = [x for x in tensors if x is not None]
    if backend is None:
        cuda = any(x.is_cuda for x in tensors)
        choice = BACKENDS if cuda else ("cpu", "torch") if tensors else ("torch",)
        backend = next(name for name in choice if not _problem(op, name, tensors))
    if backend not in BACKENDS:
        raise ValueError(f"{op}: there is no back-end {backend!r}; use one of {', '.join(BACKENDS)} or None")
    if problem := _problem(op, backend, tensors):
        raise RuntimeError(f"{op}: back-end {backend!r} cannot run: {problem}, or use 'torch'")
    last_used[op] = backend
    implementation = IMPLEMENTATIONS[op][backend]
    if isinstance(implementation, Lazy):
        return getattr(importlib.import_module(f"prime_kernels.{implementation.module}"), implementation.name)
    return implementation


def operator(name: str):
    """Decorator: the function is the PyTorch operator prime_kernels::`name`, an op's forward or backward.

    It runs on the device of its first tensor, whichever is current: Triton and CUDA launch on the current one.
    """

    def register(function):
        @functools.wraps(function)
        def on_its_device(*arguments, **options):
            with torch.cuda.device_of(next(x for x in arguments if isinstance(x, Tensor))):
                return function(*arguments, **options)

        return torch.library.custom_op(f"prime_kernels::{name}", on_its_device, mutates_args=())

    return register


def extension(name: str):
    """The compiled module prime_kernels.`name`; RuntimeError says why it is not there."""
    module, problem = _extension(name)
    if problem:
        raise RuntimeError(problem)
    return module


def stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0  # cpu: Triton's interpreter


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _problem(op: str, backend: str, tensors: list[Tensor] | None = None) -> str | None:
    """Why this back-end cannot run the op here, on these tensors if given; None if it can."""
    if backend == "torch":
        return None
    if backend not in IMPLEMENTATIONS[op]:
        return "this version does not have it: take another"
    if problem := MACHINE[backend]():
        return problem
    tensors = tensors or []
    wanted = "cpu" if backend == "triton" and interpreting() else DEVICE[backend]
    if other := next((x.device for x in tensors if x.device.type != wanted), None):
        return f"it takes {wanted} tensors and got {other}: move them with .to()"
    if any(x.dtype == torch.float64 for x in tensors):
        return "it has no float64: pass float32"
    if backend == "triton" and interpreting() and any(x.dtype == torch.bfloat16 for x in tensors):
        return "Triton's interpreter computes bfloat16 wrongly: pass float32"
    return None


def _cuda_problem() -> str | None:
    return _gpu_problem() or _extension("_cuda")[1]


def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        release = TRITON.get(".".join(torch.__version__.split(".")[:2]))
        beside = f"triton=={release}" if release else "triton, in the release that it was built with"
        return f"Triton is not installed: pip install {beside}, beside torch {torch.__version__}"
    return None if interpreting() else _gpu_problem()


def _cpu_problem() -> str | None:
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return "this CPU has no AVX2: take another"
    return _extension("_C")[1]


MACHINE = {"cuda": _cuda_problem, "triton": _triton_problem, "cpu": _cpu_problem}


def _gpu_problem() -> str | None:
    if torch.cuda.is_available():
        return None
    build = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no NVIDIA GPU"
    return f"{build}: use a machine with an NVIDIA GPU, its driver and a CUDA build of torch"


@functools.cache
def _extension(name: str):
    tool = {"_C": "a C++17 compiler (g++ or clang++)", "_cuda": "a CUDA toolkit (nvcc on PATH or CUDA_HOME)"}[name]
    if importlib.util.find_spec(f"prime_kernels.{name}") is None:
        return None, f"prime_kernels.{name} is not built: install {tool} and reinstall prime-fast"
    try:
        return importlib.import_module(f"prime_kernels.{name}"), None
    except ImportError as error:
        return None, f"prime_kernels.{name} does not load ({error}): reinstall prime-fast"
