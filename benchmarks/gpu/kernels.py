"""Stage 2: every kernel test on this chip, several at a time; then compute-sanitizer on a small set of them."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.facts import program
from benchmarks.gpu.job import ROOT, Item, Job, Skipped
from benchmarks.gpu.recorder import OPTIONS

TESTS = ("tests/kernels/test_kernels_cuda.py", "tests/kernels/test_kernels_advantage_backends.py")
WORKERS, WORKER_GIB = 8, 22  # at most, and the GPU memory that the largest test may take: float64 of a 7B head
MARGIN = 5.0  # seconds before the limit at which the workers are ended
CHECKS = {("memcheck", "advantage"): 30, ("memcheck", "linear"): 60, ("racecheck", "advantage"): 30}  # seconds
FOUND = 86  # exit code of a sanitizer that found something


def run(job: Job) -> None:
    run_tests(job, TESTS)
    if job.device == "cuda":
        job.do(checks())


class Worker:
    """A process that runs tests one after the other; each line it says is put on `told`, then None."""

    def __init__(self, job: Job, files: tuple[str, ...], tests: list[str], told: queue.Queue) -> None:
        self.tests, self.current, self.done = tests, None, set()
        command = [sys.executable, "-m", "benchmarks.gpu.recorder", *files]
        environment = os.environ | {"PRIME_KERNELS_TEST_DEVICE": job.device, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        threading.Thread(target=self._listen, args=(told,), daemon=True).start()

    def _listen(self, told: queue.Queue) -> None:
        with self.process.stdin as ids:
            ids.write(json.dumps(self.tests) + "\n")
        for line in self.process.stdout:
            told.put((self, json.loads(line)))
        self.process.wait()
        told.put((self, None))


def run_tests(job: Job, files: tuple[str, ...]) -> None:
    """Each test is an item. A worker that dies takes its test with it, and another does the rest."""
    told: queue.Queue = queue.Queue()
    collector = Worker(job, files, [], told)
    found: list[str] = []
    while (line := told.get()[1]) is not None:
        found += line.get("ids", [])
        if "result" in line:
            job.put(line["test"], line["result"])
    if not found:
        raise RuntimeError(f"pytest found no test in {', '.join(files)} (exit code {collector.process.returncode})")
    if job.small:  # one case of each test
        found = list({test.partition("[")[0]: test for test in reversed(found)}.values())[::-1]
    wanted = job.plan(found)
    count = min(workers(job), len(wanted))
    working = {Worker(job, files, wanted[i::count], told) for i in range(count)}
    while working and (left := job.left - MARGIN) > 0:
        try:
            worker, line = told.get(timeout=left)
        except queue.Empty:
            break
        if line is not None:
            note(job, worker, line)
            continue
        working.remove(worker)
        if rest := ended(job, worker):
            working.add(Worker(job, files, rest, told))
    for worker in working:
        worker.process.kill()
    job.record["running"] = []
    outcomes = [job.record["items"].get(name, {}).get("outcome") for name in found]
    print(f"  {outcomes.count('passed')} of {len(found)} tests passed, {outcomes.count('skipped')} skipped", flush=True)


def note(job: Job, worker: Worker, line: dict) -> None:
    test = line["test"]
    if "result" in line:
        worker.current = None
        worker.done.add(test)
        job.put(test, line["result"])
    else:
        worker.current = test
        job.start(test)


def ended(job: Job, worker: Worker) -> list[str]:
    """What a worker that is gone has left to do."""
    if worker.current:
        how = f"{worker.current} lost its process (exit code {worker.process.returncode})"
        note(job, worker, {"test": worker.current, "result": {"error": how}})
    rest = [test for test in worker.tests if test not in worker.done]
    if len(rest) == len(worker.tests):
        raise RuntimeError(f"a worker ended without a test (exit code {worker.process.returncode})")
    return rest


def workers(job: Job) -> int:
    if job.device == "cpu":
        return 1
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return max(1, min(WORKERS, os.cpu_count() // 2, int(memory / WORKER_GIB)))


def checks() -> Iterator[Item]:
    for (tool, ops), seconds in CHECKS.items():
        yield Item(f"compute-sanitizer {tool} {ops}", seconds, partial(check, tool, ops))


def check(tool: str, ops: str) -> dict:
    """One process under the sanitizer, without torch's cache, which would hide what is out of bounds."""
    sanitizer = program("compute-sanitizer")
    if sanitizer is None:
        raise Skipped("there is no compute-sanitizer: put a CUDA toolkit's bin folder on PATH")
    tests = [sys.executable, "-m", "pytest", *OPTIONS, TESTS[0], "-k", f"small_{ops}_set"]
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *tests]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PRIME_KERNELS_TEST_DEVICE": "cuda"}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return judged(done.stdout + done.stderr, done.returncode)


def judged(output: str, code: int) -> dict:
    """Clean only if it says so and the tests under it passed."""
    summary, passed = line_with("SUMMARY", output), re.search(r"(\d+) passed", output)
    if (refused := line_with("Device not supported", output)) and not re.search(r"\d+ (passed|failed)", output):
        raise Skipped(f"compute-sanitizer does not run here: {refused}")
    if code or not passed or not summary:
        raise RuntimeError(f"exit code {code}: {output[-1500:]}")
    return {"tests": int(passed[1]), "summary": summary.strip("= ")}


def line_with(text: str, output: str) -> str:
    return next((line.strip() for line in output.splitlines() if text in line), "")
