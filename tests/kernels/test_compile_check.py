import shutil
import sys

import processes
import pytest

pytest.importorskip("triton", reason="pip install triton==3.7.1")

import triton
import triton.language as tl

from prime_kernels import compile_check
from prime_kernels.compile_check import Case, judged, mma_counts, parse_ptxas, short, table

LOG = """
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_80'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 28816 bytes smem, 736 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3badv' for 'sm_80'
ptxas info    : Function properties for _Z3badv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, 352 bytes cmem[0]
"""


def test_ptxas_output_is_read():
    assert parse_ptxas(LOG) == [("_Z4goodv", (80, 0, 28816)), ("_Z3badv", (255, 12, 0))]


def test_what_is_unfit():
    fit = judged("k", 80, 255, 0, 163 * 1024, "8 HMMA", True)
    assert fit.problem == ""
    assert judged("k", 80, 255, 8, 0, "-", False).problem == "spills: 8 bytes of stack"
    assert judged("k", 80, 255, 0, 163 * 1024 + 1, "-", False).problem == "shared memory above the chip's 166912"
    assert judged("k", 90, 255, 0, 163 * 1024 + 1, "-", False).problem == ""
    bad = judged("k", 90, 255, 8, 228 * 1024, "-", True)
    assert bad.problem == "spills: 8 bytes of stack; shared memory above the chip's 232448; no matrix instructions"
    assert [line.split()[-1] for line in table([fit, bad]).splitlines()] == ["verdict", "ok", "instructions"]


def test_matrix_instructions_are_counted_by_kind():
    assert mma_counts("HMMA.16816.F32 R4, R8\n HMMA.16816.F32\n HGMMA.64x128x16.F32\n FADD R1") == "2 HMMA 1 HGMMA"
    assert mma_counts("FADD R1, R2, R3") == "-"


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_names_are_short():
    assert short("_ZN5prime16advantage_kernelIfLb1EEEvNS_6ParamsE") == "advantage_kernel<float, true>"


@triton.jit
def hungry(x, y, size: tl.constexpr):
    """Holds `size` numbers in registers while it sums them."""
    i = tl.arange(0, size)
    kept = tl.load(x + i)
    tl.store(y + i, kept * tl.sum(kept))


@triton.jit
def product(x, y, size: tl.constexpr):
    at = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    tl.store(y + at, tl.dot(tl.load(x + at), tl.load(x + at)).to(tl.bfloat16))


def case(kernel, kind, size, warps, mma):
    return Case("case", kernel, {"x": f"*{kind}", "y": f"*{kind}"}, {"size": size}, {"num_warps": warps}, mma=mma)


@pytest.mark.parametrize("chip", [80, 90])
def test_a_triton_kernel_is_measured(chip):
    report = compile_check.compiled(case(product, "bf16", 64, 4, mma=True), chip)
    assert report.problem == "" and 0 < report.registers <= 255 and report.shared > 0
    assert ("HGMMA" if chip == 90 else "HMMA") in report.mma
    without = compile_check.compiled(case(hungry, "fp32", 128, 4, mma=True), chip)
    assert without.problem == "no matrix instructions"


def test_a_kernel_that_spills_is_unfit():
    report = compile_check.compiled(case(hungry, "fp64", 4096, 1, mma=False), 80)
    assert report.stack > 0 and report.problem.startswith("spills")


def test_every_module_ships_its_cases():
    cases = compile_check.cases()
    assert {name.split(".")[0] for name in (case.name for case in cases)} >= {"advantage"}
    for case in cases:
        assert set(case.signature) | set(case.constexprs) == set(case.kernel.arg_names), case.name
        assert not set(case.signature) & set(case.constexprs), case.name


def run(*arguments, **environment):
    command = [sys.executable, "-m", "prime_kernels.compile_check", *arguments]
    return processes.run(command, env=processes.environment(**environment))


def test_the_command():
    done = run("--only", "advantage.write_rows")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "2 kernels, 0 unfit", done.stdout + done.stderr
    assert run("--only", "no such kernel").returncode == 1
    refused = run(TRITON_INTERPRET="1")
    assert refused.returncode == 1 and "unset it" in refused.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA toolkit")
def test_cuda_units_are_measured(tmp_path):
    unit = tmp_path / "unit.cu"
    unit.write_text("__global__ void fill(float* x) { __shared__ float y[32]; y[threadIdx.x] = 1; x[0] = y[3]; }\n")
    (report,) = compile_check.unit_reports(shutil.which("nvcc"), unit, 90)
    assert report.name.startswith("unit.cu:") and report.problem == "" and report.registers > 0
