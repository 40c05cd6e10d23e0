import subprocess
import sys

import pytest
import torch

from prime_kernels import backends, dispatch

OP = "prime_advantage"
SINGLE, DOUBLE, HALF = torch.zeros(1), torch.zeros(1).double(), torch.zeros(1).bfloat16()


@pytest.fixture
def machine(monkeypatch):
    """A machine with everything, each back-end of the op named after itself."""
    for name in dispatch.MACHINE:
        monkeypatch.setitem(dispatch.MACHINE, name, lambda: None)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, OP, {name: name for name in dispatch.BACKENDS})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return monkeypatch


class Gpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda:0")


def on_gpu(dtype=torch.float32):
    return torch.zeros(1, dtype=dtype).as_subclass(Gpu)


def test_the_device_and_the_dtype_choose(machine):
    assert dispatch.resolve(OP, None, [SINGLE, None]) == "cpu"
    assert dispatch.resolve(OP, None, [SINGLE, HALF]) == "cpu"
    assert dispatch.resolve(OP, None, [SINGLE, DOUBLE]) == "torch"
    assert dispatch.resolve(OP, None, [on_gpu(), None]) == "cuda"
    assert dispatch.resolve(OP, None, [on_gpu(torch.float64)]) == "torch"
    assert dispatch.resolve(OP) == "torch"
    machine.setitem(dispatch.MACHINE, "cuda", lambda: "no toolkit")
    assert dispatch.resolve(OP, None, [on_gpu()]) == "triton"
    machine.setitem(dispatch.MACHINE, "triton", lambda: "no triton")
    assert dispatch.resolve(OP, None, [on_gpu()]) == "torch"
    machine.setitem(dispatch.MACHINE, "cpu", lambda: "no compiler")
    assert dispatch.resolve(OP, None, [SINGLE]) == "torch"


@pytest.mark.parametrize(
    ("backend", "tensors", "message"),
    [
        ("cuda", [SINGLE], "'cuda' cannot run: it takes cuda tensors and got cpu: move them .*, or use 'torch'"),
        ("triton", [SINGLE], "'triton' cannot run: it takes cuda tensors and got cpu"),
        ("cpu", [on_gpu()], "'cpu' cannot run: it takes cpu tensors and got cuda:0"),
        ("cpu", [SINGLE, DOUBLE], "'cpu' cannot run: it has no float64: pass float32, or use 'torch'"),
    ],
)
def test_a_named_backend_that_cannot_run_says_why(machine, backend, tensors, message):
    with pytest.raises(RuntimeError, match=message):
        dispatch.resolve(OP, backend, tensors)


def test_the_interpreter_takes_cpu_tensors_but_never_by_itself(machine):
    machine.setenv("TRITON_INTERPRET", "1")
    assert dispatch.resolve(OP, "triton", [SINGLE]) == "triton"
    assert dispatch.resolve(OP, None, [SINGLE]) == "cpu"
    with pytest.raises(RuntimeError, match="bfloat16 wrongly: pass float32"):
        dispatch.resolve(OP, "triton", [HALF])
    with pytest.raises(RuntimeError, match="it takes cpu tensors and got cuda:0"):
        dispatch.resolve(OP, "triton", [on_gpu()])


def test_what_is_missing_is_named_with_its_fix(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    dispatch._extension.cache_clear()
    try:
        table = backends()[OP]
        assert table["torch"] == "ok"
        assert table["cpu"] == (
            "prime_kernels._C is not built: install a C++17 compiler (g++ or clang++) and reinstall prime-fast"
        )
        assert table["triton"] == "Triton is not installed: pip install triton==3.7.1"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert "_cuda is not built: install a CUDA toolkit (nvcc on PATH or CUDA_HOME)" in backends()[OP]["cuda"]
        with pytest.raises(RuntimeError, match="_C is not built"):
            dispatch.extension("_C")
    finally:
        dispatch._extension.cache_clear()


def test_a_cpu_without_avx2_is_not_given_the_code(monkeypatch):
    monkeypatch.setattr(dispatch.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert backends()[OP]["cpu"].startswith("this CPU has no AVX2")


def test_importing_the_library_loads_neither_triton_nor_the_extensions():
    code = (
        "import sys, prime_kernels; table = prime_kernels.backends(); "
        "assert 'triton' not in sys.modules, 'triton'; "
        "assert all(set(row) == set(prime_kernels.dispatch.BACKENDS) for row in table.values())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
