"""What every result says about where it was measured."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SMI = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1] if found else platform.machine()


def installed(package: str) -> str | None:
    """Its version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpu_facts() -> dict:
    """The current GPU as torch sees it, and nvidia-smi's line on it where there is one."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts = {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
    facts |= {"memory_gib": properties.total_memory / 2**30, "multiprocessors": properties.multi_processor_count}
    return facts | {"cuda": torch.version.cuda, "nvidia_smi": nvidia_smi()}


def nvidia_smi() -> dict[str, str] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return dict(zip(SMI, map(str.strip, lines[0].split(",")), strict=False)) if lines else None


def results(device: str) -> Path:
    """The folder of this machine's results: named after its GPU, or cpu."""
    import torch

    return RESULTS / (slug(torch.cuda.get_device_name()) if device == "cuda" else "cpu")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
