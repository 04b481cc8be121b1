"""The units of a linear's input that contribute least to its output, and the weights that make up for their removal.

Optimal Brain Surgeon (NIPS 1992) for groups of input channels, as in ZipLM (arXiv 2302.04089, equations 2 and 3).
Suffixes: I input channels, O output channels, U units, K channels of one unit, P channels that are removed, S channels
that stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.calibration.errors import ErrorMoments
from lit_prune.progress import log
from lit_prune.pruning.updates import not_finite

ATTEMPTS = 12  # to factorise a Gram matrix, each with ten times the damping


@dataclass(frozen=True)
class Removal:
    """The units that stay, and the weight over their channels.

    Attributes:
        kept_U: Indices of the units that stay, ascending.
        weight_SO: The weight over the channels that stay, in the order of the full weight.
    """

    kept_U: Tensor
    weight_SO: Tensor


def remove_units(
    weight_IO: Tensor, gram_II: Tensor, columns_UK: Tensor, count: int, *, rounds: int, damping: float
) -> Removal:
    """Removes ``count`` units in rounds, each time those whose removal costs least, and refits the weight.

    With H the damped Gram matrix, the removal of unit u costs the squared error tr(W_u^T ([H^-1]_uu)^-1 W_u) if the
    other weights make up for it. After every round they do, W -= [H^-1]_:P ([H^-1]_PP)^-1 W_P, and H^-1 loses the rows
    and columns of P. In the end W_S = H_SS^-1 (H W)_S, the least squares solution, which the updates amount to.

    If x_2 = x_1 in all tokens, the removal of channel 2 of the weight [1, 1, 1] costs nothing and leaves [2, 1].

    Args:
        weight_IO: The weight of the linear, transposed; rows after the last channel of a unit always stay.
        gram_II: Mean over tokens of x x^T.
        columns_UK: The channels of every unit.
        count: Number of units to remove, less than all.
        rounds: Number of rounds.
        damping: Share of the mean of the diagonal that is added to the diagonal of the units' channels.
    """
    hessian_II, factor_II = factorised(gram_II, columns_UK, damping)
    original_IO = weight_IO.to(hessian_II)
    weight_IO, inverse_II = original_IO.clone(), torch.cholesky_inverse(factor_II)
    left_U = torch.arange(len(columns_UK), device=columns_UK.device)
    for share in _shares(count, rounds):
        order_U = removal_costs(weight_IO, inverse_II, columns_UK[left_U]).argsort(stable=True)
        removed_P = columns_UK[left_U[order_U[:share]]].flatten()
        left_U = left_U[order_U[share:]].sort().values
        inverse_PI = inverse_II[removed_P]  # and, since it is symmetric, its columns
        rows_PI = torch.linalg.solve(inverse_PI[:, removed_P], inverse_PI)
        weight_IO.addmm_(rows_PI.T, weight_IO[removed_P], alpha=-1)
        inverse_II.addmm_(inverse_PI.T, rows_PI, alpha=-1)  # in place: a difference of its own took most of the time
    kept_S = channels_of(left_U, columns_UK, len(weight_IO))
    factor_SS = torch.linalg.cholesky(hessian_II[kept_S][:, kept_S])
    return Removal(left_U, torch.cholesky_solve(hessian_II[kept_S] @ original_IO, factor_SS))


def drop_units(weight_IO: Tensor, gram_II: Tensor, columns_UK: Tensor, count: int) -> Removal:
    """Removes the ``count`` units that contribute least to the output, tr(W_u^T H_uu W_u), and changes no weight.

    Arguments are those of :func:`remove_units`.
    """
    blocks_UKK = _diagonal_blocks(gram_II.to(weight_IO.dtype), columns_UK)
    units_UKO = weight_IO[columns_UK]
    score_U = (units_UKO * (blocks_UKK @ units_UKO)).sum((1, 2))
    kept_U = score_U.argsort(stable=True)[count:].sort().values
    return Removal(kept_U, weight_IO[channels_of(kept_U, columns_UK, len(weight_IO))])


def corrected(
    weight_IO: Tensor, halves: tuple[ErrorMoments, ErrorMoments], columns_UK: Tensor, *, damping: float
) -> Tensor:
    """Returns the weight that makes up for a share of the error that the blocks before have left, in float64.

    W + share H^-1 C, with H the damped Gram matrix and C the moments of input and error, is for a share of 1 the least
    squares estimate of W^T x + e. QEP (arXiv 2504.09629) corrects the inputs of single linears so, with a
    given share. Here it is the one with which a correction that is fitted to one half of the batches is best on the
    other: the error is mostly one that x does not predict, and the rest of it would be fitted to these batches.

    If the error is twice the only input in all batches, the share is 1, but for the damping, and a weight of 3 becomes
    5. If it is in one half of the batches the opposite of what it is in the other, the share is 0.

    Args:
        weight_IO: The weight of the linear, transposed.
        halves: Moments of its input and of the error, over two halves of the batches.
        columns_UK: The channels of every unit.
        damping: Share of the mean of the diagonal that is added to the diagonal of the units' channels.
    """
    predicted = error = 0.0
    for one, other in (halves, halves[::-1]):
        fitted_IO = _least_squares(one, columns_UK, damping)
        gram_II, cross_IO = other.gram_II.to(fitted_IO), other.cross_ID.to(fitted_IO)
        predicted += float((fitted_IO * cross_IO).sum())
        error += float((fitted_IO * (gram_II @ fitted_IO)).sum())
    share = min(max(predicted / error, 0.0), 1.0) if error > 0 else 0.0
    change_IO = _least_squares(halves[0] + halves[1], columns_UK, damping)
    return weight_IO.to(change_IO) + share * change_IO


def _least_squares(moments: ErrorMoments, columns_UK: Tensor, damping: float) -> Tensor:
    """Returns H^-1 C, the weight that predicts the error best, in float64."""
    hessian_II, factor_II = factorised(moments.gram_II, columns_UK, damping)
    return torch.cholesky_solve(moments.cross_ID.to(hessian_II), factor_II)


def factorised(gram_II: Tensor, columns_UK: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Returns the damped Gram matrix and its Cholesky factor L, with L L^T the former.

    The damping is raised until the factorisation succeeds.

    Raises:
        InputError: if no damping is enough, which NaN or infinity causes.
    """
    for attempt in range(ATTEMPTS if gram_II.isfinite().all() else 0):
        if attempt:
            damping *= 10
            log(f"X X^T of {len(gram_II)} inputs cannot be factorised, damping raised to {damping:g}")
        hessian_II = damped(gram_II, columns_UK, damping)
        factor_II, failed = torch.linalg.cholesky_ex(hessian_II)
        if not failed and factor_II.isfinite().all():
            return hessian_II, factor_II
    raise not_finite()


