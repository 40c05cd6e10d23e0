"""What a run keeps of single tokens: the numbers that the step was made with, of two groups."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prime_fast import preflight, token_log
from prime_fast.calibration import Fit
from prime_fast.config import PrimeConfig
from prime_fast.credit import Credit
from prime_fast.engine.batch import Batch, Group, Sample
from prime_fast.trainer import Trainer
from prime_fast.views.show.record import parsed

ALL = ["rollout.prompts=2", "rollout.keep=[0, 1]", "rollout.max_rounds=1"]  # two groups a step, so that both are kept


def step(config, device, slope: float = 0.0) -> tuple[dict, list[dict], Path]:
    """The metrics of the second step, and what was kept of it. slope: of the PRM's calibration as it begins."""
    Path(config.run_dir).mkdir()
    trainer = Trainer(config, device, preflight.load_inputs(config))
    trainer.step(1)
    trainer.learner.credit.fit = Fit(slope=slope, mean=0.4)
    record = trainer.step(2)
    trainer.close()
    lines = Path(config.run_dir, "tokens.jsonl").read_text().splitlines()
    found = [parsed(line, "line") for line in lines]
    assert [kept["step"] for kept in found] == [1] * 8 + [2] * 8
    assert all(len(set(kept.get("value", [0]))) == 1 for kept in found[:8])  # nothing was known of the PRM yet
    return record, found[8:], Path(config.run_dir)


def test_the_sums_are_those_of_the_metrics(configure, other_prm, device):
    settings = ["prime.credit=pav", "prime.gate=none", "prime.segment=step", "prime.separators='[0-4]'"]
    record, kept, run_dir = step(configure(*ALL, *settings, other_prm), device, slope=3.0)
    rewards = [reward for response in kept for reward in response["reward"]]
    assert sum(rewards) / len(rewards) == pytest.approx(record["process_reward_mean"], abs=1e-5) and any(rewards)
    right = [(sum(response["reward"]) > 0) == (response["outcome"] > 0.5) for response in kept]
    assert sum(right) / len(right) == record["prm_accuracy"]
    advantages = torch.tensor([a for response in kept for a in response["advantage"]])
    assert abs(advantages.mean()) < 1e-3 and abs(advantages.std() - 1) < 1e-3  # whitened, over all of the batch
    for response in kept:
        ends = [end for _, end in response["steps"]]
        assert all(any(digit in response["pieces"][end - 1] for digit in "01234") for end in ends[:-1])
        assert [len(set(response["advantage"][a:b])) for a, b in response["steps"]] == [1] * len(ends)
        others = [other["outcome"] for other in kept if other["group"] == response["group"] and other is not response]
        before = torch.tensor((sum(others) + 0.4) / (len(others) + 1))  # a pseudo-response of the mean outcome
        after = torch.sigmoid(before.logit() + 3 * sum(response["reward"])).item()
        assert response["value"][-1] == pytest.approx(after, abs=1e-3)
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    found = {
        (response["row"], "".join(response["pieces"]), response["prompt"], response["outcome"]) for response in kept
    }
    assert {(s["row"], s["response"], s["prompt"], s["outcome"]) for s in samples if s["step"] == 2} <= found


def test_without_a_prm_there_are_advantages_alone(configure, device):
    _, kept, _ = step(configure(*ALL, "prime.process_weight=0"), device)
    assert all("reward" not in response and "value" not in response for response in kept)
    assert any(any(response["advantage"]) for response in kept)


def group(number: int, outcomes: list[float], length: int = 3) -> Group:
    samples = tuple(Sample(torch.arange(length), torch.zeros(length), k == 0) for k, _ in enumerate(outcomes))
    return Group(number, 10 + number, (1, 2), samples, tuple(outcomes))


def test_one_group_by_chance_and_the_one_that_differs_most():
    groups = [group(0, [1, 1, 1]), group(1, [0, 0, 1]), group(2, [0.4, 0.6, 0.5]), group(3, [1, 0, 1])]
    assert [g.id for g in token_log.seen(groups)] == [0, 1]
    assert [g.id for g in token_log.seen(groups[::-1])] == [3, 1]
    assert [g.id for g in token_log.seen(groups[:1])] == [0]


def test_outcomes_that_are_no_chances_have_no_value():
    groups = [group(0, [2, -1, 5])]
    batch, numbers = Batch.of(groups), torch.ones(9)
    tokenizer = SimpleNamespace(decode=lambda tokens: "x" * len(tokens))
    kept = token_log.records(1, groups, batch, numbers, numbers, Credit(PrimeConfig(), None), Fit(), tokenizer)
    assert [response["reward"] for response in kept] == 3 * [[0.05] * 3]
    assert not any("value" in response for response in kept)


@pytest.mark.parametrize(
    ("room", "lengths"), [(1, [5]), (9, [5, 3]), (11, [5, 5]), (13, [5, 5, 3]), (99, [5, 5, 3, 3])]
)
def test_long_responses_are_left_out_whole(room, lengths, monkeypatch):
    """All but one, and the rows of the batch are not those of the groups that are kept."""
    monkeypatch.setattr(token_log, "TOKENS", room)
    groups = [group(0, [0, 0], 5), group(1, [0, 0], 4), group(2, [0, 1], 3)]
    batch, credit = Batch.of(groups), Credit(PrimeConfig(), None)
    numbers = torch.arange(len(batch.engine_logprob)).float()
    tokenizer = SimpleNamespace(decode=lambda tokens: "".join(chr(97 + token) for token in tokens))
    kept = token_log.records(7, groups, batch, numbers, numbers / 64, credit, Fit(), tokenizer)
    assert [len(response["pieces"]) for response in kept] == lengths
    rows = [row for row in (0, 1, 4, 5) if row < 2 or 3 in lengths][: len(lengths)]
    rows = rows if room != 9 else [0, 4]
    for response, row in zip(kept, rows, strict=True):
        first, end = batch.cu_seqlens[row : row + 2].tolist()
        assert response["advantage"] == list(range(first, end)) and response["step"] == 7
        assert response["reward"] == pytest.approx([0.05 * x / 64 for x in range(first, end)], rel=1e-3)
        assert response["row"] == 10 + row // 2 and response["truncated"] == (row % 2 == 0)
        assert response["prompt"] == "bc" and "".join(response["pieces"]) == "abcde"[: end - first]
