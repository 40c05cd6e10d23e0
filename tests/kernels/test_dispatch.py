import contextlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prime_kernels
from prime_kernels import backends, dispatch, launch_calls

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
        installed = f"beside torch {torch.__version__}"
        assert table["triton"].startswith("Triton is not installed: pip install triton")
        assert table["triton"].endswith(installed)
        for version, release in (
            ("2.11.0+cu130", "==3.6.0, "),
            ("2.13.0+cpu", "==3.7.1, "),
            ("2.99.0", ", in the rel"),
        ):
            monkeypatch.setattr(torch, "__version__", version)
            assert f"pip install triton{release}" in backends()[OP]["triton"]
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


def test_every_operator_runs_on_the_device_of_its_tensors(monkeypatch):
    """The guard stands around each of them, backward too; that it moves the current device is torch's own."""
    inside, runs = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    def resolve(op, backend, tensors, real=dispatch.resolve):
        given = next(x for x in tensors if x is not None)
        assert inside and inside[-1].data_ptr() == given.data_ptr(), op
        runs.append(op)
        return real(op, backend, tensors)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in ("advantage", "linear_logprob", "linear_loss"):
        monkeypatch.setattr(importlib.import_module(f"prime_kernels.{module}"), "resolve", resolve)
    names = [name for name in launch_calls.OPS if name != "prime_advantage"]
    for op in names:
        *_, setting = (s for s in launch_calls.settings(op, (16,), 1) if len(s["grads"]) == 3 and s["rows"])
        result = getattr(prime_kernels, op)(**launch_calls.arguments(op, setting), backend="torch")
        result = result if isinstance(result, torch.Tensor) else result[0]
        result.sum().backward()
    ones = torch.ones(2)
    prime_kernels.prime_advantage(ones, ones, ones, torch.arange(3), torch.zeros(2).long())
    assert runs == ["linear_logprob", "linear_logprob", "linear_policy_loss", "linear_prm_loss", "prime_advantage"]


def test_every_operator_is_made_in_the_one_place():
    package = Path(dispatch.__file__).parent
    makers = [file.name for file in package.glob("*.py") if "torch.library.custom_op" in file.read_text()]
    assert makers == ["dispatch.py"]
