"""The rule of docs/rewards.md, by examples: tests/data/hard_pairs.jsonl."""

import json
from collections import Counter
from pathlib import Path

import pytest

from prime_fast.rewards import RewardPool, math_attacks

LINES = (Path(__file__).parents[1] / "data" / "hard_pairs.jsonl").read_text(encoding="utf-8").split("\n")
PAIRS = [json.loads(line) for line in LINES if line]


@pytest.fixture(scope="module")
def pool():
    with RewardPool(workers=2, timeout=30.0) as pool:
        yield pool


def test_every_pair_is_judged_as_the_rule_says(pool):
    responses = [pair.get("response", rf"\boxed{{{pair.get('answer')}}}") for pair in PAIRS]
    rows = [{"reward_model": {"ground_truth": pair["truth"]}} for pair in PAIRS]
    outcomes = pool.score(responses, rows)
    wrong = [pair for pair, outcome in zip(PAIRS, outcomes, strict=True) if outcome != pair["verdict"]]
    assert wrong == []
    verdicts = Counter(pair["verdict"] for pair in PAIRS)
    assert min(verdicts[0], verdicts[1]) > 0.4 * len(PAIRS) > 400
    assert not any(pool.counts.values())


def test_attacks_score_nothing(pool):
    assert [name for name, accepted in math_attacks.attempts(pool) if accepted] == []
