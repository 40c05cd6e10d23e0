import io
import json
import os
import shutil
from dataclasses import replace

import processes
import pytest
import torch
from engines import needs_vllm
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from prime_fast.config import EngineConfig, ModelConfig
from prime_fast.engine.writing import export
from prime_fast.engine.zero import Engine
from prime_fast.evaluation.evaluate import evaluate, find_model
from prime_fast.evaluation.settings import Settings, max_tokens
from prime_fast.evaluation.summary import AVERAGE

QUIET = Console(quiet=True)


@pytest.fixture
def asked(workspace, tmp_path):
    rows = (workspace / "rows.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("one", rows[:7]), ("two", rows[7:20])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    return Settings(
        model=str(workspace / "model"),
        data=(str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")),
        out=tmp_path / "out",
        max_response=12,
        reward=f"{workspace}/reward.py:compute_score",
        batch=8,
    )


@pytest.fixture
def with_prm(asked):
    return replace(asked, samples=4, prm=asked.model, reference=asked.model)


def lines(path):
    return path.read_text().splitlines()


def test_greedy(asked):
    summary = evaluate(asked, QUIET)
    assert {name: row["problems"] for name, row in summary.items()} == {"one": 7, "two": 13, AVERAGE: 20}
    records = [json.loads(line) for line in lines(asked.out / "greedy.jsonl")]
    assert sorted(record["problem"] for record in records) == list(range(20))
    solved = {name: [r["outcomes"][0] for r in records if r["benchmark"] == name] for name in ("one", "two")}
    for name, outcomes in solved.items():
        value, low, high = summary[name]["greedy"]
        assert value == pytest.approx(sum(outcomes) / len(outcomes)) and low < value < high
    assert summary[AVERAGE]["greedy"].value == pytest.approx(
        (summary["one"]["greedy"][0] + summary["two"]["greedy"][0]) / 2
    )
    for record in records:
        (text,), (tokens,), (outcome,) = record["responses"], record["tokens"], record["outcomes"]
        assert len(tokens) <= 12 and outcome == float(sum(map(ord, text)) % 3 == 0)
    assert json.loads((asked.out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (asked.out / "eval.png").stat().st_size > 10_000


def test_samples_and_prm(with_prm):
    summary = evaluate(with_prm, QUIET)
    row = summary["two"]
    samples = [json.loads(line) for line in lines(with_prm.out / "samples.jsonl")]
    outcomes = [record["outcomes"] for record in samples if record["benchmark"] == "two"]
    assert row["avg"].value == pytest.approx(sum(map(sum, outcomes)) / (4 * len(outcomes)))
    assert row["pass"][4].value == pytest.approx(sum(any(group) for group in outcomes) / len(outcomes))
    assert list(row["pass"]) == [1, 2, 4] and row["pass"][1].value == pytest.approx(row["avg"].value)
    assert len({text for record in samples for text in record["responses"]}) > 20
    best = row["best_of"]
    assert all(best[method][1].value == pytest.approx(row["avg"].value) for method in best)
    # a PRM equal to its reference scores everything 0.0: its choice is a random one
    assert all(best["prm"][n].value == pytest.approx(row["avg"].value) for n in (1, 2, 4))
    gain = row["prm_minus"]["random"]
    assert gain.value == pytest.approx(0, abs=1e-12) and gain.low == pytest.approx(-gain.high) and gain.high < 0.2
    scores = [json.loads(line)["scores"] for line in lines(with_prm.out / "prm.jsonl")]
    assert scores == [[0.0] * 4] * 20


def test_a_killed_evaluation_continues(with_prm):
    first = evaluate(with_prm, QUIET)
    whole = {name: (with_prm.out / f"{name}.jsonl").read_bytes() for name in ("greedy", "samples", "prm", "votes")}
    cut = {"greedy": len(whole["greedy"]), "samples": len(whole["samples"]) // 2, "prm": 10, "votes": 10}
    for name, size in cut.items():
        os.truncate(with_prm.out / f"{name}.jsonl", size)
    assert evaluate(with_prm, QUIET) == first
    assert (with_prm.out / "greedy.jsonl").read_bytes() == whole["greedy"]
    kept = whole["samples"][: cut["samples"]].rpartition(b"\n")[0]
    again = (with_prm.out / "samples.jsonl").read_bytes()
    assert again.startswith(kept + b"\n") and sorted(again.splitlines()) == sorted(whole["samples"].splitlines())
    assert evaluate(replace(with_prm, batch=3), QUIET) == first  # not part of the question


def test_samples_and_prm_may_come_later(asked, with_prm):
    greedy = evaluate(asked, QUIET)
    with_samples = evaluate(replace(asked, samples=4), QUIET)
    assert with_samples["one"]["greedy"] == greedy["one"]["greedy"] and "best_of" not in with_samples["one"]
    assert evaluate(with_prm, QUIET)["one"]["avg"] == with_samples["one"]["avg"]


def test_another_question_is_refused(asked, workspace, tmp_path):
    evaluate(replace(asked, samples=2), QUIET)
    for change in ({"max_response": 11}, {"limit": 3}, {"samples": 3}, {"temperature": 0.5, "samples": 2}, {"seed": 1}):
        key = next(iter(change)).replace("temperature", "samples")
        with pytest.raises(
            ValueError, match=rf"holds an evaluation with {key} .*; put it back, or choose another --out"
        ):
            evaluate(replace(asked, **change), QUIET)
    os.utime(asked.data[0], (1, 1))
    with pytest.raises(ValueError, match="holds an evaluation with data"):
        evaluate(asked, QUIET)


def test_replaced_weights_are_refused(asked, tmp_path):
    shutil.copytree(asked.model, tmp_path / "model")
    copy = replace(asked, model=str(tmp_path / "model"))
    evaluate(copy, QUIET)
    os.utime(tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="holds an evaluation with model"):
        evaluate(copy, QUIET)


def test_data_sources_of_a_file_are_apart(asked, tmp_path):
    rows = [json.loads(line) for line in lines(tmp_path / "one.jsonl")]
    for row, source in zip(rows, "aabbbcc", strict=True):
        row["data_source"] = source
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = evaluate(replace(asked, data=asked.data[:1], limit=5), QUIET)
    assert {name: row["problems"] for name, row in summary.items()} == {"one/a": 2, "one/b": 3, AVERAGE: 5}


def test_files_of_one_name_are_apart(asked, tmp_path):
    (tmp_path / "other").mkdir()
    paths = asked.data[0], shutil.copy(asked.data[0], tmp_path / "other" / "one.jsonl")
    summary = evaluate(replace(asked, data=tuple(map(str, paths)), limit=2), QUIET)
    assert list(summary) == [*map(str, paths), AVERAGE]


def test_models_of_a_run(workspace, tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step-000002"
    for role in ("policy", "prm"):
        shutil.copytree(workspace / "model", step / role)
    (step.parent / "latest").write_text(step.name)
    for place in (tmp_path / "run", step):
        assert find_model(str(place), "policy") == str(step / "policy")
        assert find_model(str(place), "prm") == str(step / "prm")
    assert find_model(str(step / "policy"), "policy") == str(step / "policy")
    assert find_model("org/name", "policy") == "org/name"


def test_the_paper_s_settings(asked):
    paper = replace(asked, preset="paper", max_response=None)
    budgets = {
        name: max_tokens(paper, name) for name in ("aime24", "amc", "math500", "HuggingFaceH4/MATH-500", "leetcode")
    }
    assert list(budgets.values()) == [4096, 4096, 8192, 8192, 8192]
    assert max_tokens(replace(paper, max_response=100), "math500") == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prm": "x"}, "--prm and --reference belong together"),
        ({"prm": "x", "reference": "x"}, "set --samples to 2 or more"),
        ({"samples": 2, "temperature": 0.0}, "samples need more than 0"),
        ({"vllm": {"max_num_seqs": 4}}, "--vllm max_num_seqs=... is for vLLM; add --engine vllm"),
        ({"against": "/nowhere"}, "no tokenizer at '/nowhere'"),
        ({"model": "/nowhere"}, "no tokenizer at '/nowhere'"),
    ],
)
def test_mistakes(asked, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(replace(asked, **change), QUIET)
    assert not asked.out.exists()


@pytest.fixture
def long_rows(tmp_path):
    """Prompts of 98, 440, 506 and 600 tokens; the model has room for 512."""
    path = tmp_path / "long.jsonl"
    rows = [
        {"prompt": [{"role": "user", "content": "1+" * (size // 2)}], "reward_model": {"ground_truth": "1"}}
        for size in (98, 440, 506, 600)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_without_room_are_clamped_and_counted(with_prm, long_rows, tmp_path):
    asked = replace(with_prm, data=(long_rows,), max_response=100, samples=2)
    console = Console(record=True, width=200, file=io.StringIO())
    summary = evaluate(asked, console)
    assert summary["long"]["problems"] == 4 and summary["long"]["clamped"] == 3
    assert "long: 3 problems leave less room than asked for" in console.export_text()
    for name, count in (("greedy", 1), ("samples", 2)):
        records = {r["problem"]: r for r in map(json.loads, lines(asked.out / f"{name}.jsonl"))}
        budgets = [100, 64, 6, 0]
        for i, budget in enumerate(budgets):
            lengths = [len(tokens) for tokens in records[i]["tokens"]]
            assert len(lengths) == count and max(lengths) <= budget
            assert all(length == budget for cut, length in zip(records[i]["truncated"], lengths, strict=True) if cut)
        assert records[3]["outcomes"] == [0.0] * count and all(records[3]["truncated"])


def test_the_paper_s_preset_on_a_model_of_less_room(asked):
    summary = evaluate(replace(asked, preset="paper", max_response=None, data=asked.data[:1], limit=2), QUIET)
    assert summary["one"]["clamped"] == summary["one"]["problems"] == 2
    longest = max(len(json.loads(line)["tokens"][0]) for line in lines(asked.out / "greedy.jsonl"))
    assert 12 < longest <= 512


@pytest.fixture
def other_model(asked, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(asked.model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    shutil.copytree(asked.model, tmp_path / "other")
    lm.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_against_another_model(asked, other_model):
    console = Console(record=True, width=200, file=io.StringIO())
    asked = replace(asked, samples=4, max_response=12)
    ours = evaluate(replace(asked, against=other_model), console)
    result = json.loads((asked.out / "against.json").read_text())
    out = next((asked.out / "against").iterdir())
    theirs = json.loads((out / "summary.json").read_text())
    solved = {}
    for name, place in (("ours", asked.out), ("theirs", out)):
        records = map(json.loads, lines(place / "greedy.jsonl"))
        solved[name] = {r["problem"]: r["outcomes"][0] for r in records}
    pairs = [(solved["ours"][i], solved["theirs"][i]) for i in range(20)]
    assert len(set(pairs)) > 1  # the models differ
    for name, part in (("one", pairs[:7]), ("two", pairs[7:])):
        assert result[name]["only_ours"] == sum(a > b for a, b in part)
        assert result[name]["only_theirs"] == sum(a < b for a, b in part)
    for name, row in result.items():
        value, low, high = row["greedy"]
        assert row["accuracy"] == pytest.approx(ours[name]["greedy"].value)
        assert row["against"] == pytest.approx(theirs[name]["greedy"][0])
        assert value == pytest.approx(row["accuracy"] - row["against"]) and low < value < high
        for key in ("1", "2", "4"):
            difference = ours[name]["pass"][int(key)].value - theirs[name]["pass"][key][0]
            assert row["pass"][key][0] == pytest.approx(difference)
        assert row["avg"][0] == pytest.approx(row["pass"]["1"][0])
    assert "only this" in console.export_text()
    mirrored = replace(asked, model=other_model, out=out, against=str(asked.out))  # both evaluations are on disk
    evaluate(mirrored, QUIET)
    back = json.loads((out / "against.json").read_text())[AVERAGE]["greedy"]
    assert back == pytest.approx([-x for x in (result[AVERAGE]["greedy"][k] for k in (0, 2, 1))])


def test_only_the_same_questions_are_compared(asked, tmp_path):
    evaluate(asked, QUIET)
    other = replace(asked, out=tmp_path / "second", against=str(asked.out))
    with pytest.raises(ValueError, match="was evaluated with max_response 12, now it is 11; only evaluations made"):
        evaluate(replace(other, max_response=11), QUIET)
    with pytest.raises(
        ValueError, match="are of 14 and 20 problems that are not the same; evaluate both with the same"
    ):
        evaluate(replace(other, limit=7), QUIET)


def test_two_processes_share_the_problems(with_prm, workspace, tmp_path):
    """They answer as one does, and take over what an evaluation killed on three left behind."""
    alone = evaluate(with_prm, QUIET)
    out = tmp_path / "shared"
    shutil.copytree(with_prm.out, out)
    for name in ("summary.json", "eval.png", "prm.jsonl", "votes.jsonl", "samples.jsonl"):
        (out / name).unlink()
    greedy = (out / "greedy.jsonl").read_bytes().splitlines(keepends=True)
    (out / "greedy.jsonl").write_bytes(b"".join(greedy[:3]) + greedy[3][:20])
    (out / "greedy.1.jsonl").write_bytes(b"".join(greedy[2:6]))  # one of them twice
    (out / "greedy.2.jsonl").write_bytes(greedy[6] + greedy[7][:9])
    command = ["eval", with_prm.model, "--data", *with_prm.data, "--out", out, "--samples", "4"]
    command += ["--max-response", "12", "--reward", with_prm.reward, "--prm", with_prm.prm, "--batch", "8"]
    result = processes.torchrun(2, "-m", "prime_fast", *command, "--reference", with_prm.reference)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "13/13" not in result.stdout and "7/7" in result.stdout  # 13 greedy ones were missing: 7 and 6
    assert result.stdout.count("greedy pass@1") == 1
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(alone))
    for name in ("greedy", "samples", "prm", "votes"):
        assert sorted(lines(out / f"{name}.jsonl")) == sorted(lines(with_prm.out / f"{name}.jsonl"))
        assert not list(out.glob(f"{name}.*.jsonl"))


def test_vllm_takes_its_options_and_long_rows_of_a_model_that_the_engine_wrote(asked, long_rows, tmp_path, device):
    """As into a checkpoint."""
    needs_vllm()
    engine = Engine("policy", asked.model, ModelConfig(policy=asked.model), EngineConfig(), None, device)
    export(engine, AutoTokenizer.from_pretrained(asked.model), tmp_path / "policy")
    model = str(tmp_path / "policy")
    settings = replace(asked, model=model, engine="vllm", vllm={"max_num_seqs": 2}, data=(long_rows,), max_response=20)
    assert evaluate(settings, QUIET)["long"]["clamped"] == 2
    again = replace(settings, vllm={"max_num_seqs": 3})  # says how, not what
    assert evaluate(again, QUIET)["long"]["problems"] == 4
    with pytest.raises(ValueError, match="holds an evaluation with vllm None, now it is {'quantization': 'fp8'}"):
        evaluate(replace(settings, vllm={"quantization": "fp8"}), QUIET)
