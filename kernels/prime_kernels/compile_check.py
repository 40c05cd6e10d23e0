"""Ahead-of-time compilation of every shipped kernel for sm_80 and sm_90, without a GPU.

    python -m prime_kernels.compile_check [--only TEXT]

prints registers, stack, shared memory and matrix instructions of each kernel, and exits with 1 if one spills, needs
more shared memory than the chip has, or lacks the matrix instructions it should have.

Triton: every module prime_kernels.*_triton has a function `compile_cases() -> list[Case]` with every configuration
that it ships. CUDA C++: every csrc/*.cu, by nvcc -Xptxas -v, where there is a toolkit and the sources are at hand.
"""

import argparse
import importlib
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import prime_kernels

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have
NVCC_TARGET = {80: "arch=compute_80,code=sm_80", 90: "arch=compute_90a,code=sm_90a"}


class Case(NamedTuple):
    """One Triton kernel in one configuration."""

    name: str  # what the table calls it, unique
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # the arguments that are no constexpr: "*fp32", "*bf16", "i32", "fp32", ...
    constexprs: dict[str, Any]
    options: dict[str, Any]  # num_warps, num_stages, ...
    chips: tuple[int, ...] = (80, 90)
    divisible: tuple[str, ...] = ()  # integers divisible by 16; pointers always are
    mma: bool = False  # must contain matrix instructions


class Report(NamedTuple):
    name: str
    chip: int
    registers: int
    stack: int  # bytes, with spills; 0 in a kernel that is fit to ship
    shared: int  # bytes
    mma: str  # matrix instructions by kind
    problem: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="prime_kernels.compile_check", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels, or .cu files, with TEXT in their name")
    only = parser.parse_args().only
    reports = [*triton_reports(only), *cuda_reports(only)]
    print(table(reports))
    bad = [report for report in reports if report.problem]
    print(f"{len(reports)} kernels, {len(bad)} unfit" if reports else "nothing to check")
    return 1 if bad or not reports else 0


def cases() -> list[Case]:
    """What the modules *_triton ship. Triton must be installed and not interpreting."""
    names = [module.name for module in pkgutil.iter_modules(prime_kernels.__path__) if module.name.endswith("_triton")]
    found = [case for name in names for case in importlib.import_module(f"prime_kernels.{name}").compile_cases()]
    assert len({case.name for case in found}) == len(found), "two cases share a name"
    return found


def triton_reports(only: str = "") -> list[Report]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 does not compile: unset it")
    return [compiled(case, chip) for case in cases() if only in case.name for chip in case.chips]


def compiled(case: Case, chip: int) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget

    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    divisible = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in case.divisible]
    source = triton.compiler.ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=case.constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=case.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run(cuobjdump(), "--dump-resource-usage", cubin)
        code = _run(cuobjdump(), "-sass", cubin)
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
    return judged(case.name, chip, registers, stack, kernel.metadata.shared, mma_counts(code), case.mma)


def cuda_reports(only: str = "") -> list[Report]:
    folder = Path(prime_kernels.__file__).resolve().parents[2] / "csrc"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not folder.is_dir() or not Path(nvcc).exists():
        missing = "no nvcc" if folder.is_dir() else "no csrc folder: not a source checkout"
        print(f"CUDA C++ units not checked: {missing}", file=sys.stderr)
        return []
    return [
        report
        for unit in sorted(folder.glob("*.cu"))
        if only in unit.name
        for chip in NVCC_TARGET
        for report in unit_reports(nvcc, unit, chip)
    ]


def unit_reports(nvcc: str, unit: Path, chip: int) -> list[Report]:
    """The kernels of a .cu file."""
    with tempfile.TemporaryDirectory() as folder:
        target = f"-gencode={NVCC_TARGET[chip]}"
        object_file = Path(folder, "unit.o")
        log = _run(nvcc, "-std=c++17", "-O3", target, "-Xptxas=-v", "-c", unit, "-o", object_file, stderr=True)
        code = _run(cuobjdump(), "-sass", object_file)
    functions = re.findall(r"Function : (\S+)(.*?)(?=Function :|\Z)", code, re.S)
    counts = {name: mma_counts(text) for name, text in functions}
    return [judged(f"{unit.name}:{short(name)}", chip, *usage, counts[name], False) for name, usage in parse_ptxas(log)]


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


def judged(name: str, chip: int, registers: int, stack: int, shared: int, mma: str, needs_mma: bool) -> Report:
    problems = [f"spills: {stack} bytes of stack"] if stack else []
    if shared > SHARED_LIMIT[chip]:
        problems.append(f"shared memory above the chip's {SHARED_LIMIT[chip]}")
    if needs_mma and mma == "-":
        problems.append("no matrix instructions")
    return Report(name, chip, registers, stack, shared, mma, "; ".join(problems))


def table(reports: list[Report]) -> str:
    head = ("kernel", "chip", "registers", "stack", "shared", "matrix", "verdict")
    rows = [head] + [
        (r.name, f"sm_{r.chip}", str(r.registers), str(r.stack), str(r.shared), r.mma, r.problem or "ok")
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
