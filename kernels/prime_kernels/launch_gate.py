"""The launch gate: the host code of every op as on a GPU of some chip, and every kernel it launches compiled for it.

Calls (launch_calls.py) go through the public function, its checks, the operator, the back-end and autograd. Triton
specialises the arguments that arrive and compiles what it has not seen; a driver in the place of NVIDIA's measures each
kernel once and does not launch it.

Not real: tensors lie on the CPU, and dispatch and tune are told otherwise; products that cuBLAS would make are checked
for shapes and dtypes alone; a launch zeroes the floats it is given, so that host code reads a good result; of the CUDA
extension only the choice of the kernel is left.
"""

import ctypes
import functools
import inspect
import itertools
import os
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch

import prime_kernels
from prime_kernels import advantage_cuda, advantage_rows, checks, dispatch, launch_calls, linear_fused, tune

NOT_GPU = ("cpu", "torch")
SUMS, STATUS = 8, 13  # places in csrc/advantage_cuda.cpp
MOMENTS = 15  # place in csrc/credit_params.h
devices = itertools.count(1000)  # Triton keeps what it compiled by the device's number: a new one for each driver


class Kernel(NamedTuple):
    """A compiled Triton kernel and the first call that wanted it."""

    name: str
    binary: bytes
    shared: int  # bytes
    scratch: int  # bytes of global memory a program wants from the host
    matrix: bool  # multiplies matrices
    call: str


class Driver:
    """What Triton asks of a GPU and its driver."""

    def __init__(self, chip: int):
        self.chip, self.device, self.utils = chip, next(devices), self
        self.kernels: list[Kernel] = []
        self.call = ""  # the call that is being made

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.chip, 32)

    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": 2**31}  # judged with everything else, later

    def launcher_cls(self, source, metadata):
        self.loading = source.fn, metadata
        return launch

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        function, metadata = self.loading
        scratch = metadata.global_scratch_size + metadata.profile_scratch_size
        self.kernels.append(Kernel(name, binary, shared, scratch, "tl.dot(" in function.src, self.call))
        return self, None, 0, 0, 1024  # module, function, registers, spills, threads a block may have


def launch(*arguments) -> None:
    for x in arguments:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.detach().zero_()


class Extension:
    """In the place of prime_kernels._cuda: which kernel csrc/advantage.cu and csrc/credit.cu would launch."""

    def __init__(self):
        self.kernels: dict[str, str] = {}  # name -> the first call that wanted it
        self.call = ""

    def advantage(self, pointers, tokens, rows, *options) -> None:
        gamma, bfloat16 = options[6], options[-2]
        ctypes.memset(pointers[SUMS], 0, 8 * advantage_rows.FIELDS * rows)
        ctypes.memset(pointers[STATUS], 0, 8)
        name = f"advantage_kernel<{'__nv_bfloat16' if bfloat16 else 'float'}, {str(gamma != 1).lower()}>"
        self.kernels.setdefault(name, self.call)

    def credit(self, pointers, *options) -> None:
        ctypes.memset(pointers[MOMENTS], 0, 8 * 4)
        self.kernels.setdefault(f"credit_kernel<{'__nv_bfloat16' if options[-2] else 'float'}>", self.call)


def product(a, b, out, accumulate: bool = False):
    """linear_fused.product, of shapes and dtypes alone."""
    assert out.dtype == torch.float32, f"a product of {a.dtype} would be added up in {out.dtype}"
    wider = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    torch.mm(a.to("meta"), b.to("meta"), out=out.to("meta"), **wider)
    return out


@contextmanager
def gpu(chip: int):
    """Ops on CPU tensors take the GPU's back-ends, on this chip; -> what they launch, a Driver and an Extension."""
    from triton.runtime import driver

    machine, extension = Driver(chip), Extension()
    before = driver._active
    with ExitStack() as stack:
        for name in dispatch.BACKENDS:
            if name not in NOT_GPU:
                stack.enter_context(mock.patch.dict(dispatch.DEVICE, {name: "cpu"}))
                stack.enter_context(mock.patch.dict(dispatch.MACHINE, {name: lambda: None}))
        stack.enter_context(mock.patch.object(tune, "chip", lambda device: chip))
        stack.enter_context(mock.patch.object(linear_fused, "product", product))
        stack.enter_context(mock.patch.object(advantage_cuda, "extension", lambda name: extension))
        stack.enter_context(launch_calls.alone())
        driver.set_active(machine)
        stack.callback(driver.set_active, before)
        yield machine, extension


