import pytest
import torch

from benchmarks import peaked


def test_blocks_with_one_entry_above_the_threshold_are_kept_whole():
    dlogits = torch.full((256, 300), 0.01)
    dlogits[130, 299] = -0.5
    kept = peaked.occupied(dlogits, 0.1)
    assert kept.shape == dlogits.shape and kept[128:, 256:].all() and kept.sum() == 128 * 44
    assert peaked.occupied(dlogits, 0.01).all()


def test_study(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 8, generator=generator), torch.randn(1000, 8, generator=generator)
    targets = torch.randint(0, 1000, (300,), generator=generator)
    found = peaked.study(4 * hidden, weight, targets)
    assert found["tokens"] == 256
    treatments = found["treatments"]
    assert treatments["bfloat16 dlogits"]["skipped"] == 0
    assert 1e-4 < treatments["bfloat16 dlogits"]["dX relative error"] < 4e-3
    monkeypatch.setattr(peaked, "THRESHOLDS", {"none": 0.0, "all": 1e9})
    treatments = peaked.study(hidden, weight, targets)["treatments"]
    assert treatments["none"]["skipped"] == 0 and treatments["none, sorted"]["dW relative error"] == 0
    assert treatments["all"]["skipped"] == 1 and treatments["all"]["dX relative error"] == pytest.approx(1)
    assert treatments["all"]["dW rows lost"] == 1
