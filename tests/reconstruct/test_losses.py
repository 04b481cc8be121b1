"""The loss of a token by hand, and its mean over batches."""

import math

import pytest
import torch

from lit_prune.reconstruct.losses import MeanError, relative_errors


def test_by_hand() -> None:
    y_BTD = torch.tensor([[[3.0, 5.0], [0.0, 100.0]]])
    target_BTD = torch.tensor([[[3.0, 4.0], [0.0, 200.0]]])
    total, tokens = relative_errors(y_BTD, target_BTD)
    assert float(total) == pytest.approx(1 / 25 + 1 / 4)  # a token a hundred times as large counts as much
    assert int(tokens) == 2


def test_padding_does_not_count() -> None:
    y_BTD, target_BTD = torch.tensor([[[3.0, 5.0], [7.0, 7.0]]]), torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    total, tokens = relative_errors(y_BTD, target_BTD, torch.tensor([[True, False]]))
    assert (float(total), int(tokens)) == (pytest.approx(1 / 25), 1)


def test_a_target_of_zero_gives_a_finite_loss_for_an_output_of_zero() -> None:
    total, _ = relative_errors(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    assert float(total) == 0


def test_the_mean_is_over_tokens_not_over_batches() -> None:
    loss = MeanError()
    loss.add(torch.tensor(3.0), torch.tensor(1))
    loss.add(torch.tensor(1.0), torch.tensor(3))
    assert loss.mean() == 1.0
    assert math.isnan(MeanError().mean())
