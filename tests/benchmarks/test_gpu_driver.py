"""python -m benchmarks.gpu: what the driver promises, with stages that fail, crash, hang and come back."""

import argparse
import json
import os
import sys
import time
import zipfile
from pathlib import Path

import processes
import pytest

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import job, kernels, table
from benchmarks.gpu.job import Item, Job, Skipped, Stage

SETTINGS = {"device": "cpu", "small": True, "made_by": {"sources": "a"}}
STAGE = """
import os, time
from pathlib import Path
from benchmarks.gpu.job import Item, Skipped

def run(job):
    if "broken" in os.environ:
        raise RuntimeError("no stage today")
    def note(name):
        with Path(os.environ["TOY_LOG"]).open("a") as file:
            file.write(name + "\\n")
    def good():
        note("good")
        return {"value": 1}
    def bad():
        note("bad")
        raise ValueError("it went wrong")
    def absent():
        note("absent")
        raise Skipped("there is no such thing here")
    def dies():
        note("dies")
        os.abort()
    def late():
        note("late")
        time.sleep(600 if "hang" in os.environ else 0)
        return {"value": 2}
    def large():
        note("large")
        return {"value": 3}
    items = [Item("good", 0, good), Item("bad", 0, bad), Item("absent", 0, absent), Item("dies", 0, dies)]
    job.do([*items, Item("late", 0, late), Item("large", 1e6 if "hurry" in os.environ else 0, large)])
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Runs a stage of six items as the driver does: (record, what ran)."""
    monkeypatch.setattr(driver, "GRACE", 0.5)
    stage, log = Stage("toy", 20.0, "toy", (), package="toys"), tmp_path / "log"
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys/toy.py").write_text(STAGE)

    def run(*flags: str, again: bool = False, limit: float | None = None, made_by: str = "a"):
        log.write_text("")
        path = os.pathsep.join([str(tmp_path), str(job.ROOT)])
        environment = os.environ | {"PYTHONPATH": path, "TOY_LOG": str(log)} | dict.fromkeys(flags, "1")
        options = argparse.Namespace(again=again, limit=limit)
        settings = SETTINGS | {"made_by": {"sources": made_by}}
        record = driver.run(1, stage, tmp_path, settings, environment, options)
        assert record == job.read(tmp_path / "toy.json")
        return record, log.read_text().split()

    return run


def test_one_items_failure_or_crash_costs_no_other(toy, capsys):
    record, ran = toy()
    items = record["items"]
    assert ran == ["good", "bad", "absent", "dies", "late", "large"]
    assert items["good"]["value"] == 1 and items["late"]["value"] == 2 and items["large"]["value"] == 3
    assert items["bad"]["error"].endswith("ValueError: it went wrong")
    assert items["absent"]["skipped"] == "there is no such thing here"
    assert items["dies"]["error"] == "dies lost its process (exit code -6)"
    assert set(job.errors(record)) == {"bad", "dies"} and not job.left_out(record) and record["running"] == []
    said = capsys.readouterr().out
    assert "FAILED bad: ValueError: it went wrong" in said and "FAILED dies: dies lost its process" in said


def test_a_second_call_does_the_rest_alone(toy):
    record, ran = toy("hang", "hurry", limit=3.0)
    assert ran == ["good", "bad", "absent", "dies", "late"]
    assert record["items"]["late"] == {"error": "late was cut off at the stage's limit"}
    assert job.left_out(record) == ["large"]
    record, ran = toy()
    assert ran == ["bad", "absent", "dies", "late", "large"] and record["items"]["late"]["value"] == 2
    _, ran = toy(again=True)
    assert ran[0] == "good"
    _, ran = toy(made_by="other code")
    assert ran[0] == "good"


def test_a_stage_that_is_done_is_kept(tmp_path, capsys):
    path = tmp_path / "facts.json"
    work = Job(path, SETTINGS)
    work.do([Item("one", 0, lambda: {"value": 1})])
    options = argparse.Namespace(again=False, limit=None)
    before = path.stat().st_mtime_ns
    assert driver.run(1, job.STAGES[0], tmp_path, SETTINGS, {}, options)["items"]["one"]["value"] == 1
    assert path.stat().st_mtime_ns == before and "done before, kept" in capsys.readouterr().out


