"""What the benchmark of offline PRMs compares with, and how it counts."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.offline_prm import SAMPLES, Orm, compare, logits


def test_the_orm_reads_the_last_token_of_each_response(workspace):
    torch.manual_seed(0)
    orm, lm = Orm(workspace / "model"), AutoModelForCausalLM.from_pretrained(workspace / "model")
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([6]), torch.tensor([7, 8])]
    responses = [torch.tensor([9]), torch.tensor([3, 4, 1]), torch.tensor([5, 6])]
    found = logits(orm, prompts, responses)
    for value, prompt, response in zip(found, prompts, responses, strict=True):
        with torch.no_grad():
            hidden = lm.base_model(torch.cat([prompt, response])[None]).last_hidden_state[0, -1]
            assert float(value) == pytest.approx(float(orm.head(hidden)), abs=1e-5)


def test_a_prm_that_knows_is_compared_by_problem():
    rng = np.random.default_rng(0)
    right = rng.random((40, SAMPLES)) < 0.3
    samples = [{"outcomes": row.astype(float).tolist()} for row in right]
    votes = [{"votes": ["a"] * SAMPLES} for _ in right]
    found = compare(samples, votes, {"prm x": right + 0.0, "orm y": 1.0 - right})
    assert found["auc"] == {"prm x": 1.0, "orm y": 0.0}
    best = {name: curve[8].value for name, curve in found["best_of"].items()}
    assert best["prm x"] == best["oracle"] == right.any(1).mean() and best["orm y"] == right.all(1).mean()
    gain = found["best_of_8_minus"]["prm x"]["majority"]
    assert gain.value == pytest.approx(best["prm x"] - best["majority"]) and gain.low > 0.3
