"""Magnitude by hand."""

import torch

from lit_prune.calibration.statistics import InputStatistics
from lit_prune.pruning import Magnitude, MaskMethod

WEIGHT = torch.tensor([[1.0, -2.0, 3.0], [4.0, -5.0, 6.0]])


def prune(method: MaskMethod, weight_OI: torch.Tensor, seen: InputStatistics, rate: float) -> torch.Tensor:
    return method.prune([weight_OI], seen, rate)[0]


def test_magnitude_by_hand() -> None:
    assert prune(Magnitude(), WEIGHT, InputStatistics(), 0.5).tolist() == [[0, 0, 0], [4, -5, 6]]