def test_a_stage_that_cannot_start_says_so(toy):
    record, ran = toy("broken")
    assert ran == [] and record["error"].endswith("RuntimeError: no stage today")
    assert "error" not in toy()[0]


def test_every_state_on_the_disk_is_whole(tmp_path):
    """Read at each item, while it runs and after."""
    path = tmp_path / "stage.json"
    seen = []

    def look(value):
        seen.append(json.loads(path.read_text()))
        return {"value": value}

    Job(path, SETTINGS).do([Item(str(i), 0, lambda i=i: look(i)) for i in range(3)])
    assert [(record["running"], list(record["items"])) for record in seen] == [
        (["0"], []), (["1"], ["0"]), (["2"], ["0", "1"])
    ]  # fmt: skip
    assert job.done(job.read(path), SETTINGS["made_by"]) and not job.done(job.read(path), {"sources": "b"})


def test_a_reason_to_skip_is_looked_at_again(tmp_path):
    def refuse():
        raise Skipped("not yet")

    Job(tmp_path / "stage.json", SETTINGS).do([Item("one", 0, refuse)])
    assert not job.done(job.read(tmp_path / "stage.json"), SETTINGS["made_by"])
    Job(tmp_path / "stage.json", SETTINGS).do([Item("one", 0, lambda: {"value": 1})])
    assert job.done(job.read(tmp_path / "stage.json"), SETTINGS["made_by"])


TESTS = """
import os, time, pytest

def test_passes(): pass
def test_fails(): assert 1 == 2, "not equal"
def test_dies(): os._exit(3)
@pytest.fixture
def broken(): raise RuntimeError("no fixture")
def test_has_no_fixture(broken): pass
@pytest.mark.skip(reason="not here")
def test_is_skipped(): pass
@pytest.mark.parametrize("name", ["a[b]", "c d: e"])
def test_odd_names(name): pass
def test_hangs(): time.sleep(600 if os.environ.get("hang") else 0)
"""


@pytest.fixture
def tests(tmp_path, monkeypatch):
    def run(seconds: float = 60.0, workers: int = 2) -> dict:
        monkeypatch.setattr(kernels, "workers", lambda job: workers)
        work = Job(tmp_path / "kernels.json", SETTINGS | {"small": False}, seconds)
        kernels.run_tests(work, (str(file),))
        return {name.rpartition("::")[2]: item for name, item in work.record["items"].items()} | {"record": work.record}

    file = tmp_path / "test_toy.py"
    file.write_text(TESTS)
    return run


@pytest.mark.parametrize("workers", [1, 3])
def test_a_test_is_an_item_and_a_crash_costs_one(tests, workers):
    items = tests(workers=workers)
    record = items.pop("record")
    assert len(items) == len(record["planned"]) == 8 and record["running"] == []
    passed = {name for name, item in items.items() if item.get("outcome") == "passed"}
    assert passed == {"test_passes", "test_odd_names[a[b]]", "test_odd_names[c d: e]", "test_hangs"}
    assert "not equal" in items["test_fails"]["error"] and "no fixture" in items["test_has_no_fixture"]["error"]
    assert items["test_dies"]["error"].endswith("lost its process (exit code 3)")
    assert items["test_is_skipped"] == {"outcome": "skipped", "why": "Skipped: not here"}


def test_tests_that_are_cut_off_are_done_by_the_next_call(tests, monkeypatch):
    monkeypatch.setenv("hang", "1")
    monkeypatch.setattr(kernels, "MARGIN", 0.0)
    began = time.monotonic()
    first = tests(seconds=8.0)
    assert time.monotonic() - began < 60 and "test_hangs" not in first
    assert "test_hangs" in {name.rpartition("::")[2] for name in job.left_out(first["record"])}
    monkeypatch.delenv("hang")
    assert tests()["test_hangs"]["outcome"] == "passed"


def test_no_test_at_all_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="pytest found no test"):
        kernels.run_tests(Job(tmp_path / "kernels.json", SETTINGS), (str(tmp_path / "nothing.py"),))


