import sys
from pathlib import Path

import processes
import pytest

pytest.importorskip("triton", reason="the triton back-end needs Triton: pip install triton==3.7.1")


def test_in_the_interpreter():
    """The kernels run on the CPU, in a process of its own: Triton decides at import whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    command += [str(Path(__file__).with_name("interpreted_linear.py"))]
    done = processes.run(command, env=processes.environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1"), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_shipped_configuration_fits_the_chips():
    """For sm_80 and sm_90: no spills, shared memory within the chip's, tensor cores used."""
    from prime_kernels import compile_check, linear_logprob_triton, linear_loss_triton

    cases = [*linear_logprob_triton.compile_cases(), *linear_loss_triton.compile_cases()]
    reports = [compile_check.compiled(case, chip) for case in cases for chip in case.chips]
    assert not [report for report in reports if report.problem], compile_check.table(reports)
    gemms = [report for report in reports if report.name.startswith("vocabulary")]
    assert {("HGMMA" in report.mma, report.chip) for report in gemms} == {(False, 80), (True, 90)}
    assert all("HMMA" in report.mma for report in gemms if report.chip == 80)
