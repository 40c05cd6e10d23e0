"""A worker of stage 2: runs tests with pytest and says of each when it starts and how it ended, in JSON lines.

    python -m benchmarks.gpu.recorder FILE...

Test ids come as JSON on stdin; an empty list asks for the ids that there are. A worker whose GPU context a test has
spoiled ends after it, for every test that follows would fail.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import pytest

from benchmarks.gpu.job import LOST, spoiled

OPTIONS = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "ignore", "--continue-on-collection-errors"]
TIMEOUT = ["-p", "pytest_timeout", "-o", "timeout=60", "-o", "timeout_method=thread"]  # a hanging test loses its worker
ERROR_TEXT = 1500  # characters kept of a failure, from its end


class Recorder:
    def __init__(self, wanted: list[str], lines) -> None:
        self.wanted, self.lines, self.result = set(wanted), lines, {}

    def say(self, **line) -> None:
        self.lines.write(json.dumps(line) + "\n")
        self.lines.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if not self.wanted:
            self.say(ids=[item.nodeid for item in items])
        items[:] = [item for item in items if item.nodeid in self.wanted]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.say(test=f"{report.nodeid} (collection)", result={"error": report.longreprtext[-ERROR_TEXT:]})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.result = {}
        self.say(test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.result = {"error": f"{report.when}: {report.longreprtext[-ERROR_TEXT:]}"}
        elif report.skipped:
            self.result = {"outcome": "skipped", "why": str(report.longrepr[-1])}
        elif report.when == "call":
            self.result = {"outcome": "passed", "seconds": round(report.duration, 2)}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.say(test=nodeid, result=self.result)
        if "error" in self.result and os.environ["PRIME_KERNELS_TEST_DEVICE"] == "cuda" and spoiled():
            os._exit(LOST)


def main(files: list[str]) -> None:
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what pytest prints is not for whoever reads the lines
    recorder = Recorder(json.loads(sys.stdin.readline()), lines)
    timeout = TIMEOUT if importlib.util.find_spec("pytest_timeout") else []
    pytest.main([*OPTIONS, *timeout, *files], plugins=[recorder])


if __name__ == "__main__":
    main(sys.argv[1:])
