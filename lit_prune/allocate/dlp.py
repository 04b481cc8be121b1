"""DLP: Dynamic Layerwise Pruning in Large Language Models, ICML 2025, arXiv 2505.23807."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from lit_prune.allocate.base import Allocation, min_max, rates_from_densities
from lit_prune.calibration.metric import metric_of
from lit_prune.calibration.statistics import INPUTS, BlockStatistics
from lit_prune.errors import InputError


@final
@dataclass(frozen=True)
class DLP(Allocation):
    """Prunes blocks more whose typical weight times input norm is large relative to the other blocks.

    A = |W_ij| * ||X_j|| over all linears of a block together; U_b = median(A);
    I_b = 1 - U_b / sum(U); density_b = min-max(I)_b * 2 * alpha, shifted to the budget.
    U = [1, 2, 5] gives I = [7/8, 6/8, 3/8], and for alpha 0.15 density = [0.3, 0.225, 0] + a constant.

    Args:
        alpha: Half of the range between the largest and the smallest rate.
        statistic: Reduction of A to one number per block. The paper uses `median`; the authors' released code uses
            `mean` on its main path, which is clearly worse, and offers `max`, `sum`, `std` and `var`. The median of an
            even number of entries is the lower of the two in the middle.

    Raises:
        InputError: if `alpha` is not in [0, 0.5], or if every block's statistic is zero.
    """

    alpha: float = 0.15
    statistic: Literal["median", "mean", "max", "sum", "std", "var"] = "median"

    needs = frozenset({INPUTS})
    ranks_blocks = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 0.5:
            raise InputError(f"`DLP.alpha` must be in [0, 0.5], got {self.alpha}.")

    def score(self, weights: dict[str, Tensor], statistics: BlockStatistics) -> float:
        """Returns U_b over the weights that are not pruned; 0 for a block without any."""
        metric = metric_of(weights, statistics.norms)
        pruned = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in weights.values())
        if pruned == metric.numel():
            return 0.0
        if self.statistic == "median":
            return _median_above(metric, pruned)
        if pruned:
            metric = metric[torch.cat([weight.flatten() for weight in weights.values()]) != 0]
        return float(getattr(torch, self.statistic)(metric))

    def raw_rates(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns 1 - density, with mean ``sparsity``."""
        total = sum(scores)
        if total == 0:
            raise InputError(
                "`pruning.allocation` DLP found a score of 0 in every block, so nothing distinguishes them. Calibrate "
                "on other text, or use Uniform."
            )
        densities = [2 * self.alpha * share for share in min_max([1 - score / total for score in scores])]
        return rates_from_densities(densities, sparsity)


def _median_above(values: Tensor, ignored: int) -> float:
    """Returns the lower median of all but the ``ignored`` smallest values; reorders ``values``.

    Pruned weights have A = 0, so they are the smallest.
    """
    middle = ignored + (values.numel() - ignored - 1) // 2
    if values.device.type != "cpu":
        return float(values.kthvalue(middle + 1).values)
    values.numpy().partition(middle)  # in place, and several times as fast as kthvalue on a CPU
    return float(values[middle])
