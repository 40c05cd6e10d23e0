"""A user's mistakes: one clear sentence, exit code 2, nothing written."""

import json
import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

import prime_fast
import prime_kernels
from prime_fast import cli, lock
from prime_fast.cli import main
from prime_fast.cli.words import config_of
from prime_fast.metrics import read_metrics

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def fails(workspace, tmp_path, capsys):
    def check(*overrides: str, command: str = "train") -> str:
        run_dir = tmp_path / "run"
        assert main([command, str(workspace / "config.yaml"), f"run_dir={run_dir}", *overrides]) == 2
        message = capsys.readouterr().err.strip()
        assert message.startswith("prime-fast: ") and "\n" not in message
        assert not run_dir.exists()
        return message

    return check


def rows_file(tmp_path, *rows) -> Path:
    path = tmp_path / "broken.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"prompt": [{"role": "user", "content": "1+1:"}], "reward_model": {"ground_truth": "2"}}


def test_config_mistakes(fails):
    assert "did you mean policy.lr?" in fails("policy.lrate=1")
    assert "set rollout.samples to 2 or more" in fails("rollout.samples=1")


def test_missing_files(fails, tmp_path):
    assert "nowhere.jsonl does not exist" in fails(f"data.train={tmp_path}/nowhere.jsonl")
    assert "no Hugging Face config at" in fails(f"model.policy={tmp_path}/nowhere")
    assert "data.train is empty" in fails("data.train=[]")
    assert "sft.data is empty" in fails("sft.data=[]", command="sft")


def test_broken_rows_are_numbered(fails, tmp_path):
    no_prompt = rows_file(tmp_path, GOOD, {"reward_model": {"ground_truth": "2"}})
    message = fails(f"data.train={no_prompt}")
    assert "row 2" in message and "prompt" in message
    no_truth = rows_file(tmp_path, GOOD, GOOD, {"prompt": GOOD["prompt"], "reward_model": {}})
    message = fails(f"data.train={no_truth}")
    assert "row 3" in message and "ground_truth" in message


def test_nothing_left_after_dropping_long_prompts(fails):
    message = fails("data.max_prompt=2")
    assert "raise data.max_prompt" in message


def test_longer_than_the_model(fails):
    message = fails("rollout.max_response=100000", "engine.micro_tokens=200000")
    assert "has room for" in message and "data.max_prompt + rollout.max_response" in message


def test_prm_of_another_vocabulary(fails, tmp_path):
    config = LlamaConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "prm")
    assert "has a vocabulary of 40, the policy one of 18" in fails(f"model.prm={tmp_path / 'prm'}")


def test_unusable_reward(fails, tmp_path):
    (tmp_path / "odd.py").write_text("def judge(text):\n    return 1.0\n")
    message = fails(f"reward.function={tmp_path}/odd.py:judge")
    assert "solution_str" in message and "completions" in message


