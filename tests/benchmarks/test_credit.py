import pytest
import torch

from benchmarks.credit import area_under_curve


@pytest.mark.parametrize("levels", [3, 1000])
def test_area_under_curve_counts_pairs(levels):
    generator = torch.Generator().manual_seed(levels)
    right = torch.randint(0, levels, (40,), generator=generator).float() + 1
    wrong = torch.randint(0, levels, (25,), generator=generator).float()
    pairs = right[:, None] - wrong[None, :]
    expected = ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean()
    assert area_under_curve(right, wrong) == pytest.approx(float(expected), abs=1e-12)
