"""Removal of units against brute force."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lit_prune.calibration.errors import ErrorMoments
from lit_prune.errors import InputError
from lit_prune.shrink.units.obs import Removal, channels_of, corrected, damped, drop_units, factorised, remove_units

RANDOM = torch.Generator().manual_seed(0)
X_PI = torch.randn(50, 6, generator=RANDOM, dtype=torch.float64) @ torch.randn(6, 6, generator=RANDOM).double()
W_IO = torch.randn(6, 4, generator=RANDOM, dtype=torch.float64)
GRAM_II = X_PI.T @ X_PI / len(X_PI)
SINGLE, PAIRS = torch.arange(6)[:, None], torch.tensor([[0, 3], [1, 4], [2, 5]])
TINY = 1e-12


def error(removal: Removal, columns_UK: Tensor) -> float:
    kept = channels_of(removal.kept_U, columns_UK, 6)
    return float((X_PI @ W_IO - X_PI[:, kept] @ removal.weight_SO).square().mean())


def least_squares(kept: Tensor) -> Tensor:
    return torch.linalg.lstsq(X_PI[:, kept], X_PI @ W_IO).solution


def test_the_damping_is_raised_until_a_gram_matrix_can_be_factorised(capsys: pytest.CaptureFixture[str]) -> None:
    """Four tokens for 32 channels, in float32: rounding leaves eigenvalues below 0."""
    inputs_TI = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    gram_II, columns_UK = inputs_TI.T @ inputs_TI / 4, torch.arange(32)[:, None]
    assert torch.linalg.cholesky_ex(damped(gram_II, columns_UK, 1e-12))[1]
    hessian_II, factor_II = factorised(gram_II, columns_UK, 1e-12)
    torch.testing.assert_close(factor_II @ factor_II.T, hessian_II)
    assert "X X^T of 32 inputs cannot be factorised, damping raised to 1e-11" in capsys.readouterr().err
    with pytest.raises(InputError, match="must give linears finite inputs"):
        factorised(gram_II * math.inf, columns_UK, 1e-3)
    assert capsys.readouterr().err == ""  # no damping can be enough


def test_by_hand() -> None:
    """The second input equals the first in all tokens: nothing is lost when the first takes over its weight."""
    gram_II = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    removal = remove_units(
        torch.tensor([[1.0], [1.0], [1.0]]), gram_II, torch.arange(3)[:, None], 1, rounds=1, damping=1e-9
    )
    assert removal.kept_U.tolist() in ([0, 2], [1, 2])
    torch.testing.assert_close(removal.weight_SO.float(), torch.tensor([[2.0], [1.0]]))


@pytest.mark.parametrize("columns_UK", [SINGLE, PAIRS], ids=["channels", "pairs"])
def test_the_unit_that_costs_least_goes_first(columns_UK: Tensor) -> None:
    removal = remove_units(W_IO, GRAM_II, columns_UK, 1, rounds=1, damping=TINY)
    losses = {}
    for unit in range(len(columns_UK)):
        kept_U = torch.tensor([other for other in range(len(columns_UK)) if other != unit])
        kept = channels_of(kept_U, columns_UK, 6)
        losses[unit] = error(Removal(kept_U, least_squares(kept)), columns_UK)
    assert set(removal.kept_U.tolist()) == set(losses) - {min(losses, key=lambda unit: losses[unit])}
    assert error(removal, columns_UK) == pytest.approx(min(losses.values()))


@pytest.mark.parametrize(("columns_UK", "count"), [(SINGLE, 3), (PAIRS, 2)], ids=["channels", "pairs"])
@pytest.mark.parametrize("rounds", [1, 2, 16])
def test_the_weights_that_stay_are_the_least_squares_solution(columns_UK: Tensor, count: int, rounds: int) -> None:
    removal = remove_units(W_IO, GRAM_II, columns_UK, count, rounds=rounds, damping=TINY)
    kept = channels_of(removal.kept_U, columns_UK, 6)
    assert len(removal.kept_U) == len(columns_UK) - count
    torch.testing.assert_close(removal.weight_SO, least_squares(kept), rtol=1e-6, atol=1e-8)


def test_more_rounds_find_better_channels() -> None:
    """Of two equal inputs with large weights only one may go, which a single round does not know."""
    gram_II = torch.tensor([[1.0, 0.9999, 0.0], [0.9999, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    weight_IO = torch.tensor([[3.0], [3.0], [0.5]]).double()
    one, two = (remove_units(weight_IO, gram_II, torch.arange(3)[:, None], 2, rounds=r, damping=TINY) for r in (1, 2))
    assert one.kept_U.tolist() == [2]
    assert two.kept_U.tolist() in ([0], [1])
    assert float(two.weight_SO) == pytest.approx(6, abs=1e-3)


def test_rows_of_no_unit_stay_and_make_up_for_the_others() -> None:
    ones_PI = torch.cat([X_PI + 2, torch.ones(50, 1)], 1)
    weight_IO = torch.cat([W_IO, torch.randn(1, 4, generator=RANDOM, dtype=torch.float64)])
    removal = remove_units(weight_IO, ones_PI.T @ ones_PI / 50, SINGLE, 2, rounds=2, damping=TINY)
    kept = [*removal.kept_U.tolist(), 6]
    expected = torch.linalg.lstsq(ones_PI[:, kept], ones_PI @ weight_IO).solution
    torch.testing.assert_close(removal.weight_SO, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("columns_UK", "count"), [(SINGLE, 2), (PAIRS, 1)], ids=["channels", "pairs"])
def test_without_compensation_the_least_energy_goes(columns_UK: Tensor, count: int) -> None:
    removal = drop_units(W_IO, GRAM_II, columns_UK, count)
    energy = [(X_PI[:, unit] @ W_IO[unit]).square().mean() for unit in columns_UK]
    least = sorted(range(len(energy)), key=lambda unit: energy[unit])[:count]
    assert removal.kept_U.tolist() == [unit for unit in range(len(energy)) if unit not in least]
    assert torch.equal(removal.weight_SO, W_IO[channels_of(removal.kept_U, columns_UK, 6)])


def test_damping_is_a_share_of_the_mean_diagonal_of_the_units() -> None:
    gram_II = torch.diag(torch.tensor([1.0, 3.0, 100.0]))
    assert damped(gram_II, torch.tensor([[0], [1]]), 0.5).diagonal().tolist() == [2, 4, 100]
    assert damped(torch.zeros(2, 2), torch.tensor([[0], [1]]), 0.01).tolist() == [[1, 0], [0, 1]]
    assert gram_II.diagonal().tolist() == [1, 3, 100]


def test_an_input_that_is_always_zero_costs_nothing() -> None:
    dead_PI = X_PI.clone()
    dead_PI[:, 2] = 0
    removal = remove_units(W_IO, dead_PI.T @ dead_PI, SINGLE, 1, rounds=1, damping=0.01)
    assert removal.kept_U.tolist() == [0, 1, 3, 4, 5]


def test_every_subset_is_possible() -> None:
    """The best of all subsets is not worse than what the rounds find, and not much better on independent inputs."""
    removal = remove_units(W_IO, torch.eye(6), SINGLE, 3, rounds=3, damping=TINY)
    norms = W_IO.square().sum(1)
    best = min(itertools.combinations(range(6), 3), key=lambda gone: float(norms[list(gone)].sum()))
    assert set(removal.kept_U.tolist()) == set(range(6)) - set(best)


def moments(x_PI: Tensor, error_PD: Tensor) -> ErrorMoments:
    return ErrorMoments(x_PI.T @ x_PI, x_PI.T @ error_PD, len(x_PI))


def test_an_error_that_an_input_predicts_is_made_up_for() -> None:
    x_P1 = torch.tensor([[1.0], [2.0]])
    half = moments(x_P1, 2 * x_P1)
    found = corrected(torch.tensor([[3.0]]), (half, half), torch.tensor([[0]]), damping=1e-9)
    assert found.item() == pytest.approx(5.0)


@pytest.mark.parametrize(("other", "share"), [(-1.0, 0.0), (0.0, 0.0), (0.5, 0.8), (1.0, 1.0)])
def test_the_share_is_what_one_half_predicts_of_the_other(other: float, share: float) -> None:
    """Errors 1 x and a x in two halves: fitted to one and tried on the other, the best share is 2a / (1 + a^2)."""
    x_P1 = torch.tensor([[1.0], [2.0]])
    halves = moments(x_P1, x_P1), moments(x_P1, other * x_P1)
    found = corrected(torch.tensor([[3.0]]), halves, torch.tensor([[0]]), damping=1e-9)
    assert found.item() == pytest.approx(3 + share * (1 + other) / 2)


def test_one_batch_alone_corrects_nothing() -> None:
    x_P1 = torch.tensor([[1.0], [2.0]])
    empty = ErrorMoments(torch.zeros(1, 1), torch.zeros(1, 1), 0)
    assert corrected(torch.tensor([[3.0]]), (moments(x_P1, x_P1), empty), torch.tensor([[0]]), damping=0.01).item() == 3
