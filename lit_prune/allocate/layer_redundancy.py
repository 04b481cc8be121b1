"""LayerRedundancy: Change Is the Only Constant, EMNLP Findings 2024, arXiv 2411.03513."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lit_prune.allocate.base import Allocation, min_max
from lit_prune.calibration.statistics import COSINE, BlockStatistics
from lit_prune.errors import InputError


@final
@dataclass(frozen=True)
class LayerRedundancy(Allocation):
    """Prunes blocks more that change the residual stream little.

    LR_b = mean over tokens of cos(block's input, block's output); r = min-max of LR over the blocks;
    rate_b = base + (sparsity - base) * r_b / mean(r).
    LR = [0.8, 0.9, 1.0] at sparsity 0.5 and base 0.2 gives rates [0.2, 0.5, 0.8].

    Args:
        base: Lower bound of every rate; null is half of the sparsity. A base equal to the sparsity gives uniform rates.

    Raises:
        InputError: if `base` is not in [0, 1), or is above the sparsity.
    """

    base: float | None = None

    needs = frozenset({COSINE})

    def __post_init__(self) -> None:
        if self.base is not None and not 0 <= self.base < 1:
            raise InputError(f"`LayerRedundancy.base` must be in [0, 1) or null, got {self.base}.")

    def check(self, sizes: Sequence[int], sparsity: float, lower: Sequence[float], upper: float) -> None:
        """Raises InputError if the base is above the sparsity."""
        if self.base is not None and self.base > sparsity:
            raise InputError(
                f"`LayerRedundancy.base` must be at most the mean sparsity of the blocks, {sparsity:.4g}, got "
                f"{self.base}. Use null for half of it."
            )

    def floor(self, sparsity: float) -> float:
        """Returns the base."""
        return sparsity / 2 if self.base is None else self.base

    def score(self, weights: dict[str, Tensor], statistics: BlockStatistics) -> float:
        """Returns LR_b."""
        assert statistics.cosine is not None
        return statistics.cosine

    def raw_rates(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns the paper's rates, or equal rates if all blocks have the same score."""
        redundancy, base = min_max(scores), self.floor(sparsity)
        mean = sum(redundancy) / len(redundancy)
        if mean == 0:
            return [sparsity] * len(scores)
        return [base + (sparsity - base) * share / mean for share in redundancy]
