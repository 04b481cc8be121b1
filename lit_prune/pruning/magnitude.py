"""Magnitude pruning: removes the smallest weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from lit_prune.calibration.statistics import InputStatistics
from lit_prune.pruning.base import Propagate
from lit_prune.pruning.mask_method import ScoredMethod
from lit_prune.pruning.patterns import Pattern


@final
@dataclass(frozen=True)
class Magnitude(ScoredMethod):
    """Removes the smallest |W| of each matrix as a whole; uses no activations.

    Half of [[1, -2, 3], [4, -5, 6]] leaves [[0, 0, 0], [4, -5, 6]].

    Args:
        pattern: The sparsity pattern; null is Unstructured.
    """

    pattern: Pattern | None = None  # type: ignore[assignment]

    by_row: ClassVar[bool] = False
    propagate: ClassVar[Propagate] = "dense"  # type: ignore[misc]

    def score(self, weight_OI: Tensor, statistics: InputStatistics) -> Tensor:
        """Returns |W|."""
        return weight_OI.float().abs()
