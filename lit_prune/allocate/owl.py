"""OWL: Outlier Weighed Layerwise Sparsity, ICML 2024, arXiv 2310.05175."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lit_prune.allocate.base import Allocation, min_max, rates_of
from lit_prune.allocate.metric import metric_of
from lit_prune.calibration.statistics import INPUTS, BlockStatistics
from lit_prune.errors import InputError


@final
@dataclass(frozen=True)
class OWL(Allocation):
    """Blocks with more outliers, weights that do far more than the block's mean, keep more.

    A = |W_ij| * ||X_j|| over all linears of a block together; D_b = share of A above M * mean(A);
    keep_b = min-max(D)_b * 2 * lambda, shifted to the budget.
    D = [0.01, 0.02, 0.05] gives, for lambda 0.08, keep = [0, 0.04, 0.16] + a constant.

    Args:
        threshold: M, how many times the mean an outlier exceeds.
        lam: lambda, half of the range between the largest and the smallest rate.

    Raises:
        InputError: if `threshold` is below 1, or `lam` is not in [0, 0.5].
    """

    threshold: float = 5.0
    lam: float = 0.08

    needs: ClassVar[frozenset[str]] = frozenset({INPUTS})

    def __post_init__(self) -> None:
        if self.threshold < 1:
            raise InputError(f"`OWL.threshold` must be at least 1, a multiple of the mean, got {self.threshold}.")
        if not 0 <= self.lam <= 0.5:
            raise InputError(f"`OWL.lam` must be in [0, 0.5], got {self.lam}.")

    def score(self, weights: dict[str, Tensor], observed: BlockStatistics) -> float:
        """Returns D_b over the weights that are still there; 0 for a block without any."""
        left = sum(int(torch.count_nonzero(weight)) for weight in weights.values())
        metric = metric_of(weights, observed.norms)  # 0 where a weight is gone: not in the sum, not an outlier
        mean = float(metric.sum(dtype=torch.float64)) / max(left, 1)
        return int(torch.count_nonzero(metric > self.threshold * mean)) / max(left, 1)

    def raw(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns 1 - keep, its mean ``sparsity``."""
        return rates_of([2 * self.lam * share for share in min_max(scores)], sparsity)
