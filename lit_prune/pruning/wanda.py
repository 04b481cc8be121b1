"""Wanda: A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, arXiv 2306.11695."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from lit_prune.calibration.statistics import INPUTS, InputStatistics
from lit_prune.pruning.base import Propagate
from lit_prune.pruning.mask_method import ScoredMethod
from lit_prune.pruning.patterns import Pattern


@final
@dataclass(frozen=True)
class Wanda(ScoredMethod):
    """Removes the smallest |W_ij| * ||X_j|| within each output row (section 3, equation 1).

    Half of [[1, 2, 3], [4, 5, 6]] under norms [9, 1, 1] has scores [[9, 2, 3], [36, 5, 6]] and leaves
    [[1, 0, 0], [4, 0, 6]].

    Args:
        pattern: The sparsity pattern; null is Unstructured.
        propagate: `dense` uses the norms of the unpruned model, from the pass that scores the blocks; `pruned` uses
            those of the inputs that pruned blocks produce, as the papers do, at the cost of two more passes; null is
            dense. On SmolLM2-135M dense is better with DLP at 0.7 (perplexity 328 against 346), and within a percent
            otherwise: docs/results.md.
    """

    pattern: Pattern | None = None  # type: ignore[assignment]
    propagate: Propagate | None = None  # type: ignore[assignment]

    needs: ClassVar[frozenset[str]] = frozenset({INPUTS})
    by_row: ClassVar[bool] = True

    def score(self, weight_OI: Tensor, statistics: InputStatistics) -> Tensor:
        """Returns |W| * ||X||."""
        assert statistics.norm_I is not None
        # an expert that no token was routed to has norms of 0, under which all scores would tie: |W| ranks it instead
        return weight_OI.float().abs() * (statistics.norm_I if statistics.norm_I.any() else 1.0)
