"""OWL by hand: the share of outliers, and the rates from it."""

import pytest
import torch

from lit_prune.allocate import OWL, allocate
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.errors import InputError


def test_score_is_the_share_of_outliers_over_all_linears_together() -> None:
    # A = [[1, 1, 1, 1], [1, 1, 1, 1]] and [[2, 30]]: mean 4, so that above 5 * 4 there is one of ten
    weights = {"a": torch.tensor([[1.0, -1, 1, -1], [1, 1, 1, 1]]), "b": torch.tensor([[2.0, -10.0]])}
    observed = BlockStatistics({"a": torch.ones(4), "b": torch.tensor([1.0, 3.0])})
    assert OWL().score(weights, observed) == pytest.approx(0.1)
    assert OWL(threshold=8).score(weights, observed) == 0


def test_score_leaves_removed_weights_out() -> None:
    # what is left is [1, 1, 1, 1, 16], of mean 4: one of five is above 3 * 4; zeros would make the mean 2 and it 1/10
    weights = {"a": torch.tensor([[0.0, 0, 0, 0, 0, 1, 1, 1, 1, 16]])}
    assert OWL(threshold=3).score(weights, BlockStatistics({"a": torch.ones(10)})) == pytest.approx(0.2)
    assert OWL(threshold=4.5).score(weights, BlockStatistics({"a": torch.ones(10)})) == 0
    assert OWL().score({"a": torch.zeros(2, 3)}, BlockStatistics({"a": torch.ones(3)})) == 0


def test_rates_by_hand() -> None:
    # min-max(D) = [0, 1/4, 1]; keep = [0, 0.04, 0.16] + c with mean 0.3
    c = 0.3 - 0.2 / 3
    found = allocate(OWL(lam=0.08), [0.01, 0.02, 0.05], 0.7, sizes=[1, 1, 1])
    assert found == pytest.approx([1 - c, 1 - 0.04 - c, 1 - 0.16 - c])
    assert found[2] < found[1] < found[0]  # more outliers keep more


def test_no_outliers_anywhere_is_uniform() -> None:
    assert allocate(OWL(), [0, 0, 0], 0.4, sizes=[1, 1, 1]) == pytest.approx([0.4] * 3)


def test_settings_out_of_range() -> None:
    with pytest.raises(InputError, match="`OWL.threshold` must be at least 1.*got 0.5"):
        OWL(threshold=0.5)
    with pytest.raises(InputError, match=r"`OWL.lam` must be in \[0, 0.5\], got 0.6"):
        OWL(lam=0.6)