def test_a_used_run_dir_is_left_alone(workspace, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("precious")
    assert main(["train", str(workspace / "config.yaml"), f"run_dir={run_dir}"]) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert (run_dir / "config.yaml").read_text() == "precious"


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_run_dir_is_trained_by_one_run_at_a_time(command, workspace, tmp_path, capsys, monkeypatch):
    """Both are given --resume, as a job that was queued twice is. One that was killed is waited for."""
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    run_dir = tmp_path / "run"
    words = [command, str(workspace / "config.yaml"), f"run_dir={run_dir}", "steps=1", "sft.steps=1", "--resume"]
    with lock.alone(run_dir):
        assert main(words) == 2
        told = f"{run_dir} is being trained by process {os.getpid()} on {socket.gethostname()}; wait for its end"
        assert told in capsys.readouterr().err
        assert [path.name for path in run_dir.iterdir()] == [lock.LOCK]
    monkeypatch.undo()
    first, taken, take = ExitStack(), [], lock._take
    first.enter_context(lock.alone(run_dir))

    def ends_then(file):
        taken.append(take(file))
        first.close()
        return taken[-1]

    monkeypatch.setattr(lock, "_take", ends_then)
    assert main(words) == 0 and taken == [False, True]


def test_a_lock_that_is_removed_is_made_anew(tmp_path, monkeypatch):
    """What ends without a result takes its run_dir away from under the one that waits for it."""
    run_dir, first, take = tmp_path / "run", ExitStack(), lock._take
    first.enter_context(lock.alone(run_dir))

    def ends_before(file):
        first.close()
        return take(file)

    monkeypatch.setattr(lock, "_take", ends_before)
    with lock.alone(run_dir):
        assert (run_dir / lock.LOCK).exists()
        (run_dir / "metrics.jsonl").touch()
    assert sorted(os.listdir(run_dir)) == [lock.LOCK, "metrics.jsonl"]


def test_resume_refuses_another_configuration(workspace, tmp_path, capsys):
    arguments = ["train", str(workspace / "config.yaml"), f"run_dir={tmp_path / 'run'}", "steps=1", "log.eval_every=0"]
    assert main(arguments) == 0
    assert main([*arguments, "prime.beta=0.1", "--resume"]) == 2
    assert "prime.beta was 0.05 and is 0.1" in capsys.readouterr().err


def test_report_of_nothing(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err


def test_dry_run_of_the_published_run_needs_no_gpu_and_no_download(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(CONFIGS.parent)
    config = str(CONFIGS / "eurus2-7b-8xa100.yaml")
    command = ["train", config, "model.policy=configs/shapes/qwen2.5-math-7b", "--dry-run"]
    assert main([*command, "--ranks", "8"]) == 0
    output = capsys.readouterr().out
    assert "7.616 B" in output and "152064" in output
    assert "4 optimizer steps" in output and "256 prompts x 4 samples" in output
    assert main([*command, "--ranks", "8", "--gpu", "a100-80"]) == 0
    assert main([*command, "--ranks", "8", "--gpu", "40"]) == 1  # does not fit
    assert main([*command, "--gpu", "v100"]) == 2
    assert "give one of a100-40, a100-80, h100, h200, or a number of GiB" in capsys.readouterr().err
    assert main([*command[:-1], "--gpu", "h100"]) == 2  # not a dry run
    capsys.readouterr()
    assert main([*command, "--response-tokens", "900"]) == 2
    assert "--response-tokens is for the seconds that a dry run predicts of a card" in capsys.readouterr().err
    assert main([*command, "--ranks", "8", "--gpu", "h200", "--rates", "nowhere"]) == 2
    assert main([*command, "--ranks", "8", "--gpu", "h200", "--response-tokens", "900"]) == 0
    assert "responses of 900 tokens" in capsys.readouterr().out


def test_sft_lowers_the_loss_and_writes_a_model(workspace, tmp_path, capsys):
    run_dir = tmp_path / "sft"
    overrides = ["sft.steps=8", "sft.mini_batch=16", "sft.lr=3e-3"]
    assert main(["sft", str(workspace / "config.yaml"), f"run_dir={run_dir}", *overrides]) == 0
    losses = [record["loss"] for record in read_metrics(run_dir)]
    assert len(losses) == 8 and losses[-1] < losses[0]
    AutoModelForCausalLM.from_pretrained(run_dir / "model")


@pytest.fixture
def scored(tmp_path, capsys):
    """prime-fast score on three rows: (outcomes, or None after a mistake; what was printed)."""
    rows = rows_file(tmp_path, *({"question": f"1+{i}?", "answer": str(i + 1)} for i in range(3)))

    def run(*given, **options: str):
        responses = tmp_path / "responses.jsonl"
        responses.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in given))
        out = tmp_path / "outcomes.jsonl"
        more = [part for name, value in options.items() for part in (f"--{name}", value)]
        code = main(["score", str(rows), "--responses", str(responses), "--out", str(out), "--workers", "1", *more])
        printed = capsys.readouterr()
        outcomes = [json.loads(line)["outcome"] for line in out.read_text().splitlines()] if code == 0 else None
        return outcomes, printed.out + printed.err

    return run


def test_score(scored, tmp_path):
    outcomes, printed = scored({"response": r"\boxed{1}"}, {"responses": ["3", "The answer is 2."]}, ["\\boxed{3}"])
    assert outcomes == [1.0, 0.0, 1.0, 1.0]
    assert "4 responses" in printed and "(openrlhf)" in printed and "mean outcome 0.7500" in printed
    (tmp_path / "own.py").write_text("def reward(completions, question, **rest):\n    return [len(question[0]) / 8]\n")
    assert scored(["a", "b"], '"c"\n', ["d"], reward=f"{tmp_path}/own.py:reward")[0] == [0.5] * 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([["1"], ["2"]], "differ in length: only one has a row 3"),
        ([["1"]] * 4, "differ in length: only one has a row 4"),
        ([["1"], "{\n"], "line 2 is not JSON"),
        ([["1"], {"text": "2"}], "line 2 has no response"),
        ([["1"], []], "line 2 has no response"),
    ],
)
def test_score_mistakes(scored, given, message):
    outcomes, printed = scored(*given)
    assert outcomes is None and message in printed


