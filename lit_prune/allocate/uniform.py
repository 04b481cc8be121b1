"""Uniform: the same rate for every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lit_prune.allocate.base import Allocation
from lit_prune.calibration.statistics import BlockStatistics


@final
@dataclass(frozen=True)
class Uniform(Allocation):
    """The same rate for every block; the scores are all 1."""

    def is_uniform(self) -> bool:
        """Returns True."""
        return True

    def score(self, weights: dict[str, Tensor], statistics: BlockStatistics) -> float:
        """Returns 1."""
        return 1.0

    def raw_rates(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns ``sparsity`` for every block."""
        return [sparsity] * len(scores)
