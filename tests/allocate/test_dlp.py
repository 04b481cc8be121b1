"""DLP by hand."""

import pytest
import torch

from lit_prune.allocate import DLP
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.errors import InputError
from tests.allocate.blocks import rates


def test_dlp_score_is_the_median_over_all_linears_together() -> None:
    # A = [[1, 4, 9]] and [[2, 6]]: the median of 1, 2, 4, 6, 9 is 4
    weights = {"a": torch.tensor([[1.0, -2.0, 3.0]]), "b": torch.tensor([[-2.0, 3.0]])}
    observed = BlockStatistics({"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([1.0, 2.0])})
    assert DLP().score(weights, observed) == 4
    assert DLP(statistic="mean").score(weights, observed) == pytest.approx(22 / 5)
    assert DLP(statistic="max").score(weights, observed) == 9
    assert DLP(statistic="sum").score(weights, observed) == 22
    assert DLP(statistic="var").score(weights, observed) == pytest.approx(10.3)
    assert DLP(statistic="std").score(weights, observed) == pytest.approx(10.3**0.5)


def test_dlp_score_leaves_removed_weights_out() -> None:
    weights = {"a": torch.tensor([[0.0, 0.0, 0.0, 5.0, 7.0, 9.0]])}
    assert DLP().score(weights, BlockStatistics({"a": torch.ones(6)})) == 7


def test_dlp_rates_by_hand() -> None:
    # I = [7/8, 6/8, 3/8]; min-max = [1, 3/4, 0]; keep = [0.3, 0.225, 0] + c with mean 0.5
    c = 0.5 - 0.525 / 3
    assert rates(DLP(alpha=0.15), [1, 2, 5], 0.5) == pytest.approx([1 - 0.3 - c, 1 - 0.225 - c, 1 - c])


def test_dlp_larger_score_gives_more_and_the_range_is_twice_alpha() -> None:
    found = rates(DLP(alpha=0.1), [3, 1, 2], 0.4)
    assert found[1] < found[2] < found[0]
    assert max(found) - min(found) == pytest.approx(0.2)


def test_dlp_of_nothing_but_zeros_is_an_error() -> None:
    with pytest.raises(InputError, match="score of 0 in every block"):
        rates(DLP(), [0, 0, 0], 0.5)
