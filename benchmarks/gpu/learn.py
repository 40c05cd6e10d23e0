"""Stage 6: does it learn here? The quickstart to its last step, then SmolLM2-135M on GSM8K as far as time goes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from benchmarks.gpu.job import ROOT, Item, Job, Skipped
from benchmarks.gpu.step import missing, refuse

QUICKSTART, SMOLLM2 = 200, 120  # seconds: of the first to its end, and the least that makes the second worth starting
SFT_STEPS = 100  # of SmolLM2, as the answer's form has to be learnt first
MARGIN = 15.0  # seconds before the limit at which SmolLM2's run is stopped
ENDING = 60.0  # seconds that a run which is interrupted may take to end


def run(job: Job) -> None:
    if absent := missing():
        job.do([Item("learn", 0, partial(refuse, absent))])
        return
    with tempfile.TemporaryDirectory(prefix="prime-fast-learn-") as folder:
        job.do(items(job, Path(folder)))


def items(job: Job, folder: Path) -> Iterator[Item]:
    yield Item("quickstart", 0 if job.small else QUICKSTART, partial(quickstart, job, folder / "hf", "hf"))
    yield Item("smollm2", 0 if job.small else SMOLLM2, partial(smollm2, job, folder / "smollm2"))
    if importlib.util.find_spec("vllm") is not None and not job.small:
        yield Item("quickstart, vLLM rollouts", QUICKSTART, partial(quickstart, job, folder / "vllm", "vllm"))


def quickstart(job: Job, folder: Path, engine: str) -> dict:
    """What `make quickstart` does, and that its checkpoint loads."""
    data, steps = folder / "data", []
    if job.small:
        rows = ["--train", "64", "--eval", "16", "--sft", "64"]
        steps = ["sft.steps=2", "sft.mini_batch=8", "steps=2", "rollout.prompts=4", "rollout.keep=[0, 1]"]
    else:
        rows = []
    python(job, "prime_fast.stages.quickstart", str(data), *rows)
    config, model = "configs/quickstart.yaml", f"model.policy={data / 'model'}"
    sft = [f"run_dir={folder / 'sft'}", model, f"sft.data={data / 'sft.jsonl'}"]
    python(job, "prime_fast", "sft", config, *sft, *steps)
    files = [f"data.train={data / 'train.jsonl'}", f"data.eval={data / 'eval.jsonl'}", f"rollout.engine={engine}"]
    started = [f"run_dir={folder / 'train'}", f"model.policy={folder / 'sft/model'}"]
    began = time.perf_counter()
    python(job, "prime_fast", "train", config, *started, *files, *steps)
    found = curve(folder / "train") | {"seconds_of_training": time.perf_counter() - began}
    return found | {"parameters": loaded(folder / "train")}


def smollm2(job: Job, folder: Path) -> dict:
    """A short SFT, then RL steps until the stage's time is over."""
    model, rows = job.settings["smollm2"], job.settings["gsm8k"]
    if not (model and rows):
        raise Skipped("give the weights and the rows: --smollm2 MODEL_DIR --gsm8k ROWS.jsonl")
    if importlib.util.find_spec("math_verify") is None:
        raise Skipped("grading needs math-verify: bring wheels with --wheels FOLDER")
    config, files = "configs/smollm2-gsm8k.yaml", [f"data.train={rows}", "data.eval=[]"]
    sft = [f"run_dir={folder / 'sft'}", f"model.policy={model}", f"sft.data={rows}", f"sft.steps={SFT_STEPS}"]
    python(job, "prime_fast", "sft", config, *sft)
    train = ["train", config, f"run_dir={folder / 'train'}", f"model.policy={folder / 'sft/model'}", *files]
    python(job, "prime_fast", *train, "steps=10000", "log.checkpoint_every=0", seconds=job.left - MARGIN - ENDING)
    return curve(folder / "train")


def python(job: Job, module: str, *arguments: str, seconds: float | None = None) -> None:
    """Run a module to its end; with `seconds`, for as long as that, and then stopped as Ctrl-C stops it."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background shell has made it ignore
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds or max(1.0, job.left))
    except subprocess.TimeoutExpired:
        if seconds is None:
            raise
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=ENDING)
        return
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments[:2])}: exit code {process.returncode}: {output[-1500:]}")


def curve(run_dir: Path) -> dict:
    """What a run's metrics say of its learning and its pace."""
    from prime_fast.metrics import read_metrics

    records = read_metrics(run_dir)
    steps = [record for record in records if record["step"] > 0]
    if not steps:
        raise RuntimeError("no step was made")
    accuracy = {r["step"]: r["eval_accuracy"] for r in records if r.get("eval_accuracy") is not None}
    third = max(1, len(steps) // 3)
    seconds = sorted(record["seconds"] for record in steps)
    return {
        "steps": len(steps),
        "steps_skipped": steps[-1].get("skipped", 0),
        "accuracy": accuracy,
        "outcome_first_third": mean(steps[:third], "outcome"),
        "outcome_last_third": mean(steps[-third:], "outcome"),
        "prm_pair_accuracy_last_third": mean(steps[-third:], "prm_pair_accuracy"),
        "mismatch_kl_mean": mean(steps, "mismatch_kl"),
        "median_step_seconds": seconds[len(seconds) // 2],
        "kernels": {name: value for name, value in steps[0].items() if name.startswith("kernel/")},
    }


def mean(records: list[dict], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return sum(values) / len(values) if values else None


def loaded(run_dir: Path) -> int:
    """The parameters of the policy that the run left, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    newest = max((run_dir / "checkpoints").glob("step-*"))
    return AutoModelForCausalLM.from_pretrained(newest / "policy").num_parameters()
