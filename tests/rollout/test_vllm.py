"""A real vLLM on the CPU behind the rollout protocol; see test_rollout.py for what holds for every engine."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from engines import EOS, needs_vllm, start_engine
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from prime_fast.cli import main
from prime_fast.metrics import read_metrics
from prime_fast.rewards import escapes
from prime_fast.rollout import EngineDied, EngineError, Request, process
from prime_fast.rollout import vllm as engine_file
from prime_fast.rollout.fleet import Fleet

PROMPTS = [[2 + (7 * i + j) % 15 for j in range(1 + i % 9)] for i in range(32)]


@pytest.fixture(scope="module", autouse=True)
def installed():
    needs_vllm()


@pytest.fixture(scope="module")
def hf(workspace):
    return start_engine("hf", workspace / "model")


@pytest.fixture(scope="module")
def vllm(workspace):
    engine = start_engine("vllm", workspace / "model")
    yield engine
    engine.close()


def changed(model: Path | str, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """The model's weights, every one moved."""
    generator = torch.Generator().manual_seed(1)
    weights = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())  # a tied head is not among them
    noise = {name: torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    return {name: w.detach() + scale * noise[name] * w.detach().std().clamp(min=0.1) for name, w in weights.items()}


def greedy(engine):
    return engine.generate(PROMPTS, [[0]] * len(PROMPTS), max_tokens=24, temperature=0.0)


def assert_same_greedy(left, right):
    for (a,), (b,) in zip(greedy(left), greedy(right), strict=True):
        assert torch.equal(a.tokens, b.tokens) and a.truncated == b.truncated
        torch.testing.assert_close(a.logprob, b.logprob, rtol=0, atol=1e-4)


def test_greedy_is_the_hf_engines_before_and_after_a_sync(hf, vllm, workspace):
    assert_same_greedy(hf, vllm)
    before = [sample.tokens for (sample,) in greedy(vllm)]
    start = AutoModelForCausalLM.from_pretrained(workspace / "model").state_dict()
    for weights in (changed(workspace / "model"), start):
        hf.load_weights(weights.items())
        vllm.sleep()
        vllm.wake()
        vllm.load_weights(weights.items())
        vllm.ready()
        assert_same_greedy(hf, vllm)
        now = [sample.tokens for (sample,) in greedy(vllm)]
        assert all(map(torch.equal, now, before)) == (weights is start)


def test_a_tied_head_of_another_architecture(tmp_path, workspace):
    """Qwen3 with tied embeddings and a vocabulary that vLLM pads."""
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=83,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen3")
    weights = changed(tmp_path / "qwen3")
    assert "lm_head.weight" not in weights
    hf, vllm = (start_engine(name, tmp_path / "qwen3") for name in ("hf", "vllm"))
    try:
        assert_same_greedy(hf, vllm)
        for engine in (hf, vllm):
            engine.load_weights(weights.items())
        assert_same_greedy(hf, vllm)
    finally:
        vllm.close()


def test_more_prompts_than_fit_a_step(workspace):
    """Prompts that would be prefilled in pieces, and more sequences than are decoded together."""
    prompts = [(PROMPTS[8] * 5)[: 30 + i % 10] for i in range(40)]
    seeds = [[2 * i, 2 * i + 1] for i in range(40)]
    vllm = start_engine("vllm", workspace / "model", batch=24, options={"max_num_batched_tokens": 64})
    try:
        got = vllm.generate(prompts, seeds, max_tokens=12, temperature=1.0)
        again = vllm.generate(prompts[::-1], seeds[::-1], max_tokens=12, temperature=1.0)[::-1]
    finally:
        vllm.close()
    assert [len(group) for group in got] == [2] * 40
    same = [torch.equal(a.tokens, b.tokens) for x, y in zip(got, again, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(same) >= 79  # rounding in another batch may turn a draw


@pytest.mark.parametrize("how", ["a flipped bit", "a stale tensor", "two swapped halves"])
def test_a_corrupted_sync_names_its_tensor(how, vllm, workspace, monkeypatch):
    name = "model.layers.1.mlp.down_proj.weight"
    send = process.EngineProcess._send_bucket

    def corrupt(self, entries, flat):
        for entry in entries:
            if entry.name == name:
                part = flat[entry.start : entry.start + entry.size]
                if how == "a flipped bit":
                    part[entry.size // 2] ^= 1
                elif how == "a stale tensor":
                    part.zero_()
                else:
                    part.copy_(part.roll(entry.size // 2))
        send(self, entries, flat)

    weights = AutoModelForCausalLM.from_pretrained(workspace / "model").state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(process.EngineProcess, "_send_bucket", corrupt)
        with pytest.raises(EngineError, match=rf"weight sync: {name} reached the rollout engine with other bytes"):
            vllm.load_weights(weights.items())
    vllm.load_weights(weights.items())


def requests(count: int, tokens: int) -> list[Request]:
    rng = random.Random(4)
    return [Request(i, PROMPTS[i % 32], [rng.getrandbits(63) for _ in range(4)], tokens, 1.0) for i in range(count)]


def gone(pid: int) -> bool:
    """Neither the process nor anything of its session is left."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == pid:
            return False
    return True


def test_an_engine_lost_in_the_middle_costs_no_prompt(workspace, monkeypatch):
    """Stopped, so that it gives no sign of life; the new one gets the weights and redoes what is missing."""
    engine, restart = start_engine("vllm", workspace / "model", batch=8, longest=512), process.EngineProcess.restart

    def patient_restart(self, room):
        self.deadlines = process.Deadlines()
        restart(self, room)

    monkeypatch.setattr(process.EngineProcess, "restart", patient_restart)
    weights = changed(workspace / "model")
    fleet = Fleet(engine, lambda: iter(weights.items()))
    try:
        fleet.sync()
        asked = requests(12, 480)
        fleet.submit(asked)
        done = {}
        while not done:
            done |= dict(fleet.step())
        assert len(done) < 12
        engine.deadlines = process.Deadlines(silence=6.0)  # not before: the first batch of an engine is slow
        lost = engine.process.pid
        os.kill(lost, signal.SIGSTOP)
        while len(done) < 12:
            done |= dict(fleet.step())
        assert fleet.restarts == 1 and engine.process.pid != lost and gone(lost)
        expected = fleet.generate(asked)
        for key, samples in done.items():
            for got, want in zip(samples, expected[key], strict=True):
                same = min(len(got.tokens), len(want.tokens), 8)  # later, rounding in another batch may turn a draw
                assert torch.equal(got.tokens[:same], want.tokens[:same])
                assert len(got.tokens) == 480 or got.tokens[-1] == EOS
        os.kill(engine.process.pid, signal.SIGKILL)  # a second time before a step was made
        with pytest.raises(EngineDied, match="exit code -9"):
            fleet.generate(asked)
    finally:
        engine.close()
    assert gone(engine.process.pid)


def train(workspace, run_dir, *overrides):
    return main(["train", str(workspace / "config.yaml"), f"run_dir={run_dir}", "rollout.engine=vllm", *overrides])


def test_a_run_trains_on_it_and_resumes(workspace, tmp_path):
    """Not to the same bits: what is decoded together depends on the clock, and rounding on what is decoded together."""
    assert train(workspace, tmp_path / "straight", "steps=3") == 0
    assert train(workspace, tmp_path / "resumed", "steps=2") == 0
    assert train(workspace, tmp_path / "resumed", "steps=3", "--resume") == 0
    straight, resumed = read_metrics(tmp_path / "straight"), read_metrics(tmp_path / "resumed")
    assert [record["step"] for record in resumed] == [0, 1, 2, 3]
    for one, two in zip(straight[1:], resumed[1:], strict=True):
        assert abs(one["mismatch_kl"]) < 1e-6 and one["mismatch_max"] < 1e-3 and one["skipped"] == 0
        assert two["outcome"] == pytest.approx(one["outcome"], abs=0.1)
    for path in ("straight", "resumed"):
        samples = [json.loads(line) for line in (tmp_path / path / "samples.jsonl").read_text().splitlines()]
        assert [sample["step"] for sample in samples] == [1, 1, 2, 2, 3, 3]
        assert len({sample["row"] for sample in samples}) == 6  # of one pass over the data, whether resumed or not


def test_two_ranks_of_two_engines_do_what_one_does(workspace, tmp_path):
    overrides = ["steps=1", "log.eval_every=0"]
    assert train(workspace, tmp_path / "one", *overrides) == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "prime_fast",
    ]
    command += [
        "train",
        str(workspace / "config.yaml"),
        f"run_dir={tmp_path / 'two'}",
        "rollout.engine=vllm",
        *overrides,
    ]
    result = processes.run(command)
    assert result.returncode == 0, result.stderr[-3000:]
    (one,), (two,) = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    # one rounded draw in the thousand may turn, in another batch
    for key, bound in (("outcome", 0.05), ("groups", 1), ("rows", 4), ("response_length", 0.5), ("rollouts", 8)):
        assert two[key] == pytest.approx(one[key], abs=bound), key
    assert two["policy_grad_norm"] == pytest.approx(one["policy_grad_norm"], rel=0.1)


def test_ctrl_c_leaves_no_process(workspace, tmp_path):
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from prime_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", str(workspace / "config.yaml"), f"run_dir={tmp_path / 'run'}"]
    run = processes.start([*command, "rollout.engine=vllm", "steps=1000"])
    try:
        deadline = time.monotonic() + 120
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and '"step": 1' in metrics.read_text()):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        engines = [pid for pid in escapes.descendants(run.pid) if b"rollout.server" in cmdline(pid)]
        assert len(engines) == 1
        run.send_signal(signal.SIGINT)
        assert run.wait(60) != 0
        assert gone(engines[0])
    finally:
        processes.end(run)


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize("found", ["0.24.0", "0.33.0", None])
def test_versions_outside_the_tested_range_are_refused(found, monkeypatch):
    def version(package):
        if package == "vllm" and found:
            return found
        raise engine_file.PackageNotFoundError

    monkeypatch.setattr(engine_file, "version", version)
    with pytest.raises(ValueError, match=rf"needs vLLM >= 0.25, < 0.33 and found {found or 'none'}: pip install"):
        engine_file.check_installed()


def test_a_model_without_attention_on_a_cpu_is_refused_in_one_sentence(workspace, tmp_path, capsys):
    config = json.loads((workspace / "model" / "config.json").read_text())
    path = tmp_path / "model"
    path.mkdir()
    for file in (workspace / "model").iterdir():
        (path / file.name).symlink_to(file)
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8, "num_key_value_heads": 8}))
    assert train(workspace, tmp_path / "run", f"model.policy={path}") == 2
    assert "no attention for heads of 16" in capsys.readouterr().err


def test_an_unknown_argument_is_refused_in_one_sentence(workspace, tmp_path, capsys):
    assert train(workspace, tmp_path / "run", "rollout.vllm={gpu_memory_utilisation: 0.3}") == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "rollout.vllm" in line]
    mistake = "rollout.vllm.gpu_memory_utilisation is no argument of this vLLM's LLM class"
    assert f"{mistake}; did you mean gpu_memory_utilization?" in sentence
    assert not (tmp_path / "run").exists()
