import inspect
import itertools
import re
import shutil
import sys
from pathlib import Path

import processes
import pytest
import torch

pytest.importorskip("triton", reason="pip install triton==3.7.1")

import triton
import triton.language as tl

import prime_kernels
from prime_kernels import compile_check, dispatch, launch_calls, launch_gate, linear_logprob, tune
from prime_kernels.compile_check import judged, mma_counts, parse_ptxas, short, table

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
    fit = judged("k", 80, 255, 0, 163 * 1024, "8 HMMA", True, "op")
    assert fit.problem == ""
    assert judged("k", 80, 255, 9, 0, "-", False, "op").problem == "spills: 9 bytes of stack"
    assert judged("k", 80, 255, 0, 163 * 1024 + 1, "-", False, "op").problem == "shared memory above the chip's 166912"
    assert judged("k", 90, 255, 0, 163 * 1024 + 1, "-", False, "op").problem == ""
    bad = judged("k", 90, 255, 9, 228 * 1024, "-", True, "op")
    assert bad.problem == "spills: 9 bytes of stack; shared memory above the chip's 232448; no HGMMA instructions"
    assert [line.split()[-2:] for line in table([fit, bad]).splitlines()] == [
        ["first", "call"],
        ["ok", "op"],
        ["instructions", "op"],
    ]


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
    tl.store(y + at, tl.dot(tl.load(x + at), tl.load(x + at)).to(y.dtype.element_ty))


def launched(chip, kernel, dtype, size, warps):
    """The report of one launch, and the buffer that it wrote to."""
    x, y = torch.ones(size * size, dtype=dtype), torch.ones(size * size, dtype=dtype)
    with launch_gate.gpu(chip) as (driver, _):
        for _ in range(2):
            kernel[(1,)](x, y, size=size, num_warps=warps)
    (compiled,) = driver.kernels  # once, however often it is launched
    return compile_check.measured(compiled, chip), y


@pytest.mark.parametrize("chip", [80, 90])
def test_a_launch_is_a_measurement(chip):
    report, y = launched(chip, product, torch.bfloat16, 64, 4)
    assert report.problem == "" and 0 < report.registers <= 255 and report.shared > 0
    assert {80: "HMMA", 90: "HGMMA"}[chip] in report.mma
    assert not y.any()


def test_what_a_launch_shows_to_be_unfit():
    report, _ = launched(80, hungry, torch.float64, 4096, 1)
    assert report.stack > compile_check.STACK_LIMIT and report.problem.startswith("spills")
    report, _ = launched(90, product, torch.float32, 16, 1)
    assert report.problem == "no HGMMA instructions"


@pytest.mark.parametrize("chip", [80, 90])
def test_what_calls_reach_fits_the_chip(chip, monkeypatch):
    """The whole is the command's; here every value of every argument is in some call, at one hidden size."""
    monkeypatch.setattr(compile_check, "cuda_reports", lambda chip, calls: [])  # the next test's
    reports, problems = compile_check.check(chip, (576,), strength=1)
    assert not problems and not [report for report in reports if report.problem], compile_check.table(reports)
    credit = {f"credit_{stage}" for stage in ("rows", "index", "deviations", "sums", "write")}
    kernels = {"row_kernel", "vocabulary_kernel", "sum_rows", "write_rows"} | credit
    assert {report.name for report in reports} == kernels


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA toolkit")
def test_cuda_units_are_measured_and_hold_what_is_launched():
    calls = {"advantage_kernel<float, true>": "a call", "advantage_kernel<half, true>": "another"}
    units = {unit.name.partition(":")[2]: unit for unit in compile_check.cuda_reports(90, calls)}
    assert len(units) == 6 and not any(unit.problem for unit in units.values())
    assert units["advantage_kernel<float, true>"].call == "a call" and calls.keys() - units == {
        "advantage_kernel<half, true>"
    }
    settings = [
        {"prm": dtype, "gamma": gamma, "credit": credit}
        for dtype, gamma, credit in itertools.product(
            (torch.float32, torch.bfloat16), (1.0, 0.9), launch_calls.OPS["prime_advantage"].axes["credit"]
        )
    ]
    plain = {name: values[0] for name, values in launch_calls.OPS["prime_advantage"].axes.items()}
    with launch_gate.gpu(90) as (_, extension):
        for setting in settings:
            setting = plain | setting | {"ref": setting["prm"]}
            assert launch_gate.made("prime_advantage", "cuda", setting) is None
    assert extension.kernels.keys() == units.keys()


