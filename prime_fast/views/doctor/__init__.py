"""prime-fast doctor: what this machine has, lacks and should be given, one line each with its fix."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator

from prime_fast.views.doctor import devices, host, software
from prime_fast.views.doctor.check import Check, raised


def main(run_dir: str = "runs", quick: bool = False, as_json: bool = False) -> int:
    """Prints the checks; 0 unless one failed, then 1. Attacks that the sandbox held are counted, not listed."""
    checks = []
    for check in run(run_dir, quick):
        checks.append(check)
        if not as_json and not (check.name.startswith("attack: ") and check.status == "ok"):
            print(check, flush=True)
    counts = Counter(check.status for check in checks)
    if as_json:
        print(json.dumps({"ok": not counts["FAIL"], "checks": [check._asdict() for check in checks]}, indent=1))
    else:
        print(f"{counts['ok']} ok, {counts['note']} to note, {counts['FAIL']} failed")
    return 1 if counts["FAIL"] else 0


def run(run_dir: str = "runs", quick: bool = False) -> Iterator[Check]:
    """The checks one by one; what one of them raises is its failure. quick: without the attempts to escape."""
    parts: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", software.python),
        ("packages", software.packages),
        ("torch", devices.torch_build),
        ("GPU", devices.gpus),
        ("kernels", devices.kernels),
        ("DeepSpeed", software.deepspeed),
        ("vLLM", software.vllm),
        ("flash-attn", software.flash_attn),
        ("Liger", software.liger),
        ("disk", lambda: host.disk(run_dir)),
        ("/dev/shm", devices.shared_memory),
        ("NCCL", devices.nccl),
        ("sandbox", lambda: host.sandbox(quick)),
        ("math reward", lambda: host.math_reward(quick)),
    ]
    for name, part in parts:
        try:
            yield from part()
        except Exception as error:
            yield raised(name, error)
