"""Wanda by hand."""

import torch

from lit_prune.calibration.statistics import InputStatistics
from lit_prune.pruning import Magnitude, MaskMethod, Wanda

WEIGHT = torch.tensor([[1.0, -2.0, 3.0], [4.0, -5.0, 6.0]])


def prune(method: MaskMethod, weight_OI: torch.Tensor, seen: InputStatistics, rate: float) -> torch.Tensor:
    return method.prune([weight_OI], seen, rate)[0]


def test_wanda_by_hand() -> None:
    # scores |W| * norm = [[9, 2, 3], [36, 5, 6]]; one a row goes (2 and 5), then 3, which is below 6
    pruned = prune(Wanda(), WEIGHT, InputStatistics(torch.tensor([9.0, 1.0, 1.0])), 0.5)
    assert pruned.tolist() == [[1, 0, 0], [4, 0, 6]]


def test_wanda_looks_at_activations_and_magnitude_does_not() -> None:
    seen = InputStatistics(torch.tensor([0.01, 1.0, 1.0]))
    assert prune(Wanda(), WEIGHT, seen, 1 / 3)[1, 0] == 0
    assert prune(Magnitude(), WEIGHT, seen, 1 / 3)[1, 0] == 4


def test_wanda_of_an_input_that_was_never_seen_goes_by_the_weights() -> None:
    assert prune(Wanda(), WEIGHT.flip(1), InputStatistics(torch.zeros(3)), 1 / 3).tolist() == [[3, -2, 0], [6, -5, 0]]