def test_every_argument_is_varied():
    assert launch_gate.unvaried() == []


def test_what_the_gate_does_not_know_is_an_error(monkeypatch):
    def more(*arguments, whatever=0, **options):
        return linear_logprob(*arguments, **options)

    more.__signature__ = inspect.Signature(
        [
            *inspect.signature(linear_logprob).parameters.values(),
            inspect.Parameter("top_k", inspect.Parameter.KEYWORD_ONLY),
        ]
    )
    with monkeypatch.context() as patch:
        patch.setattr(prime_kernels, "linear_logprob", more)
        with pytest.raises(ValueError, match="the launch gate does not vary top_k of linear_logprob: add it"):
            launch_gate.unvaried()
    with monkeypatch.context() as patch:
        patch.setitem(dispatch.IMPLEMENTATIONS, "linear_dpo_loss", {"torch": None})
        with pytest.raises(ValueError, match="the launch gate does not know linear_dpo_loss: add it"):
            launch_gate.unvaried()


@pytest.mark.parametrize(
    ("op", "axis", "values", "missing"),
    [
        ("prime_advantage", "kind", ("rloo", "reinforce"), "prime_advantage: estimator = grpo"),
        ("prime_advantage", "prm", (torch.float32, None), "prime_advantage: prm_logprob = torch.bfloat16"),
        ("prime_advantage", "whiten", (True,), "prime_advantage: whiten = False"),
        ("prime_advantage", "credit", ("published", "pav"), "prime_advantage: credit = critic"),
        ("prime_advantage", "step", (None, torch.int64), "prime_advantage: step = torch.int32"),
        ("prime_advantage", "slope", (0.1,), "prime_advantage: slope other than {0.1}"),
        ("linear_prm_loss", "beta", (0.05,), "linear_prm_loss: beta other than {0.05}"),
        ("linear_prm_loss", "with_intercept", (False,), "linear_prm_loss: intercept = a value"),
        ("linear_prm_loss", "softcap", (None,), "linear_prm_loss: softcap = a value"),
    ],
)
def test_a_value_that_no_call_gives_is_named(monkeypatch, op, axis, values, missing):
    known = launch_calls.OPS[op]
    monkeypatch.setitem(launch_calls.OPS, op, known._replace(axes=known.axes | {axis: values}))
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", {op: dispatch.IMPLEMENTATIONS[op]})
    assert missing in launch_gate.unvaried()


def test_every_variable_of_the_environment_is_known():
    package = Path(prime_kernels.__file__).parent
    names = {
        name for file in package.glob("*.py") for name in re.findall(r'"(PRIME_KERNELS_[A-Z_]+)"', file.read_text())
    }
    axes = {name for op in launch_calls.OPS.values() for name in op.axes}
    assert names - axes == {"PRIME_KERNELS_CHECK"}  # which launches nothing


def test_any_two_values_meet():
    axes = {"a": (0, 1), "b": (0, 1, 2), "c": ("x", "y"), "d": (None, 1, 2, 3)}
    found = list(launch_calls.covering(axes, 2))
    assert found[0] == {"a": 1, "b": 2, "c": "y", "d": 3} and len(found) < 20
    for first, second in itertools.combinations(axes, 2):
        pairs = {(setting[first], setting[second]) for setting in found}
        assert pairs == set(itertools.product(axes[first], axes[second]))


def test_a_call_may_only_be_refused_what_it_asks_for(monkeypatch):
    axes = launch_calls.OPS["linear_logprob"].axes
    plain = {name: values[0] for name, values in axes.items()} | {"H": 16, "dtype": torch.float32, "rows": (3,)}
    with launch_gate.gpu(90):
        assert launch_gate.made("linear_logprob", "triton", plain | {"PRIME_KERNELS_LOGITS": "fused"}) is None
        assert "softcap is -1.0" in launch_gate.made("linear_logprob", "triton", plain | {"softcap": -1.0})
        monkeypatch.setattr(tune, "path", lambda *head: "fused")
        assert "takes bfloat16" in launch_gate.made("linear_logprob", "triton", plain)


def test_the_command():
    command = [sys.executable, "-m", "prime_kernels.compile_check", "--chip", "90"]
    refused = processes.run(command, env=processes.environment(TRITON_INTERPRET="1"))
    assert refused.returncode == 1 and "unset it" in refused.stderr
