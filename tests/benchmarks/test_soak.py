import mmap
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.soak import Sampler, series, trend


def walk(seed: int, size: int = 80) -> np.ndarray:
    """Noise whose neighbours resemble one another, of deviation 1."""
    noise = np.random.default_rng(seed).normal(size=size)
    for i in range(1, size):
        noise[i] = 0.6 * noise[i - 1] + 0.8 * noise[i]
    return noise


def test_what_grows_is_told_from_what_is_flat():
    steps = np.arange(400, 2000, 20.0)
    flat = [trend(steps, 500 + walk(seed))["flat"] for seed in range(20)]
    grown = [trend(steps, 500 + walk(seed) + 12 * steps / 2000) for seed in range(20)]
    assert sum(flat) >= 18 and not any(found["flat"] for found in grown)
    assert np.mean([found["growth"] for found in grown]) == pytest.approx(12 / 506, rel=0.2)
    assert trend(steps, 500 + 2 * steps / 2000)["flat"] and not trend(steps, 5 + steps // 500)["flat"]
    assert trend(steps, np.full(80, 7.0)) | {"low": 0.0, "high": 0.0, "flat": True} == trend(steps, np.full(80, 7.0))


def test_the_sampler_sees_what_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sampler = Sampler()
    before = sampler()
    held = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # not what the allocator has kept
    held[:: mmap.PAGESIZE] = bytes(len(held) // mmap.PAGESIZE)
    with (
        open(tmp_path / "file", "w"),
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child,
    ):
        after = sampler()
        child.communicate(b"\n")
    assert after["memory of the trainer"] - before["memory of the trainer"] == pytest.approx(len(held) / 2**20, abs=2)
    assert after["processes"] == before["processes"] + 1 and after["threads"] >= before["threads"] + 1
    assert after["file descriptors"] >= before["file descriptors"] + 2
    assert (before["temporary files"], after["temporary files"]) == (0, 1)


def test_seconds_are_of_the_steps_between():
    samples = [{"step": 20 * i, "clock": 40.0 * i, "cpu": 10.0 * i, "memory": 5.0} for i in range(1, 11)]
    found = series(samples)
    steps, seconds = found["seconds a step"]
    assert steps.tolist() == [60, 80, 100, 120, 140, 160, 180, 200] and set(seconds) == {2.0}
    assert set(found["CPU seconds a step"][1]) == {0.5} and found.keys() >= {"memory"} and "step" not in found
