"""The stages of python -m benchmarks.gpu at tiny sizes on a CPU: what a GPU runs, but for what only that has."""

import importlib.util
import json
import os
import signal
import sys
import time

import processes
import pytest

from benchmarks.gpu import engine, facts, heads, job, learn, step, table, whole
from benchmarks.gpu.job import Job

SETTINGS = {"device": "cpu", "small": True, "made_by": {"small": True}, "build": "built for a test"}
SETTINGS |= {"smollm2": None, "gsm8k": None}
BARE = ("deepspeed", "pydantic", "vllm", "math_verify", "matplotlib", "flash_attn", "liger_kernel", "xdist")


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch):
    """What other tests' trainers leave in the environment is not for the processes that a stage starts."""
    for name in processes.GROUP:
        monkeypatch.delenv(name, raising=False)


def run(stage, folder, **settings) -> dict:
    work = Job(folder / f"{stage.__name__.rpartition('.')[2]}.json", SETTINGS | settings)
    stage.run(work)
    assert not job.errors(work.record)
    return work.record["items"]


def test_facts(tmp_path):
    items = run(facts, tmp_path)
    assert items["gemm"]["tflops"].keys() == {"peak", "tiny logits", "tiny dX", "tiny dW"}
    assert min(items["gemm"]["tflops"].values()) > 0 and items["copy"]["gb_per_s"] > 0
    assert items["machine"]["build"] == "built for a test" and items["machine"]["backends"]["prime_advantage"]
    table.main(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "A rehearsal" in page and "| tiny dW |" in page and "built for a test" in page


def test_heads(tmp_path):
    items = run(heads, tmp_path)
    for name in ("policy tiny 64", "prm tiny 64", "logprob tiny 64"):
        rows = {row["peer"]: row for row in items[name]["rows"]}
        assert rows["prime_kernels"]["share"] > 0 and rows["prime_kernels"]["error"] < 1e-5
        assert rows["bare GEMMs"]["share"] == 1
    assert {row["candidate"] for row in items["advantage"]["rows"]} >= {"copy", "cpu", "torch eager"}
    table.main(tmp_path)
    assert (tmp_path / "heads.png").stat().st_size > 5000 and "heads.png" in (tmp_path / "README.md").read_text()


def test_heads_fails_where_our_own_op_does(tmp_path, monkeypatch):
    """Another's failure is a row; ours is an error."""

    def broken(op, problem):
        raise RuntimeError("out of order")

    def failures(peer: str) -> dict[str, str]:
        with monkeypatch.context() as patch:
            patch.setitem(heads.peers.PEERS, peer, (("policy",), broken))
            others = ["prm tiny 64", "logprob tiny 64", "advantage"]
            work = Job(tmp_path / f"{len(peer)}.json", SETTINGS | {"tried": others})
            heads.run(work)
            return job.errors(work.record)

    assert not failures("eager, float32 logits")
    assert "prime_kernels: RuntimeError: out of order" in failures("prime_kernels")["policy tiny 64"]


def test_a_step_in_a_process_of_its_own(tmp_path):
    items = run(step, tmp_path, tried=["tiny RLOO"])
    short, long = items["tiny PRIME"]["cases"]
    parked = items["tiny PRIME"]["parking"]
    assert len(parked["park_seconds"]) == len(parked["unpark_seconds"]) == 3 and min(parked["park_seconds"]) > 0
    assert [case["row_tokens"] for case in (short, long)] == [32, 48]
    for case in (short, long):
        assert case["seconds"].keys() >= {"reference", "prm", "advantage", "policy", "sync"}
        assert 0 < case["mfu"] < 1 and case["step_seconds"] > sum(case["seconds"].values()) / 2
        assert case["kernels"]["linear_policy_loss"] == "cpu" and min(case["measured_gib"].values()) > 0
    table.main(tmp_path)
    assert "| tiny PRIME 48 |" in (tmp_path / "README.md").read_text() and (tmp_path / "step.png").exists()


def test_rloo_beside_it(tmp_path, capsys, device):
    spec = {"shape": "tiny", "algorithm": "RLOO", "folder": str(tmp_path), "device": "cpu", "rows": [[32, 8]]}
    step.main(spec)
    case, parked = map(json.loads, capsys.readouterr().out.splitlines()[-2:])
    assert parked["parking"].keys() == {"claimed_gib", "park_seconds", "unpark_seconds"}
    assert not {"reference", "prm"} & case["seconds"].keys() and case["seconds"]["policy"] > 1e-3
    assert case["mfu_of_phases"].keys() == {"policy"}


def test_flops_of_a_forward():
    """Against a count by hand: 2 a weight and token, the head on response tokens, half of a row attended."""

    class Shape:
        hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads = 8, 3, 2, 1
        intermediate_size, vocab_size = 20, 100

    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 20  # q, k and v, o, the MLP
    by_hand = 2 * 64 * (3 * layer + 8 * 100 * 15 / 16) + 3 * 64 * 2 * 2 * 8 * 32 / 2  # rows of 32
    assert sum(step.flops(Shape, 32, 2).values()) == pytest.approx(by_hand)


def test_whole_steps_beside_the_published_dataflow(tmp_path):
    found = run(whole, tmp_path)["tiny"]
    assert found["step_seconds"].keys() == {"uniform: ours RLOO", "uniform: published RLOO"}
    assert found["ratios"]["uniform: published RLOO / ours RLOO"] > 0
    table.main(tmp_path)
    assert "published RLOO / ours RLOO" in (tmp_path / "README.md").read_text()


def test_a_step_that_fails_is_an_error_with_its_text(tmp_path):
    spec = {"shape": "tiny", "algorithm": "RLOO", "folder": str(tmp_path), "device": "abacus", "rows": []}
    with pytest.raises(RuntimeError, match="exit code 1 after 0 cases(.|\n)*abacus"):
        step.apart(Job(tmp_path / "step.json", SETTINGS, 60), spec)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_engine(tmp_path):
    items = run(engine, tmp_path)
    assert items["agreement"]["tokens_per_second"] > 0 and items["sync"]["stale_mismatch_mean"] > 1e-3
    assert items["sleep"] == {"seconds": items["sleep"]["seconds"], "skipped": "vLLM sleeps on a GPU alone"}
    for name in ("agreement", "sync", "carried", "killed"):
        assert items[name]["mismatch_mean"] < 1e-4
    assert items["killed"]["restart_and_work_seconds"] > 0


def test_quickstart_to_its_last_step(tmp_path):
    items = run(learn, tmp_path)
    found = items["quickstart"]
    assert found["steps"] == 2 and found["steps_skipped"] == 0 and found["accuracy"].keys() == {0, 2}
    assert found["parameters"] == 645_632 and found["kernels"]["kernel/linear_policy_loss"] == "cpu"
    assert items["smollm2"]["skipped"] == "give the weights and the rows: --smollm2 MODEL_DIR --gsm8k ROWS.jsonl"


def test_a_run_that_is_stopped_at_its_time(tmp_path, monkeypatch):
    """As SmolLM2's is, by the last stage's limit: it is asked to end; what does not is killed."""
    (tmp_path / "endless.py").write_text(
        "import pathlib, sys, time\n"
        "while True:\n"
        "    try: time.sleep(60)\n"
        "    except KeyboardInterrupt: pathlib.Path(sys.argv[1]).write_text('was asked')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(learn, "ENDING", 1.0)
    began, mine = time.monotonic(), signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        learn.python(Job(tmp_path / "learn.json", SETTINGS), "endless", str(tmp_path / "said"), seconds=8.0)
    finally:
        signal.signal(signal.SIGINT, mine)
    assert (tmp_path / "said").read_text() == "was asked" and time.monotonic() - began < 60


def test_a_command_that_fails_is_an_error_with_its_text(tmp_path):
    command = "prime_fast.stages.quickstart", str(tmp_path / "data"), "--chain", "0"
    with pytest.raises(RuntimeError, match="exit code 2(.|\n)*--chain must be at least 1"):
        learn.python(Job(tmp_path / "learn.json", SETTINGS), *command)


def test_a_bare_machine_runs_what_it_can_and_says_what_not(tmp_path):
    """torch and pytest alone: the kernels' tests run; what needs DeepSpeed or vLLM is left out with the reason."""
    names = "".join(f"sys.modules[{name!r}] = None\n" for name in BARE)
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{names}")
    environment = processes.environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(job.ROOT)]))
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path / "out")]
    command += ["--stages", "kernels,step,engine,whole,learn"]
    done = processes.run(command, cwd=job.ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    records = {
        name: job.read(tmp_path / f"out/{name}.json") for name in ("kernels", "step", "engine", "whole", "learn")
    }
    outcomes = [item["outcome"] for item in records["kernels"]["items"].values()]
    assert outcomes.count("passed") > 30 and not job.left_out(records["kernels"])
    skipped = {name: item["skipped"] for name, item in records["step"]["items"].items()}
    assert skipped == {"step": "the trainer needs deepspeed, pydantic: bring wheels with --wheels FOLDER"}
    assert records["whole"]["items"]["whole"]["skipped"] == skipped["step"]
    assert "deepspeed, pydantic" in records["learn"]["items"]["learn"]["skipped"]
    assert records["engine"]["items"]["engine"]["skipped"] == "vllm is not installed: pip install vllm==0.25.1"
    page = (tmp_path / "out/README.md").read_text()
    assert "- left out: step: the trainer needs deepspeed" in page and not list((tmp_path / "out").glob("*.png"))
