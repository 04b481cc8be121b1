"""AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Layer-wise Pruning, NeurIPS 2024, arXiv 2410.10912.

Suffixes: O out, I in, K the smaller of the two, N eigenvalues in ascending order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from lit_prune.allocate.base import Allocation, min_max
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.errors import InputError

BINS = 100
NEAR_PEAK = (0.95, 1.5)


@final
@dataclass(frozen=True)
class AlphaPruning(Allocation):
    """Prunes blocks more whose weights have lighter-tailed spectra, a sign of less training; needs no data.

    alpha of a linear: the exponent of a power law fitted to the upper eigenvalues of W^T W (see
    :func:`power_law_exponent`); of a block: the mean of its linears. rate_b = sparsity * factor * g_b, where g is alpha
    mapped linearly from min..max to [1 - epsilon, 1 + epsilon].
    alpha = [2, 3, 4] at a sparsity of 0.5 and epsilon 0.3 gives rates [0.35, 0.5, 0.65].

    The exponent of a small matrix is noise: on the embedded model (192 eigenvalues a linear) Wanda at 0.5 gives a
    perplexity of 22.7 with AlphaPruning and 16.2 with Uniform.

    Pruned weights enter the spectrum as zeros. A linear whose spectrum cannot be fitted (singular values all zero or
    all equal) is left out of its block's mean.

    Args:
        epsilon: Half of the range between the largest and the smallest rate, as a share of the sparsity.

    Raises:
        InputError: if `epsilon` is not in [0, 1), or no linear of a block has a spectrum that can be fitted.
    """

    epsilon: float = 0.3

    ranks_blocks = False

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise InputError(f"`AlphaPruning.epsilon` must be in [0, 1), got {self.epsilon}.")

    def score(self, weights: dict[str, Tensor], statistics: BlockStatistics) -> float:
        """Returns the mean exponent of the block's linears."""
        fits = [power_law_exponent(eigenvalues(weight_OI)) for weight_OI in weights.values()]
        exponents = [exponent for exponent in fits if exponent is not None]
        if not exponents:
            raise InputError(
                "`pruning.allocation` AlphaPruning must find a spectrum in every block, got one where the singular "
                f"values of {', '.join(weights)} are all equal or all 0. Use another allocation."
            )
        return sum(exponents) / len(exponents)

    def raw_rates(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns the paper's rates for blocks of one size."""
        multipliers = [1 - self.epsilon + 2 * self.epsilon * share for share in min_max(scores)]
        return [sparsity * multiplier * len(multipliers) / sum(multipliers) for multiplier in multipliers]

    def shifted_rates(self, raw_rates: Sequence[float], amount: float) -> list[float]:
        """Returns ``raw_rates`` times 1 + ``amount``, or times 0 if that is negative."""
        return [rate * max(1 + amount, 0.0) for rate in raw_rates]


@torch.no_grad()
def eigenvalues(weight_OI: Tensor) -> np.ndarray:
    """Returns the positive eigenvalues of W^T W (squared singular values of W) in ascending order.

    Those of [[3, 0, 0], [0, 4, 0]] are [9, 16].
    """
    # The float64 Gram matrix of the smaller side is exact to 1e-8 over a range of 1e9. A float32 singular value
    # decomposition is exact to 1e-4 and no cheaper; a float32 Gram matrix loses the small eigenvalues altogether,
    # which shifts the bins of the histogram.
    short_KI = weight_OI.double() if weight_OI.shape[0] <= weight_OI.shape[1] else weight_OI.double().T
    eigenvalues_N = torch.linalg.eigvalsh(short_KI @ short_KI.T).cpu().numpy()
    # the tolerance of numpy's matrix_rank: smaller values are rounding errors of eigenvalues that are 0
    return eigenvalues_N[eigenvalues_N > max(weight_OI.shape) * np.finfo(np.float64).eps * eigenvalues_N[-1]]


def power_law_exponent(eigenvalues_N: np.ndarray) -> float | None:
    """Returns the Hill estimate alpha = 1 + n / sum(log(e_i / xmin)) over the n eigenvalues from xmin up.

    xmin is at the peak of the histogram of log eigenvalues: among the eigenvalues from 0.95 to 1.5 times the fullest
    bin's lower edge, the one whose power law has the smallest Kolmogorov-Smirnov distance. (The authors' code,
    lib/esd_utils.py, compares eigenvalues with the *logarithm* of the lower limit, which lets xmin fall far below the
    peak.) [1, 1, e, e^2] has its peak, and xmin, at 1: alpha = 1 + 4 / 3.

    Args:
        eigenvalues_N: Positive, in ascending order.

    Returns:
        alpha, or None if there are fewer than two eigenvalues or all from the peak up are equal.
    """
    if len(eigenvalues_N) < 2:
        return None
    counts, edges = np.histogram(np.log10(eigenvalues_N), BINS)
    low, high = (10 ** edges[counts.argmax()] * limit for limit in NEAR_PEAK)
    first, end = np.searchsorted(eigenvalues_N, low), np.searchsorted(eigenvalues_N, high, side="right")
    fits = [_fit(eigenvalues_N[start:]) for start in range(first, min(end, len(eigenvalues_N) - 1))]
    _, alpha = min(fits, default=(math.inf, math.inf))
    return alpha if math.isfinite(alpha) else None


def _fit(tail_N: np.ndarray) -> tuple[float, float]:
    """Returns the Kolmogorov-Smirnov distance of a tail from its power law, and that law's exponent."""
    ratio_N = tail_N / tail_N[0]
    sum_of_logs = float(np.log(ratio_N).sum())
    if sum_of_logs <= 0:
        return math.inf, math.inf
    alpha = 1 + len(tail_N) / sum_of_logs
    empirical_cdf_N = np.arange(len(tail_N)) / len(tail_N)
    return float(np.abs(1 - ratio_N ** (1 - alpha) - empirical_cdf_N).max()), alpha
