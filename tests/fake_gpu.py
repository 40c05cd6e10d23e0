"""A machine that is not here: an NVIDIA GPU without a CUDA toolkit, as `nvidia-smi` and `torch.cuda` show it to
installers. For host code alone: nothing can be computed on this GPU."""

import os
import sys
from pathlib import Path

SMI = "#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)'\n"
NO_SMI = "#!/bin/sh\necho 'No devices were found'\nexit 6\n"
TORCH = """
import importlib.abc, importlib.machinery, os, sys

class Torch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in ("torch", "torch.utils.cpp_extension"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), pretend(module))
        return spec

def pretend(module):
    if module.__name__ == "torch.utils.cpp_extension":
        module.CUDA_HOME = None
        return
    there = os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    module.version.cuda = "13.0"
    module.cuda.is_available = lambda: there
    module.cuda.device_count = lambda: int(there)
    module.cuda.get_device_capability = lambda *_: (9, 0)
    module.cuda.is_bf16_supported = lambda *_: True
    module.cuda.nccl.version = lambda: (2, 28, 9)

sys.meta_path.insert(0, Torch())
"""


def smi(folder: Path, gpus: bool) -> Path:
    """Puts an `nvidia-smi` that finds a GPU, or none, into a new folder for the front of PATH."""
    program = folder / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text(SMI if gpus else NO_SMI)
    program.chmod(0o755)
    return program.parent


def environment(folder: Path) -> dict[str, str]:
    """Of processes on that machine; `folder` gets what makes them believe it."""
    (folder / "sitecustomize.py").write_text(TORCH)
    unset = {"CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"}
    path = f"{smi(folder, gpus=True)}:{Path(sys.executable).parent}:/usr/bin:/bin"
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return kept | {"PATH": path, "PYTHONPATH": str(folder)}
