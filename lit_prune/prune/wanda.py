"""Wanda: A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, arXiv 2306.11695."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from lit_prune.calibration.statistics import INPUTS, InputStatistics
from lit_prune.prune.base import Propagate, ScoredMethod
from lit_prune.prune.patterns import Pattern


@final
@dataclass(frozen=True)
class Wanda(ScoredMethod):
    """Removes the smallest |W_ij| * ||X_j|| within each output row (section 3, equation 1).

    Half of [[1, 2, 3], [4, 5, 6]] under norms [9, 1, 1] has scores [[9, 2, 3], [36, 5, 6]] and leaves
    [[1, 0, 0], [4, 0, 6]].

    Args:
        pattern: How the removals may lie; null is Unstructured.
        propagate: `dense` takes the norms of the unpruned model, from the pass that scores the blocks; `pruned` takes
            those behind pruned blocks, as the papers do, in two passes more; null is dense. On SmolLM2-135M dense is
            better with DLP at 0.7 (perplexity 328 against 346), and within a percent otherwise: docs/results.md.
    """

    pattern: Pattern | None = None  # type: ignore[assignment]
    propagate: Propagate | None = None  # type: ignore[assignment]

    needs: ClassVar[frozenset[str]] = frozenset({INPUTS})
    by_row: ClassVar[bool] = True

    def score(self, weight_OI: Tensor, statistics: InputStatistics) -> Tensor:
        """Returns |W| * ||X||; |W| for an expert that no token reached, where ||X|| would tell nothing apart."""
        assert statistics.norm_I is not None
        return weight_OI.float().abs() * (statistics.norm_I if statistics.norm_I.any() else 1.0)
