"""DLP: Dynamic Layerwise Pruning in Large Language Models, ICML 2025, arXiv 2505.23807."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from lit_prune.allocate.base import Allocation, min_max
from lit_prune.calibrate import INPUTS, Observed
from lit_prune.errors import InputError


@final
@dataclass(frozen=True)
class DLP(Allocation):
    """Blocks whose typical weight times input norm is large, relative to the other blocks, give more.

    A = |W_ij| * ||X_j|| over all linears of a block together; U_b = median(A);
    I_b = 1 - U_b / sum(U); keep_b = min-max(I)_b * 2 * alpha, shifted to the budget.
    U = [1, 2, 5] gives I = [7/8, 6/8, 3/8], and for alpha 0.15 keep = [0.3, 0.225, 0] + a constant.

    Args:
        alpha: Half of the range between the largest and the smallest rate.
        statistic: How A becomes one number a block. `median` is the paper's; the authors' released code takes `mean` on
            its main path, which is clearly worse; `max`, `sum`, `std` and `var` are its other options. Of an even
            number of entries the median is the lower of the two in the middle.

    Raises:
        InputError: if `alpha` is not in [0, 0.5], or if every block's statistic is zero.
    """

    alpha: float = 0.15
    statistic: Literal["median", "mean", "max", "sum", "std", "var"] = "median"

    needs: ClassVar[frozenset[str]] = frozenset({INPUTS})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 0.5:
            raise InputError(f"`DLP.alpha` must be in [0, 0.5], got {self.alpha}.")

    def score(self, weights: dict[str, Tensor], observed: Observed) -> float:
        """Returns U_b over the weights that are still there; 0 for a block without any."""
        metrics = []
        for name, weight_OI in weights.items():
            metric_OI = weight_OI.float().abs() * observed.norms[name].to(weight_OI.device)
            there = weight_OI != 0
            metrics.append(metric_OI.flatten() if there.all() else metric_OI[there])
        metric = torch.cat(metrics)
        return float(getattr(torch, self.statistic)(metric)) if metric.numel() else 0.0

    def raw(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns 1 - keep, its mean ``sparsity``."""
        total = sum(scores)
        if total == 0:
            raise InputError(
                "`pruning.allocation` DLP found a score of 0 in every block: nothing distinguishes them. Calibrate on "
                "other text, or use Uniform."
            )
        keep = [2 * self.alpha * share for share in min_max([1 - score / total for score in scores])]
        return [sparsity + sum(keep) / len(keep) - share for share in keep]
