"""AlphaPruning by hand: eigenvalues, the exponent, and the rates from it."""

import math

import numpy as np
import pytest
import torch

from lit_prune.allocate import AlphaPruning, allocate
from lit_prune.allocate.alpha_pruning import eigenvalues, power_law_exponent
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.errors import InputError


@pytest.mark.parametrize("flip", [False, True])
def test_eigenvalues_are_squared_singular_values_without_the_zeros(flip: bool) -> None:
    weight = torch.tensor([[3.0, 0, 0], [0, 4, 0]])
    assert eigenvalues(weight.T if flip else weight) == pytest.approx([9, 16])
    assert eigenvalues(torch.tensor([[3.0, 0], [0, 0]])) == pytest.approx([9])
    assert len(eigenvalues(torch.zeros(2, 3))) == 0


def test_eigenvalues_of_a_badly_conditioned_matrix() -> None:
    random = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(24, 24, generator=random, dtype=torch.float64)).Q for _ in range(2))
    expected = torch.logspace(-8, 1, 24, dtype=torch.float64)
    found = eigenvalues(left @ expected.sqrt().diag() @ right)
    assert found == pytest.approx(expected.numpy(), rel=1e-6)


def test_the_exponent_by_hand() -> None:
    # the peak is at the two ones: of e_0 (distance 0.25) and e_1 (0.30) xmin is the first; 1 + 4 / (0 + 0 + 1 + 2)
    assert power_law_exponent(np.array([1, 1, math.e, math.e**2])) == pytest.approx(1 + 4 / 3)
    # below the peak nothing counts
    assert power_law_exponent(np.array([0.01, 1, 1, math.e, math.e**2])) == pytest.approx(1 + 4 / 3)
    # nor does the unit
    assert power_law_exponent(7.3 * np.array([1, 1, math.e, math.e**2])) == pytest.approx(1 + 4 / 3)


@pytest.mark.parametrize("alpha", [2.0, 3.5])
def test_the_exponent_of_a_power_law(alpha: float) -> None:
    quantiles = (1 - (np.arange(2000) + 0.5) / 2000) ** (-1 / (alpha - 1))
    assert power_law_exponent(quantiles) == pytest.approx(alpha, rel=0.02)


@pytest.mark.parametrize("values", [[], [2.0], [3.0, 3.0, 3.0]])
def test_no_exponent(values: list[float]) -> None:
    assert power_law_exponent(np.array(values)) is None


def test_score_is_the_mean_over_the_linears_that_have_a_spectrum() -> None:
    first = torch.tensor([1, 1, math.e, math.e**2]).sqrt().diag()  # 7/3
    second = torch.tensor([1, math.e]).sqrt().diag()  # 1 + 2 / 1
    weights = {"a": first, "b": second, "gone": torch.zeros(3, 3), "level": torch.eye(3)}
    assert AlphaPruning().score(weights, BlockStatistics()) == pytest.approx((7 / 3 + 3) / 2, rel=1e-5)


def test_a_block_without_a_spectrum_is_an_error() -> None:
    with pytest.raises(InputError, match=r"got one where the singular values of q, k are all equal or all 0. Use anot"):
        AlphaPruning().score({"q": torch.eye(4), "k": torch.zeros(2, 2)}, BlockStatistics())


def test_rates_by_hand() -> None:
    # g = [0.7, 1, 1.3]; equal blocks: the factor is 0.5
    assert allocate(AlphaPruning(), [2, 3, 4], 0.5, sizes=[1, 1, 1]) == pytest.approx([0.35, 0.5, 0.65])
    # the factor makes the mean weighted by size the sparsity: 0.5 / ((3 * 0.7 + 1.3) / 4) = 1 / 1.7
    assert allocate(AlphaPruning(), [2, 4], 0.5, sizes=[3, 1]) == pytest.approx([0.7 / 1.7, 1.3 / 1.7])


def test_rates_are_scaled_and_not_shifted_where_a_bound_holds() -> None:
    # 1.3 f would be above 0.9, so that 0.9 + 1.0 f + 0.7 f = 3 * 0.8
    f = 1.5 / 1.7
    assert allocate(AlphaPruning(), [2, 3, 4], 0.8, sizes=[1, 1, 1], max_rate=0.9) == pytest.approx([0.7 * f, f, 0.9])


def test_settings_out_of_range() -> None:
    with pytest.raises(InputError, match=r"`AlphaPruning.epsilon` must be in \[0, 1\), got 1"):
        AlphaPruning(epsilon=1)