@pytest.mark.parametrize(
    ("output", "code", "verdict"),
    [
        ("3 passed in 2s\n========= ERROR SUMMARY: 0 errors\n", 0, "ERROR SUMMARY: 0 errors"),
        ("========= ERROR SUMMARY: 0 errors\n", 0, None),
        ("3 passed in 2s\n========= ERROR SUMMARY: 7 errors\n", 86, None),
        ("3 passed in 2s", 0, None),
        ("CUDA error: operation not supported\n1 failed, 2 passed in 2s", 1, None),
    ],
    ids=["clean", "nothing ran", "errors", "no word of the sanitizer", "a failure with its words"],
)
def test_a_sanitizer_is_believed_only_if_it_looked(output, code, verdict):
    if verdict:
        assert kernels.judged(output, code) == {"tests": 3, "summary": verdict}
    else:
        with pytest.raises(RuntimeError):
            kernels.judged(output, code)
    with pytest.raises(Skipped, match="does not run here"):
        kernels.judged("========= Error: Device not supported\n", 1)


def test_which_stages():
    numbers = lambda text: [number for number, _ in driver.chosen(text)]  # noqa: E731
    assert (
        numbers("1-4") == [1, 2, 3, 4] and numbers("2,heads,6") == [2, 3, 6] and numbers("step-learn") == [4, 5, 6, 7]
    )
    for text in ("0", "8", "3-9", "speed", "4-2", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="stages are 1 to 7"):
            driver.chosen(text)


def test_limits_of_the_first_four_are_ten_minutes():
    assert sum(stage.seconds for stage in job.STAGES[:4]) <= 600
    assert all(stage.seconds <= 600 for stage in job.STAGES[4:])


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (None, "has no torch that can be imported"),
        ({"torch": "2.13.0+cpu", "cuda": None, "gpu": None}, "torch 2.13.0+cpu is a CPU build"),
        ({"torch": "2.11.0", "cuda": "13.0", "gpu": None}, "torch 2.11.0 sees no GPU"),
        ({"torch": "2.9.1", "cuda": "12.8", "gpu": "NVIDIA H200"}, "torch 2.9.1 is too old"),
    ],
)
def test_a_machine_that_cannot_run_it_is_told_what_it_takes(found, why, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(driver, "probe", lambda environment: found)
    assert driver.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "needs an NVIDIA GPU, its driver and torch >= 2.11" in said and why in said
    assert not list(tmp_path.iterdir())


def test_wheels_go_to_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "SITE", tmp_path / "site")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="there is no .whl in it"):
        driver.install(tmp_path)
    with zipfile.ZipFile(tmp_path / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought.py", "value = 3\n")
        wheel.writestr("brought-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
        wheel.writestr("brought-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("brought-1.0.dist-info/RECORD", "")
    driver.install(tmp_path)
    environment = driver.path_with(driver.SITE)
    done = processes.run([sys.executable, "-c", "import brought; print(brought.value)"], env=environment)
    assert done.stdout == "3\n" and driver.installed("brought") == "1.0"


def test_a_change_of_the_code_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "ROOT", tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("folder/a.py", "folder/notes.md", "b.cu"):
        (tmp_path / name).write_text("1")
    before = driver.fingerprint(("folder", "b.cu"))
    (tmp_path / "folder/notes.md").write_text("2")
    assert driver.fingerprint(("folder", "b.cu")) == before
    for name in ("folder/a.py", "b.cu"):
        (tmp_path / name).write_text("2")
        assert driver.fingerprint(("folder", "b.cu")) != before
        (tmp_path / name).write_text("1")
    assert all((job.ROOT / source).exists() for stage in job.STAGES for source in stage.sources)


def test_the_page_shows_failures_and_what_was_left_out(tmp_path):
    work = Job(tmp_path / "engine.json", SETTINGS)

    def fail():
        raise ValueError("the engine fell over")

    def skip():
        raise Skipped("no vLLM here")

    work.do([Item("first", 0, fail), Item("second", 0, skip), Item("third", 0, lambda: {"seconds_each": 1.23456})])
    work.plan(["fourth"])
    work.save()
    table.main(tmp_path)
    page = Path(tmp_path, "README.md").read_text()
    assert (
        "- **failed** first: ValueError: the engine fell over" in page
        and "| 5 | engine | 1 of 4 done, 1 failed |" in page
    )
    assert "- left out: second: no vLLM here" in page and "- not reached in the time given: 1, from fourth on" in page
    assert "- seconds_each: 1.235" in page and "| 1 | facts | not run |" in page