class Seen:
    """What calls gave each parameter, against what it takes: its own checks and annotations say."""

    def __init__(self):
        self.takes, self.got = defaultdict(set), defaultdict(set)

    def tensor(self, check, name, value, shape, dtypes, *rest, **why) -> None:
        self.takes[name] |= {dtype for dtype in dtypes if dtype != torch.float64}  # torch's own, or cast before
        check(name, value, shape, dtypes, *rest, **why)

    def one_of(self, check, name, value, choices) -> None:
        self.takes[name] |= set(choices)
        check(name, value, choices)

    def call(self, op: str, arguments: dict) -> None:
        for name, parameter in inspect.signature(getattr(prime_kernels, op)).parameters.items():
            if name == "backend":
                continue
            value = arguments[name]
            if parameter.default is None or "None" in str(parameter.annotation):
                self.takes[name] |= {None, "a value"}
                self.got[name].add(None if value is None else "a value")
            if parameter.annotation is bool:
                self.takes[name] |= {False, True}
            self.got[name].add(value.dtype if isinstance(value, torch.Tensor) else value)

    def missing(self, op: str) -> list[str]:
        found = []
        for name, parameter in inspect.signature(getattr(prime_kernels, op)).parameters.items():
            if parameter.annotation is float and len(self.got[name]) < 2:
                found.append(f"{name} other than {self.got[name]}")
            found += [f"{name} = {value}" for value in self.takes[name] - self.got[name]]
        return sorted(found)


def unvaried() -> list[str]:
    """What the calls never give, by op; they run on the CPU, by the reference. Errors as launch_calls.parameters."""
    found = []
    for op in dispatch.IMPLEMENTATIONS:
        seen = Seen()
        with (
            launch_calls.alone(),
            mock.patch.object(checks, "tensor", functools.partial(seen.tensor, checks.tensor)),
            mock.patch.object(checks, "one_of", functools.partial(seen.one_of, checks.one_of)),
        ):
            for setting in launch_calls.settings(op, heads=(16,)):
                arguments = launch_calls.arguments(op, setting)
                seen.call(op, arguments)
                getattr(prime_kernels, op)(**arguments, backend="torch")
        found += [f"{op}: {missing}" for missing in seen.missing(op)]
    return found


def run(chip: int, heads: tuple[int, ...], strength: int) -> tuple[Driver, Extension, list[str]]:
    """Every call on this chip -> the kernels launched, and the calls that failed or were refused, with the reason."""
    problems = []
    with gpu(chip) as (driver, extension):
        for op, backends in dispatch.IMPLEMENTATIONS.items():
            for setting in launch_calls.settings(op, heads, strength):
                for backend in backends:
                    if backend in NOT_GPU:
                        continue
                    driver.call = extension.call = described(op, setting)
                    if problem := made(op, backend, setting):
                        problems.append(f"{driver.call} on sm_{chip}: {problem}")
    return driver, extension, problems


def made(op: str, backend: str, setting: dict) -> str | None:
    """One call and its backward; what is wrong with it. What a PRIME_KERNELS_ variable asks for may be refused."""
    overrides = {name: value for name, value in setting.items() if name.startswith("PRIME_KERNELS_") and value}
    arguments = launch_calls.arguments(op, setting)
    others = {name: value for name, value in os.environ.items() if not name.startswith("PRIME_KERNELS_")}
    with mock.patch.dict(os.environ, others | overrides, clear=True):
        try:
            results = getattr(prime_kernels, op)(**arguments, backend=backend)
            results = [x for x in (results if isinstance(results, tuple) else [results]) if x.requires_grad]
            results = results[setting.get("backward", slice(None))] or results
            if results:
                torch.autograd.backward(results, [torch.ones_like(x) for x in results])
        except Exception as error:  # whatever it is, the calls after it are made and the command fails
            refused = isinstance(error, ValueError) and any(name in str(error) for name in overrides)
            return None if refused else f"{type(error).__name__}: {error}"


def described(op: str, setting: dict) -> str:
    """The op and what is not plain in its call."""
    plain = launch_calls.OPS[op].axes
    words = [op]
    for name, value in setting.items():
        if name in launch_calls.OUTER or value != plain[name][0]:
            value = "+".join(value) if name == "grads" else str(value).removeprefix("torch.").replace(" ", "")
            words.append(f"{name.removeprefix('PRIME_KERNELS_')}={value}")
    return " ".join(words)
