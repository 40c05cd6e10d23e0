"""Disk, and the sandbox for model-written code."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from prime_fast.views.doctor.check import GIB, Check

FEW_BYTES, MANY_BYTES = GIB, 50 * GIB  # on a disk; with less than these a failure, a note


def disk(run_dir: str) -> Iterator[Check]:
    for name, folder in (("run_dir", Path(run_dir)), ("temporary files", Path(tempfile.gettempdir()))):
        there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        found = f"{free / GIB:.1f} GiB free at {there.absolute()}"
        if not os.access(there, os.W_OK):
            yield Check(f"disk, {name}", "FAIL", f"{there.absolute()} cannot be written", "choose another folder")
        elif free < FEW_BYTES or (free < MANY_BYTES and name == "run_dir"):
            fix = "free some, or choose another folder; `prime-fast train CONFIG --dry-run` says what a run needs"
            yield Check(f"disk, {name}", "FAIL" if free < FEW_BYTES else "note", found, fix)
        else:
            yield Check(f"disk, {name}", "ok", found)


def sandbox(quick: bool = False) -> Iterator[Check]:
    from prime_fast.rewards import RewardPool, cgroup, escapes
    from prime_fast.rewards.sandbox import MEMORY_BYTES

    try:
        RewardPool("code", workers=1).close()
    except (ValueError, RuntimeError, OSError) as error:
        yield Check("sandbox", "FAIL", str(error))
        return
    try:
        folder = cgroup.parent()
        held = f"memory and processes of each program are held by a cgroup of its own in {folder}"
    except cgroup.NoCgroup as error:
        held = f"memory and processes are held by each process's limits alone: {error}"
    yield Check("sandbox, cgroup", "ok", held)
    limits = f"{MEMORY_BYTES >> 20} MiB, one process, no network for each program"
    if quick:
        yield Check("sandbox", "ok", f"starts: {limits}; escapes were not tried")
        return
    yield Check("sandbox", "ok", f"starts: {limits}")
    start, problems = time.monotonic(), {}
    for name, problem in escapes.attempts():
        problems[name] = problem
        check = f"attack: {name}" if name in escapes.ATTACKS else name
        yield Check(check, "FAIL" if problem else "ok", problem or "as it should be")
    held = sum(problems[name] is None for name in escapes.ATTACKS)
    found = f"{held} of {len(escapes.ATTACKS)} held in {time.monotonic() - start:.0f} s"
    yield Check("attacks", "ok" if held == len(escapes.ATTACKS) else "FAIL", found)


def math_reward(quick: bool = False) -> Iterator[Check]:
    from prime_fast.rewards import RewardPool, math_attacks

    if quick:
        return
    with RewardPool("math", workers=1) as pool:
        problems = dict(math_attacks.attempts(pool))
    for name, problem in problems.items():
        yield Check(f"attack: {name}", "FAIL" if problem else "ok", problem or "as it should be")
    held = sum(problem is None for problem in problems.values())
    found = f"{held} of {len(problems)} attacks refused"
    yield Check("math reward", "ok" if held == len(problems) else "FAIL", found)
