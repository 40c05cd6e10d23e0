"""The compiled extensions; everything else is in pyproject.toml.

prime_kernels._C (C++17; OpenMP and AVX2 where the compiler has them) is built where there is a C++ compiler, and
prime_kernels._cuda (sm_80, sm_90a) where there is a CUDA toolkit. Both take data pointers, sizes and a stream, so they
do not depend on the torch version. One that cannot be built is left out, and prime_kernels.backends() says what to do.
PRIME_KERNELS_CUDA=0 leaves _cuda out; =1 makes its absence an error.

csrc/*.cu and csrc/*_cuda.cpp make up _cuda, the other csrc/*.cpp make up _C.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError

OPTIONAL_FLAGS = (["-fopenmp"], ["-mavx2", "-mfma"])
CUDA_FLAGS = (
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",  # the PTX serves chips newer than both
    "-gencode=arch=compute_90a,code=sm_90a",
)


def nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [Path(home, "bin/nvcc") for home in homes if home] + [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((str(place) for place in places if place and Path(place).exists()), None)


class Build(build_ext):
    def build_extension(self, extension: Extension) -> None:
        try:
            import pybind11

            extension.include_dirs += [pybind11.get_include()]
            if extension.name.endswith("_cuda"):
                self._build_cuda(extension)
            else:
                extension.extra_compile_args = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
                for flags in filter(self._accepts, OPTIONAL_FLAGS):
                    extension.extra_compile_args += flags
                    extension.extra_link_args += flags
                super().build_extension(extension)
        except (BaseError, CompileError, ImportError, OSError, subprocess.CalledProcessError) as error:
            for stale in Path("kernels/prime_kernels").glob(extension.name.rpartition(".")[2] + ".*"):
                stale.unlink()  # an editable install would go on with the old code
            raise CompileError(f"{extension.name}: {error}") from error  # what setuptools forgives an optional one

    def _accepts(self, flags: list[str]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "try.cpp")
            source.write_text("int main() { return 0; }\n")
            command = [*self.compiler.compiler_so, *flags, str(source), "-c", "-o", f"{folder}/try.o"]
            return subprocess.run(command, capture_output=True).returncode == 0

    def _build_cuda(self, extension: Extension) -> None:
        """The static runtime opens the driver at its first use, so a machine without one can import the module."""
        target = Path(self.get_ext_fullpath(extension.name))
        files = [Path(path) for path in (*extension.sources, *extension.depends)]
        if not self.force and target.exists() and target.stat().st_mtime > max(f.stat().st_mtime for f in files):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        include = [f"-I{folder}" for folder in (*extension.include_dirs, *self.include_dirs)]
        options = ["-std=c++17", "-O3", "-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        command = [nvcc(), *options, *CUDA_FLAGS, *include, *extension.sources, "-o", str(target)]
        print(*command, flush=True)
        subprocess.run(command, check=True)


def extensions() -> list[Extension]:
    wanted = os.environ.get("PRIME_KERNELS_CUDA", "auto")
    if wanted == "1" and not nvcc():
        raise SystemExit("PRIME_KERNELS_CUDA=1, but there is no nvcc: set CUDA_HOME to a CUDA toolkit")
    sources, headers = (sorted(str(path) for path in Path("csrc").glob(ending)) for ending in ("*.c*", "*.h"))
    cuda = [source for source in sources if source.endswith((".cu", "_cuda.cpp"))]
    cpu = [source for source in sources if source not in cuda]
    modules = [Extension("prime_kernels._C", cpu, depends=headers, optional=True)]
    if wanted != "0" and nvcc():
        modules.append(Extension("prime_kernels._cuda", cuda, depends=headers, optional=wanted != "1"))
    return modules


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
