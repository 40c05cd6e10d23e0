"""An offline PRM: what a run leaves, that it resumes to the same bits, that reference log-probs are kept, and DPO."""

import json
import random
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
from transformers import AutoModelForCausalLM

from prime_fast.cli import main
from prime_fast.engine import checkpoint
from prime_fast.metrics import read_metrics
from prime_fast.stages import prm, rollouts

VOLATILE = ("seconds", "tokens_per_second", "peak_memory_gib")
OPTIONS = ["prm.lr=1e-3", "prm.mini_batch=24", "log.eval_every=4", "log.checkpoint_every=3", "data.eval_rows=40"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Responses that are good if they begin with a small digit."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    with path.open("w") as file:
        for _ in range(24):
            prompt = "".join(rng.choice("0123456789+-*") for _ in range(rng.randint(3, 8))) + ":"
            texts = ["".join(rng.choice("0123456789=,") for _ in range(rng.randint(1, 9))) for _ in range(4)]
            row = {"prompt": [{"role": "user", "content": prompt}], "responses": texts}
            file.write(json.dumps(row | {"label": [float(text[0] in "01234") for text in texts]}) + "\n")
    return path


@pytest.fixture(scope="module")
def command(workspace, labelled):
    def make(run_dir, *more):
        words = [str(workspace / "config.yaml"), f"run_dir={run_dir}", f"offline.data={labelled}"]
        return ["prm", *words, f"offline.eval={labelled}", *OPTIONS, *more]

    return make


@pytest.fixture(scope="module")
def straight(command, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("prm") / "run"
    assert main(command(run_dir, "offline.epochs=2")) == 0
    return run_dir, read_metrics(run_dir)


def stable(records):
    return [{key: value for key, value in record.items() if key not in VOLATILE} for record in records]


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def test_a_run_leaves_what_it_promises(straight, workspace):
    run_dir, records = straight
    assert [record["step"] for record in records] == list(range(9))  # 2 epochs of 96 rows
    judged = {record["step"]: record for record in records if "eval_auc" in record}
    assert list(judged) == [0, 4, 8]
    assert judged[0]["eval_loss"] == pytest.approx(np.log(2)) and judged[0]["eval_auc"] == 0.5  # PRM is reference
    assert judged[8]["eval_auc"] > 0.75 < judged[8]["eval_pair_accuracy"] and judged[8]["eval_loss"] < np.log(2)
    report = json.loads((run_dir / "report" / "prm.json").read_text())
    assert report["auc"] == judged[8]["eval_auc"] and report["responses"] == sum(
        b["responses"] for b in report["calibration"]
    )
    assert (run_dir / "report" / "calibration.png").stat().st_size > 10_000
    card = (run_dir / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and f"| AUC | {report['auc']:.3f} |" in card
    assert f"| reference | {workspace / 'model'} |" in card
    last = weights(checkpoint.latest(run_dir) / "prm")
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights(run_dir / "model").items())


def test_an_adapter_is_what_trains(command, workspace, tmp_path):
    run = tmp_path / "run"
    lora = ["prm.lora.rank=4", "prm.lora.targets=[q_proj, v_proj]", "prm.lr=2e-2"]
    assert main(command(run, "offline.epochs=1", *lora)) == 0
    first, *_, last = read_metrics(run)
    assert first["eval_loss"] == pytest.approx(np.log(2)) and last["eval_loss"] < first["eval_loss"]
    before, after = weights(workspace / "model"), weights(run / "model")
    changed = {name.split(".")[-2] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"q_proj", "v_proj"}
    assert json.loads((run / "model/adapter/adapter_config.json").read_text())["r"] == 4


def test_a_run_resumes_to_the_same_bits_and_keeps_the_reference(straight, command, tmp_path, capsys):
    run_dir, records = straight
    half = tmp_path / "run"
    assert main(command(half, "offline.epochs=1")) == 0
    kept = half / "reference" / "logprobs.f32"
    before = kept.stat()
    assert main(command(half, "offline.epochs=2", "prm.lr=1", "--resume")) == 2
    assert "prm.lr was 0.001 and is 1" in capsys.readouterr().err
    assert main(command(half, "offline.epochs=2", "--resume")) == 0
    assert kept.stat().st_mtime_ns == before.st_mtime_ns
    assert stable(read_metrics(half)) == stable(records)
    expected, got = weights(run_dir / "model"), weights(half / "model")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert main(["sft", *command(half)[1:], f"sft.data={half}", "--resume"]) == 2


def test_reference_logprobs(straight, configure, labelled, workspace, other_prm, device, tmp_path, monkeypatch):
    """They are those of a plain forward; a kill loses a chunk at most; another reference gets its own."""
    from prime_fast.stages import reference

    monkeypatch.setattr(reference, "MICRO_BATCHES", 1)
    config = configure(f"offline.data={labelled}", "offline.epochs=1")
    inputs = prm.load_inputs(config)
    path, place = str(workspace / "model"), tmp_path / "run" / "reference"

    def made(model, identity):
        (found,) = reference.reference_logprobs(config, model, identity, [inputs.rows], device)
        return np.array(found)

    whole = made(path, "a")
    lm, start = AutoModelForCausalLM.from_pretrained(path), 0
    for i in range(5):
        row = inputs.rows.rows[i]
        ids, count = torch.tensor([row["prompt_ids"] + row["response_ids"]]), len(row["response_ids"])
        with torch.no_grad():
            expected = lm(input_ids=ids).logits[0, -count - 1 : -1].log_softmax(-1).gather(1, ids[0, -count:, None])
        np.testing.assert_allclose(whole[start : start + count], expected[:, 0], atol=1e-5)
        start += count
    note = json.loads((place / "about.json").read_text())
    done = 20
    (place / "about.json").write_text(json.dumps(note | {"done": done}))
    left = int(inputs.rows.tokens[:done].sum())
    spoilt = np.fromfile(place / "logprobs.f32", np.float32)
    spoilt[left:] = 0.0
    spoilt[: left - 1] += 1.0  # what was done is not made again
    spoilt.tofile(place / "logprobs.f32")
    again = made(path, "a")
    np.testing.assert_array_equal(again[left:], whole[left:])
    np.testing.assert_array_equal(again[: left - 1], whole[: left - 1] + 1.0)
    other = made(other_prm.partition("=")[2], "b")
    assert np.abs(other - whole).max() > 0.01


def test_dpo_is_the_gradient_of_its_pairs(configure, labelled, other_prm, device, tmp_path):
    """The update's loss and gradient, against the whole model in float64 and autograd through every pair."""
    config = configure(f"offline.data={labelled}", "prm.loss=dpo", "prm.mini_batch=12", "prime.beta=0.3", other_prm)
    trainer = prm.Prm(config, device, prm.load_inputs(config))
    try:
        units = prm.PromptSampler(len(trainer.units), config.seed).take(trainer.per_step)
        rows = [row for unit in units for row in trainer.units[unit]]
        models = [AutoModelForCausalLM.from_pretrained(p).double() for p in (config.model.prm, config.model.policy)]
        scores = []
        for i in rows:
            row = trainer.rows.rows[i]
            ids, count = torch.tensor([row["prompt_ids"] + row["response_ids"]]), len(row["response_ids"])
            ours, theirs = (
                m(input_ids=ids).logits[0, -count - 1 : -1].log_softmax(-1).gather(1, ids[0, -count:, None]).sum()
                for m in models
            )
            scores.append(0.3 * (ours - theirs.detach()))
        label, group = trainer.rows.label[rows], trainer.rows.group[rows]
        pairs = [
            (i, j) for i in range(len(rows)) for j in range(len(rows)) if group[i] == group[j] and label[i] > label[j]
        ]
        loss = sum(-torch.nn.functional.logsigmoid(scores[i] - scores[j]) for i, j in pairs) / len(pairs)
        loss.backward()
        expected = torch.stack([p.grad.norm() for p in models[0].parameters()]).norm()
        record = trainer.step(1)
        assert len(pairs) > 6 and record["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(float(expected), rel=1e-4)
    finally:
        trainer.close()


def test_the_prefix_loss_learns(command, tmp_path):
    assert main(command(tmp_path / "run", "prm.loss=prefix", "offline.epochs=2", "log.checkpoint_every=0")) == 0
    *_, last = read_metrics(tmp_path / "run")
    assert last["eval_auc"] > 0.7


def test_dpo_learns_the_same_on_two_ranks(command, tmp_path):
    """Pairs lie on different ranks; scores, losses and gradients are shared."""
    words = ["prm.loss=dpo", "log.checkpoint_every=0"]
    assert main(command(tmp_path / "one", *words)) == 0
    result = processes.torchrun(2, "-m", "prime_fast", *command(tmp_path / "two", *words))
    assert result.returncode == 0, result.stderr
    one, two = (read_metrics(tmp_path / run) for run in ("one", "two"))
    assert one[-1]["eval_pair_accuracy"] > 0.7
    for ours, theirs in zip(one, two, strict=True):
        for key in ours.keys() & {"loss", "grad_norm", "eval_loss"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4)


def test_what_is_asked_of_the_rows(command, tmp_path, capsys, workspace):
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps({"prompt": [{"role": "user", "content": "1:"}], "response": "2", "label": 1}) + "\n")
    assert main(command(tmp_path / "run", "prm.loss=dpo", f"offline.data={alone}")) == 2
    assert "offline.data has no prompt with a better and a worse response" in capsys.readouterr().err
    assert main(command(tmp_path / "run", "offline.data=[]")) == 2
    assert "offline.data is empty" in capsys.readouterr().err
    assert main(["train", str(workspace / "config.yaml"), "prm.loss=dpo"]) == 2
    assert "prm.loss=dpo is for prime-fast prm" in capsys.readouterr().err


def test_rollouts_take_the_place_of_the_responses_of_a_row():
    """Which a PRM would else be trained on, as they come first."""
    had = {"chosen": "2", "rejected": "3", "completions": ["4"], "correctness": [True], "step_labels": [1], "id": 7}
    problem = SimpleNamespace(row={"prompt": [{"role": "user", "content": "1+1:"}]} | had)
    row = rollouts._row(problem, {"responses": ["5", "", "6"], "outcomes": [0.0, 0.0, 1.0], "truncated": [0, 0, 1]})
    assert row.pop("id") == 7 and row.pop("prompt") == problem.row["prompt"]
    assert row == {"responses": ["5", "6"], "label": [0.0, 1.0], "truncated": [0, 1]}


def test_killed_rollouts_end_with_the_same_file(workspace, tmp_path, monkeypatch, capsys):
    from prime_fast.evaluation import outputs

    def words(out):
        common = [
            "--samples",
            "3",
            "--max-response",
            "9",
            "--batch",
            "12",
            "--reward",
            f"{workspace}/reward.py:compute_score",
        ]
        return ["rollouts", f"{workspace}/model", "--data", f"{workspace}/rows.jsonl", *common, "--out", str(out)]

    assert main(words(tmp_path / "whole")) == 0
    append, calls = outputs.append, []

    def killed(path, records):
        calls.append(path)
        if len(calls) == 3:
            with path.open("a") as file:
                file.write('{"problem": 7, "resp')
            raise KeyboardInterrupt
        append(path, records)

    monkeypatch.setattr(outputs, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        main(words(tmp_path / "killed"))
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "rollouts.jsonl").exists()
    done = (tmp_path / "killed" / "samples.jsonl").read_bytes().count(b"\n")
    assert 0 < done < 40
    assert main(words(tmp_path / "killed")) == 0
    whole = (tmp_path / "whole" / "rollouts.jsonl").read_bytes()
    assert (tmp_path / "killed" / "rollouts.jsonl").read_bytes() == whole
    rows = [json.loads(line) for line in whole.splitlines()]
    source = [json.loads(line) for line in (workspace / "rows.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in source[0]} for row in rows] == source  # in their order, all columns
    assert main([*words(tmp_path / "killed"), "--samples", "4"]) == 2
    assert "holds an evaluation with samples [3, 1.0], now it is [4, 1.0]" in capsys.readouterr().err
    config = [f"{workspace}/config.yaml", f"run_dir={tmp_path}/run", f"offline.data={tmp_path}/whole/rollouts.jsonl"]
    assert main(["prm", *config, "prm.mini_batch=60"]) == 0  # what they are for
