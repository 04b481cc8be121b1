"""OWL: Outlier Weighed Layerwise Sparsity, ICML 2024, arXiv 2310.05175."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lit_prune.allocate.base import Allocation, min_max, rates_from_densities
from lit_prune.calibration.metric import metric_of
from lit_prune.calibration.statistics import INPUTS, BlockStatistics
from lit_prune.errors import InputError


@final
@dataclass(frozen=True)
class OWL(Allocation):
    """Prunes blocks less that have more outliers, weights that contribute far more than the block's mean.

    A = |W_ij| * ||X_j|| over all linears of a block together; D_b = share of A above M * mean(A);
    density_b = min-max(D)_b * 2 * lambda, shifted to the budget.
    D = [0.01, 0.02, 0.05] gives, for lambda 0.08, density = [0, 0.04, 0.16] + a constant.

    Args:
        threshold: M, the multiple of the mean above which an entry is an outlier.
        lam: lambda, half of the range between the largest and the smallest rate.

    Raises:
        InputError: if `threshold` is below 1, or `lam` is not in [0, 0.5].
    """

    threshold: float = 5.0
    lam: float = 0.08

    needs = frozenset({INPUTS})
    ranks_blocks = False

    def __post_init__(self) -> None:
        if self.threshold < 1:
            raise InputError(f"`OWL.threshold` must be at least 1, a multiple of the mean, got {self.threshold}.")
        if not 0 <= self.lam <= 0.5:
            raise InputError(f"`OWL.lam` must be in [0, 0.5], got {self.lam}.")

    def score(self, weights: dict[str, Tensor], statistics: BlockStatistics) -> float:
        """Returns D_b over the weights that are not pruned; 0 for a block without any."""
        unpruned = sum(int(torch.count_nonzero(weight)) for weight in weights.values())
        metric = metric_of(weights, statistics.norms)  # 0 where a weight is pruned: not in the sum, not an outlier
        # a float32 sum of the tens of millions of entries of a large block is wrong in its fourth digit
        mean = float(metric.sum(dtype=torch.float64)) / max(unpruned, 1)
        return int(torch.count_nonzero(metric > self.threshold * mean)) / max(unpruned, 1)

    def raw_rates(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns 1 - density, with mean ``sparsity``."""
        return rates_from_densities([2 * self.lam * share for share in min_max(scores)], sparsity)