def test_eval(workspace, tmp_path, capsys):
    model = str(workspace / "model")
    arguments = ["eval", model, "--data", str(workspace / "rows.jsonl"), "--limit", "6", "--out", str(tmp_path / "out")]
    arguments += ["--reward", f"{workspace}/reward.py:compute_score", "--max-response", "8"]
    arguments += ["--samples", "4", "--prm", model, "--reference", model]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for part in ("greedy pass@1", "avg@4", "pass@4", "majority vote", "oracle", "eval.png"):
        assert part in printed
    assert main([*arguments, "--seed", "1"]) == 2
    assert "holds an evaluation with seed 0, now it is 1" in capsys.readouterr().err
    assert main([*arguments, "--against", str(tmp_path / "out")]) == 0
    assert "only this" in capsys.readouterr().out
    for words, message in (
        (["max_num_seqs=4"], "add --engine vllm"),
        (["max_num_seqs"], "is not of the form key=value"),
    ):
        assert main([*arguments, "--vllm", *words]) == 2
        assert message in capsys.readouterr().err
    assert main([*arguments, "--template", "raw"]) == 2
    assert "holds an evaluation with template ['auto', {}], now it is ['raw', {}]" in capsys.readouterr().err
    assert main([*arguments, "--template-args", '{"enable_thinking": false}']) == 2
    assert "sets enable_thinking, unknown to the chat template" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--template-args", "no"])
    assert "no is no JSON object such as" in capsys.readouterr().err
    for option in ("--samples", "--limit", "--batch"):
        with pytest.raises(SystemExit):
            main([*arguments, option, "0"])
        assert "0 is not a positive number" in capsys.readouterr().err


ORDERS = [
    "CONFIG --dry-run --ranks 8 steps=3 seed=1",  # what Python 3.11 refused
    "CONFIG steps=3 --dry-run seed=1 --ranks=8",
    "--dry-run CONFIG --ranks 8 steps=3 seed=1",
    "--ranks 8 --dry-run CONFIG steps=3 seed=1",
    "steps=3 --dry-run CONFIG --ranks 8 seed=1",
    "steps=3 seed=1 --dry-run --ranks 8 CONFIG",
]


@pytest.mark.parametrize("order", ORDERS)
def test_words_and_options_come_in_any_order(order, workspace):
    options = cli.parser().parse_args(["train", *order.replace("CONFIG", str(workspace / "config.yaml")).split()])
    config = config_of(options)
    assert (config.steps, config.seed, options.ranks, options.dry_run) == (3, 1, 8, True)


def test_a_later_override_wins_across_options(workspace):
    words = ["train", "steps=3", str(workspace / "config.yaml"), "--dry-run", "steps=4"]
    assert config_of(cli.parser().parse_args(words)).steps == 4


def test_runs_on_both_sides_of_an_option(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--out", "x.png", str(tmp_path / "other")]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train CONFIG --dryrun steps=3", "unknown option --dryrun; did you mean --dry-run?"),
        ("train --resum3=yes CONFIG", "unknown option --resum3; did you mean --resume?"),
        ("sft CONFIG -x", "unknown option -x"),
        ("eval MODEL --dta rows.jsonl", "unknown option --dta; did you mean --data?"),
        ("eval MODEL --data rows.jsonl --temperature -1 --sample=4 --zzz", "unknown option --zzz"),
        ("score rows.jsonl stray --responses r.jsonl", "unrecognized arguments: stray"),
        ("doctor --jsn", "unknown option --jsn; did you mean --json?"),
    ],
)
def test_unknown_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments.split())
    assert exit.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith(f"error: {message}")


def test_train_without_a_config(capsys):
    assert main(["train", "steps=3", "--dry-run"]) == 2
    assert "steps=3 is no CONFIG" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"prime-fast {prime_kernels.__version__}\n"
    assert prime_fast.__version__ == prime_kernels.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = prime_fast.nothing
