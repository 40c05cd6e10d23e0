"""All that there is to measure on one NVIDIA GPU, in one command, without a network.

    python -m benchmarks.gpu [--out FOLDER] [--stages 1-4 | --stages 2,5] [--again] [--wheels FOLDER]
                             [--smollm2 MODEL_DIR --gsm8k ROWS.jsonl]

Needs torch >= 2.11 with CUDA; what else is missing is said, and what it stops is left out. Builds the compiled kernels
in the tree, then runs seven stages (`--help` lists them), each in a process and with a limit of its own. A result
is on disk as soon as it is there, in FOLDER/STAGE.json (default: benchmarks/results/<gpu>), so a call that is cut off
keeps what it did, and the next call does the rest: what is missing, failed or was skipped, and stages whose code,
packages or machine changed. --again repeats the chosen stages altogether. FOLDER/README.md is the table of it all.

--wheels installs what a bare machine lacks (DeepSpeed, pydantic, math-verify: pure Python but for pydantic-core) from
wheels that you bring, into build/gpu-site and nowhere else; make them where there is a network with `pip wheel`.

Exit code: 0, 1 if anything failed, 2 if this machine cannot run it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.job import LOST, PACKAGES, ROOT, STAGES, Stage, done, errors, has_result, left_out, read, write
from benchmarks.machine import RESULTS, installed, nvidia_smi, slug

NEEDS = "benchmarks.gpu needs an NVIDIA GPU, its driver and torch >= 2.11 built for CUDA"
SITE = ROOT / "build" / "gpu-site"  # where --wheels go
GRACE = 15.0  # seconds a stage may take over its limit to end by itself
PROBE = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None}
if torch.cuda.is_available():
    found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
print(json.dumps(found))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.wheels:
        install(options.wheels)
    environment = path_with(SITE if SITE.is_dir() else None)
    found = probe(environment)
    if problem := cannot_run(found, gpu=not options.rehearse):
        print(f"{NEEDS}; {problem}", file=sys.stderr)
        return 2
    device = "cpu" if options.rehearse else "cuda"
    out = options.out or (ROOT / "runs/gpu-rehearsal" if options.rehearse else RESULTS / slug(found["gpu"]))
    out.mkdir(parents=True, exist_ok=True)
    said = build(environment, cuda=not options.rehearse)
    print(said, flush=True)
    machine = found | {"driver": (nvidia_smi() or {}).get("driver_version"), "small": options.rehearse}
    machine |= {name: version for name in PACKAGES if (version := installed(name))}
    settings = {"device": device, "small": options.rehearse, "folder": str(out), "build": said}
    settings |= {"smollm2": options.smollm2, "gsm8k": options.gsm8k}
    failed = False
    for number, stage in options.stages:
        made_by = machine | {"sources": fingerprint((*stage.sources, f"benchmarks/gpu/{stage.name}.py"))}
        record = run(number, stage, out, settings | {"made_by": made_by}, environment, options)
        failed |= bool(errors(record))
    write_table(out, environment)
    return int(failed)


def parser() -> argparse.ArgumentParser:
    lines = [f"  {i}  {s.name:8} {s.seconds:4.0f} s at most: {s.what}" for i, s in enumerate(STAGES, 1)]
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__.split("\n")[0],
        epilog="\n".join(["stages:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--out", type=Path, help="folder (default: benchmarks/results/<gpu>)")
    made.add_argument(
        "--stages", type=chosen, default=chosen(f"1-{len(STAGES)}"), help="numbers or names: 1-4, 2,heads"
    )
    made.add_argument("--again", action="store_true", help="repeat what is done already")
    made.add_argument("--limit", type=float, help="seconds for each stage (default: its own)")
    made.add_argument("--wheels", type=Path, help="folder of wheels to install into build/gpu-site")
    made.add_argument("--smollm2", help="folder of SmolLM2-135M-Instruct, for the last stage")
    made.add_argument("--gsm8k", help="GSM8K rows (.jsonl or .parquet), for the last stage")
    made.add_argument("--rehearse", action="store_true", help="every stage at a tiny size on this CPU")
    return made


def chosen(text: str) -> list[tuple[int, Stage]]:
    names, picked = [stage.name for stage in STAGES], set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        ends = [names.index(end) + 1 if end in names else int(end) if end.isdecimal() else 0 for end in (first, last)]
        picked |= set(range(ends[0], (ends[1] if last else ends[0]) + 1))
    if not picked or not picked <= set(range(1, len(STAGES) + 1)):
        raise argparse.ArgumentTypeError(f"{text}: stages are 1 to {len(STAGES)}, or {', '.join(names)}")
    return [(number, STAGES[number - 1]) for number in sorted(picked)]


def path_with(site: Path | None) -> dict[str, str]:
    """The environment of every process that is started: the tree before what is installed, and no network."""
    places = [str(place) for place in (ROOT, ROOT / "kernels", site) if place]
    given = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:0] = [place for place in places if place not in sys.path]  # for `installed`
    return os.environ | {"PYTHONPATH": os.pathsep.join([*places, *given]), "HF_HUB_OFFLINE": "1"}


def probe(environment: dict[str, str]) -> dict | None:
    """What torch sees, asked in a process of its own: a context of this one would hold memory while stages measure."""
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def cannot_run(found: dict | None, gpu: bool = True) -> str | None:
    if found is None:
        return f"{sys.executable} has no torch that can be imported"
    if gpu and found["gpu"] is None:
        build = "is a CPU build" if found["cuda"] is None else "sees no GPU (does nvidia-smi work here?)"
        return f"torch {found['torch']} {build}"
    old = tuple(int(part) for part in found["torch"].split(".")[:2]) < (2, 11)
    return f"torch {found['torch']} is too old" if old else None


def install(wheels: Path) -> None:
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        sys.exit(f"--wheels {wheels}: there is no .whl in it; make some with `pip wheel -w FOLDER NAME==VERSION`")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade"]
    subprocess.run([*pip, "--target", str(SITE), *files], check=True)  # a venv's system is not the venv it is made in


def build(environment: dict[str, str], cuda: bool = True) -> str:
    """Compile what the tree ships, in place, unless it is there; says what is."""
    wanted = ("_C", "_cuda") if cuda else ("_C",)
    targets = [ROOT / f"kernels/prime_kernels/{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in wanted]
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").iterdir())

    def missing() -> list[Path]:
        return [path for path in targets if not path.exists() or path.stat().st_mtime < newest]

    if missing():
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        wish = environment | ({} if cuda else {"PRIME_KERNELS_CUDA": "0"})
        made = subprocess.run(command, cwd=ROOT, env=wish, capture_output=True, text=True)
        if lost := missing():
            errors = [line.strip() for line in (made.stdout + made.stderr).splitlines() if "error" in line.lower()]
            why = errors[-1] if errors else "no compiler (nvcc on PATH or in CUDA_HOME)"
            return f"not built: {', '.join(path.name for path in lost)}: {why}"
    return f"compiled kernels: {', '.join(path.name for path in targets)}"


def fingerprint(sources: Sequence[str]) -> str:
    """Of the code in these files and folders of the tree."""
    total = hashlib.sha256()
    for source in sources:
        for path in sorted([ROOT / source, *(ROOT / source).rglob("*")]):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".yaml"):
                total.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return total.hexdigest()[:16]


def run(number: int, stage: Stage, out: Path, settings: dict, environment: dict, options: argparse.Namespace) -> dict:
    """Run a stage to its end or its limit, in a new process each time it loses one; its record."""
    path = out / f"{stage.name}.json"
    if options.again:
        path.unlink(missing_ok=True)
    head = f"{number}/{len(STAGES)} {stage.name}"
    if done(read(path), settings["made_by"]):
        print(f"{head}: done before, kept (--again repeats it)", flush=True)
        return read(path)
    limit = options.limit or stage.seconds
    print(f"{head}: {stage.what}, {limit:.0f} s at most", flush=True)
    ends, tried = time.monotonic() + limit, []
    while (left := ends - time.monotonic()) > 0:
        module = f"{stage.package}.{stage.name}"
        command = [sys.executable, "-m", "benchmarks.gpu.work", module, str(out), f"{left:.1f}"]
        code = supervise([*command, json.dumps(settings | {"tried": tried})], left + GRACE, environment)
        if code == 0 or not blame(path, stage, settings, code):
            break
        tried = read(path)["tried"]
    record = read(path)
    for name, text in errors(record).items():
        print(f"  FAILED {name}: {text.splitlines()[-1]}", flush=True)
    if missing := left_out(record):
        print(f"  not reached: {len(missing)}, the next call goes on with {missing[0]}", flush=True)
    return record


def supervise(command: list[str], seconds: float, environment: dict[str, str]) -> int | None:
    """The exit code; None where it was ended at its limit, with all that it started."""
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def blame(path: Path, stage: Stage, settings: dict, code: int | None) -> bool:
    """Note how a stage's process was lost with the items that were running; whether it can go on without them."""
    record = read(path)
    how = "was cut off at the stage's limit" if code is None else f"lost its process (exit code {code})"
    if record.get("made_by") != settings["made_by"]:
        empty = {"stage": stage.name, "made_by": settings["made_by"], "seconds": 0.0, "items": {}, "tried": []}
        write(path, empty | {"error": f"the stage {how}"})
        return False
    running = [name for name in record["running"] if not has_result(record["items"].get(name))]
    record["items"] |= {name: {"error": f"{name} {how}"} for name in running}
    if code not in (None, LOST) and not running:
        record["error"] = f"the stage {how}"
    record["running"] = []
    write(path, record)
    return code == LOST or (code is not None and bool(running))


def write_table(out: Path, environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-m", "benchmarks.gpu.table", str(out)], env=environment, cwd=ROOT, check=True)
    print(f"{out / 'README.md'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
