"""Ahead-of-time compilation for sm_80 and sm_90 of every kernel that a call can reach, without a GPU.

    python -m prime_kernels.compile_check [--chip 80|90] [--head H ...] [--quick]

prints registers, stack, shared memory and matrix instructions of each kernel, with the first call that needs it, and
exits with 1 if one spills, needs more shared memory than the chip has or memory that nobody gives it, or multiplies
matrices without the chip's matrix instructions; if a call fails, or is refused by default; if the gate does not vary
an op or an argument; or if the CUDA extension would launch a kernel that is not compiled.

Triton: launch_gate.py. CUDA C++: every csrc/*.cu, by nvcc -Xptxas -v, where there are a toolkit and the sources.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import prime_kernels
from prime_kernels import launch_calls, launch_gate

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have
STACK_LIMIT = 8  # bytes: a register or two that ptxas sets aside between loops to let one more block run at a time
MATRIX = {80: "HMMA", 90: "HGMMA"}  # what multiplies bfloat16 matrices at full speed
NVCC_TARGET = {80: "arch=compute_80,code=sm_80", 90: "arch=compute_90a,code=sm_90a"}


class Report(NamedTuple):
    name: str
    chip: int
    registers: int
    stack: int  # bytes, with spills
    shared: int  # bytes
    mma: str  # matrix instructions by kind
    call: str  # the first that needs it
    problem: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="prime_kernels.compile_check", description=__doc__.split("\n")[0])
    parser.add_argument("--chip", type=int, choices=SHARED_LIMIT, help="one of them alone")
    parser.add_argument("--head", type=int, nargs="+", default=launch_calls.HEADS, metavar="H", help="hidden sizes")
    parser.add_argument("--quick", action="store_true", help="each value in some call, not any two")
    chosen = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 does not compile: unset it")
    reports, problems = [], launch_gate.unvaried()
    for chip in [chosen.chip] if chosen.chip else SHARED_LIMIT:
        found, failed = check(chip, tuple(chosen.head), 1 if chosen.quick else 2)
        reports += found
        problems += failed
    print(table(reports))
    print(*problems, sep="\n", end="\n" if problems else "")
    bad = [report for report in reports if report.problem]
    print(f"{len(reports)} kernels, {len(bad)} unfit, {len(problems)} problems with calls")
    return 1 if bad or problems else 0


def check(chip: int, heads: tuple[int, ...], strength: int) -> tuple[list[Report], list[str]]:
    """Every kernel for this chip, and what is wrong with calls."""
    driver, extension, problems = launch_gate.run(chip, heads, strength)
    reports = [measured(kernel, chip) for kernel in driver.kernels]
    if units := cuda_reports(chip, extension.kernels):
        reports += units
        compiled = {unit.name.rpartition(":")[2] for unit in units}
        problems += [
            f"{call}: launches {name}, which is in no csrc/*.cu"
            for name, call in extension.kernels.items()
            if name not in compiled
        ]
    return reports, problems


def measured(kernel: launch_gate.Kernel, chip: int) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.binary)
        usage = _run(cuobjdump(), "--dump-resource-usage", cubin)
        code = _run(cuobjdump(), "-sass", cubin) if kernel.matrix else ""
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
    report = judged(kernel.name, chip, registers, stack, kernel.shared, mma_counts(code), kernel.matrix, kernel.call)
    if kernel.scratch:
        unfit = f"wants {kernel.scratch} bytes of global memory a program"
        report = report._replace(problem="; ".join(filter(None, [report.problem, unfit])))
    return report


def cuda_reports(chip: int, calls: dict[str, str]) -> list[Report]:
    """Of every csrc/*.cu. calls: kernel -> the call that needs it."""
    folder = Path(prime_kernels.__file__).resolve().parents[2] / "csrc"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not folder.is_dir() or not Path(nvcc).exists():
        missing = "no nvcc" if folder.is_dir() else "no csrc folder: not a source checkout"
        print(f"CUDA C++ units not checked: {missing}", file=sys.stderr)
        return []
    units = [report for unit in sorted(folder.glob("*.cu")) for report in unit_reports(nvcc, unit, chip)]
    return [unit._replace(call=calls.get(unit.name.rpartition(":")[2], "")) for unit in units]


def unit_reports(nvcc: str, unit: Path, chip: int) -> list[Report]:
    """The kernels of a .cu file."""
    with tempfile.TemporaryDirectory() as folder:
        target = f"-gencode={NVCC_TARGET[chip]}"
        object_file = Path(folder, "unit.o")
        log = _run(nvcc, "-std=c++17", "-O3", target, "-Xptxas=-v", "-c", unit, "-o", object_file, stderr=True)
    return [judged(f"{unit.name}:{short(name)}", chip, *usage, "-", False, "") for name, usage in parse_ptxas(log)]


def short(name: str) -> str:
    """A C++ name without its namespace and arguments, where c++filt is at hand."""
    filt = shutil.which("c++filt")
    return re.sub(r"^void |\w+::|\(.*$", "", _run(filt, name).strip()) if filt else name


def cuobjdump() -> str:
    """Triton's own, or that of a toolkit."""
    places = [Path(root) / "backends/nvidia/bin/cuobjdump" for root in _folders("triton")]
    found = [str(place) for place in (*places, Path("/usr/local/cuda/bin/cuobjdump")) if place.exists()]
    if not found and not shutil.which("cuobjdump"):
        raise SystemExit("no cuobjdump: pip install triton, or put the CUDA toolkit on PATH")
    return next(iter(found), "cuobjdump")


def parse_ptxas(log: str) -> list[tuple[str, tuple[int, int, int]]]:
    """(kernel, (registers, bytes of stack and spills, bytes of static shared memory)) from ptxas -v."""
    found = []
    for block in log.split("Compiling entry function '")[1:]:
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.*?(\d+) bytes.*?(\d+) bytes", block).groups())
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        shared = re.search(r"(\d+) bytes smem", block)
        found.append((block.split("'")[0], (registers, max(stack, stores, loads), int(shared[1]) if shared else 0)))
    return found


def mma_counts(code: str) -> str:
    counts = {kind: len(re.findall(rf"\b{kind}\b", code)) for kind in ("HMMA", "HGMMA", "IMMA", "QGMMA", "DMMA")}
    return " ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "-"


def judged(
    name: str, chip: int, registers: int, stack: int, shared: int, mma: str, needs_mma: bool, call: str
) -> Report:
    problems = [f"spills: {stack} bytes of stack"] if stack > STACK_LIMIT else []
    if shared > SHARED_LIMIT[chip]:
        problems.append(f"shared memory above the chip's {SHARED_LIMIT[chip]}")
    if needs_mma and MATRIX[chip] not in mma.split():
        problems.append(f"no {MATRIX[chip]} instructions")
    return Report(name, chip, registers, stack, shared, mma, call, "; ".join(problems))


def table(reports: list[Report]) -> str:
    head = ("kernel", "chip", "registers", "stack", "shared", "matrix", "verdict", "first call")
    rows = [head] + [
        (r.name, f"sm_{r.chip}", str(r.registers), str(r.stack), str(r.shared), r.mma, r.problem or "ok", r.call)
        for r in reports
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _folders(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    return list(spec.submodule_search_locations) if spec else []


def _run(*command, stderr: bool = False) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return done.stderr + done.stdout if stderr else done.stdout


if __name__ == "__main__":
    sys.exit(main())
