"""What the tests of prime_advantage's back-ends share: the back-ends here, batches, buffers with margins, two ranks.

"cuda" is the CUDA kernel itself, compiled for the host by tests/kernels/simt. "triton" needs Triton's interpreter,
chosen when Triton is imported: one test of each file runs that file again in a process that has it. On a GPU another
runs it with PRIME_KERNELS_TEST_DEVICE=cuda: both kernels themselves, on copies of the arguments that lie there.
"""

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from on_device import on_device

import prime_kernels
from prime_kernels import advantage, advantage_cuda, dispatch
from prime_kernels.launch_calls import alone

HERE = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = os.environ.get("PRIME_KERNELS_TEST_DEVICE", "")  # cuda; or cpu, which rehearses that
BACKENDS = ["triton"] if INTERPRETING else {"cuda": ["cuda", "triton"], "cpu": ["cpu"]}.get(DEVICE, ["cpu", "cuda"])
EXAMPLES = 8 if INTERPRETING or DEVICE == "cuda" else 24
prime_advantage = on_device(prime_kernels.prime_advantage, DEVICE) if DEVICE else prime_kernels.prime_advantage


class Emulator:
    """csrc/advantage_kernel.h and credit_kernel.h run by fibers, in the place of prime_kernels._cuda."""

    def __init__(self, library: Path):
        self.library, self.blocks, self.seed, self.launches = ctypes.CDLL(str(library)), 2, 0, 0

    def advantage(self, pointers, tokens, rows, phase, estimator, process, normalize, whiten, *rest):
        *scalars, bfloat16, _ = rest
        self.launches += 1
        self.library.advantage(
            (ctypes.c_uint64 * 14)(*pointers), ctypes.c_longlong(tokens), rows, phase, estimator, process, normalize,
            whiten, *map(ctypes.c_double, scalars), bfloat16, self.blocks, self.seed,
        )  # fmt: skip

    def credit(self, pointers, tokens, rows, first, last, form, process, whiten, numbers, bfloat16, _):
        self.launches += 1
        self.library.credit(
            (ctypes.c_uint64 * 16)(*pointers), ctypes.c_longlong(tokens), rows, first, last, form, process, whiten,
            (ctypes.c_double * 9)(*numbers), bfloat16, self.blocks, self.seed,
        )  # fmt: skip


def compiled(folder: Path) -> Path:
    """The library in this folder, made by the first process that needs it."""
    library = folder / "simt.so"
    with open(folder / "simt.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            include = [f"-I{HERE / 'simt'}", f"-I{HERE.parents[1] / 'csrc'}"]
            flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-o", str(library)]
            subprocess.run(["g++", *flags, *include, str(HERE / "simt/advantage.cpp")], check=True)
    return library


@pytest.fixture(scope="module", autouse=True)
def emulator(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE:
            yield None
            return
        if INTERPRETING:
            import interpreter

            from prime_kernels import advantage_triton

            interpreter.patch_once()
            patch.setattr(advantage_triton, "BLOCK", 16)
            patch.setattr(advantage_triton, "ROWS", 4)
            yield None
            return
        if shutil.which("g++") is None:
            pytest.skip("g++ compiles the CUDA kernel for these tests")
        folder = tmp_path_factory.getbasetemp()
        shared = folder.parent if hasattr(request.config, "workerinput") else folder  # by all workers of pytest-xdist
        emulator = Emulator(compiled(shared))
        patch.setattr(advantage_cuda, "extension", lambda name: emulator)
        cuda = {"cuda": advantage_cuda.advantage}
        patch.setattr(advantage, "resolve", lambda op, name, x: cuda.get(name) or dispatch.resolve(op, name, x))
        yield emulator


def single(batch):
    return [x.float() if x.is_floating_point() else x for x in batch]


def double(batch):
    return [x.double() if x.is_floating_point() else x for x in batch]


def check(batch, backend, *, rtol=3e-6, **kwargs):
    """Against float64 on the same inputs, relative to the largest value."""
    got, want = prime_advantage(*batch, backend=backend, **kwargs), prime_advantage(*double(batch), **kwargs)
    for name in got._fields:
        a, b = getattr(got, name), getattr(want, name)
        assert a.dtype == torch.float32 and not a.requires_grad
        torch.testing.assert_close(a.double(), b, rtol=0, atol=rtol * max(1e-3, b.abs().max().item()), msg=name)
    return got


def ragged(lengths, group, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    prm, ref = -3 * torch.rand(2, int(lengths.sum()), generator=generator)
    outcome = torch.randint(0, 3, lengths.shape, generator=generator) / 2
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return [prm.to(dtype), ref.to(dtype), outcome, cu_seqlens, torch.tensor(group)]


# kBlock is 512 on the CPU, kTile 1024 on CUDA, BLOCK 16 here in Triton
LONG = [37, 16, 17, 1, 48, 49] if INTERPRETING else [2500, 1, 1024, 512, 1025, 513]
LONG_GROUP = [5, -9, 5, -9, 5, -9]


BAD_OFFSETS = {  # of 10 tokens
    "short": [0, 2, 5, 6, 9],
    "long": [0, 2, 5, 6, 11],
    "descending": [0, 5, 2, 6, 10],
    "from 1 on": [1, 2, 5, 6, 10],
    "empty row": [0, 2, 2, 6, 10],
    "negative": [0, -3, 5, 6, 10],
    "all negative": [-9, -7, -5, -3, -1],
    "negative end": [0, 2, 5, 6, -1],
    "nothing": [0, 0, 0, 0, 0],
    "beyond int32": [0, 2**32 + 2, 5, 6, 10],
    "differences beyond int32": [0, 2**31 - 1, -5, 6, 10],
}


@pytest.fixture
def group_of_one():
    with alone() as group:
        yield group


@pytest.fixture
def margins(monkeypatch):
    """What torch.empty gives stands between two margins; -> a function that says whether they are untouched."""
    empty, buffers = torch.empty, []

    def guarded(*size, **options):
        size = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        buffer = torch.full((size.numel() + 128,), 7.0, **options)
        buffers.append(buffer)
        return buffer[64:-64].view(size)

    monkeypatch.setattr(torch, "empty", guarded)
    yield lambda: all((x[:64] == 7).all() and (x[-64:] == 7).all() for x in buffers)
    monkeypatch.setattr(torch, "empty", empty)


def run_again(file, least, **environment):
    """This file in a process of its own: at least so many tests."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-q",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        file,
    ]
    done = processes.run(command, env=processes.environment(**environment), timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least, done.stdout[-500:]
