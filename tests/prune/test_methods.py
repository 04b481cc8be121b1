"""The hand-worked cases, and what every method must do; a new one is tested without being named."""

import pytest
import torch

from lit_prune.calibrate import INPUTS
from lit_prune.prune import Magnitude, MaskMethod, Wanda

WEIGHT = torch.tensor([[1.0, -2.0, 3.0], [4.0, -5.0, 6.0]])
METHODS = [leaf for leaf in MaskMethod.__subclasses__() if leaf.__module__.startswith("lit_prune.")]


def test_magnitude_by_hand() -> None:
    assert Magnitude().prune(WEIGHT, None, 0.5).tolist() == [[0, 0, 0], [4, -5, 6]]


def test_wanda_by_hand() -> None:
    # scores |W| * norm = [[9, 2, 3], [36, 5, 6]]; one a row goes (2 and 5), then 3, which is below 6
    pruned = Wanda().prune(WEIGHT, torch.tensor([9.0, 1.0, 1.0]), 0.5)
    assert pruned.tolist() == [[1, 0, 0], [4, 0, 6]]


def test_wanda_looks_at_activations_and_magnitude_does_not() -> None:
    norm_I = torch.tensor([0.01, 1.0, 1.0])
    assert Wanda().prune(WEIGHT, norm_I, 1 / 3)[1, 0] == 0
    assert Magnitude().prune(WEIGHT, norm_I, 1 / 3)[1, 0] == 4


@pytest.mark.parametrize("leaf", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.37, 0.5, 0.99])
def test_contract(leaf: type[MaskMethod], dtype: torch.dtype, rate: float) -> None:
    random = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(13, 21, generator=random).to(dtype)
    norm_I = torch.rand(21, generator=random) if INPUTS in leaf.needs else None
    before = weight_OI.clone()
    pruned = leaf().prune(weight_OI, norm_I, rate)
    assert torch.equal(weight_OI, before)
    assert pruned.shape == weight_OI.shape
    assert pruned.dtype == dtype
    assert pruned.isfinite().all()
    assert (pruned == 0).sum() == round(13 * 21 * rate)
    assert torch.equal(pruned, leaf().prune(weight_OI, norm_I, rate))
    again = leaf().prune(pruned, norm_I, min(rate + 0.3, 1))
    assert (again[pruned == 0] == 0).all()
    assert (again == 0).sum() == round(13 * 21 * min(rate + 0.3, 1))