def damped(gram_II: Tensor, columns_UK: Tensor, damping: float) -> Tensor:
    """Returns the Gram matrix with a share of its mean diagonal added to the diagonal of the units' channels.

    It is in float64 where the device has that. An input that is zero everywhere gives the identity.
    """
    hessian_II = gram_II.to(torch.float32 if gram_II.device.type == "mps" else torch.float64, copy=True)
    channels = columns_UK.flatten()
    mean = float(hessian_II.diagonal()[channels].mean())
    hessian_II.diagonal()[channels] += damping * mean if mean > 0 else 1.0
    return hessian_II


def removal_costs(weight_IO: Tensor, inverse_II: Tensor, columns_UK: Tensor) -> Tensor:
    """Returns the squared error that the removal of each unit leaves after the others have made up for it, (U,)."""
    units_UKO = weight_IO[columns_UK]
    if columns_UK.shape[1] == 1:
        return units_UKO.square().sum((1, 2)) / inverse_II.diagonal()[columns_UK[:, 0]]
    return (units_UKO * torch.linalg.solve(_diagonal_blocks(inverse_II, columns_UK), units_UKO)).sum((1, 2))


def channels_of(units_U: Tensor, columns_UK: Tensor, total: int) -> Tensor:
    """Returns the channels of the units in ascending order, and the channels up to ``total`` that are of no unit."""
    stays_I = torch.ones(total, dtype=torch.bool, device=columns_UK.device)
    stays_I[columns_UK.flatten()] = False
    stays_I[columns_UK[units_U].flatten()] = True
    return stays_I.nonzero()[:, 0]


def _diagonal_blocks(matrix_II: Tensor, columns_UK: Tensor) -> Tensor:
    return matrix_II[columns_UK[:, :, None], columns_UK[:, None, :]]


def _shares(count: int, rounds: int) -> list[int]:
    """The numbers of units of every round, as equal as possible, without rounds that remove nothing."""
    shares = [count * (done + 1) // rounds - count * done // rounds for done in range(rounds)]
    return [share for share in shares if share]
