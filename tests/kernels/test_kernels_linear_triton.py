import sys
from pathlib import Path

import processes
import pytest
import torch

from prime_kernels import tune

pytest.importorskip("triton", reason="the triton back-end needs Triton: pip install triton==3.7.1")


def test_in_the_interpreter():
    """The kernels run on the CPU, in a process of its own: Triton decides at import whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    command += [str(Path(__file__).with_name("interpreted_linear.py"))]
    done = processes.run(command, env=processes.environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1"), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("chip", "hidden", "vocabulary", "operand", "path"),
    [
        (90, 576, 49152, BFLOAT16, "fused"),
        (90, 2048, 151936, BFLOAT16, "fused"),
        (90, 3584, 152064, BFLOAT16, "gemm"),
        (90, 64, 49152, BFLOAT16, "gemm"),
        (90, 577, 49152, BFLOAT16, "gemm"),
        (90, 768, 50257, BFLOAT16, "gemm"),
        (90, 576, 49152, FLOAT32, "gemm"),
        (80, 1536, 151936, BFLOAT16, "gemm"),
    ],
)
def test_where_logits_come_from(monkeypatch, chip, hidden, vocabulary, operand, path):
    monkeypatch.delenv("PRIME_KERNELS_LOGITS", raising=False)
    assert tune.path(chip, hidden, vocabulary, operand) == path
    for chosen in tune.PATHS:
        monkeypatch.setenv("PRIME_KERNELS_LOGITS", chosen)
        assert tune.path(chip, hidden, vocabulary, operand) == chosen
    monkeypatch.setenv("PRIME_KERNELS_LOGITS", "cutlass")
    with pytest.raises(ValueError, match="PRIME_KERNELS_LOGITS is 'cutlass', needs one of fused, gemm"):
        tune.path(chip, hidden, vocabulary, operand)


@pytest.mark.parametrize(
    ("hidden", "vocabulary", "operand"),
    [(576, 48, FLOAT32), (64, 48, BFLOAT16), (577, 48, BFLOAT16), (576, 37, BFLOAT16)],
)
def test_a_head_that_the_vocabulary_kernel_does_not_fit_is_refused(hidden, vocabulary, operand):
    with pytest.raises(ValueError, match=f"'fused', which takes .* not {operand}, {hidden} and {vocabulary}: unset it"):
        tune.tile(90, hidden, vocabulary, operand, plain=True)


def test_another_chip_takes_what_fits_ampere(monkeypatch):
    for capability, chip in (((8, 6), 80), ((9, 0), 90), ((10, 0), 80), ((12, 0), 80)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert tune.chip(torch.device("cuda", 0)) == chip
