"""An allocation with rates by hand."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lit_prune.allocate import Allocation
from lit_prune.calibration.statistics import BlockStatistics


@dataclass(frozen=True)
class Given(Allocation):
    given: tuple[float, ...] = (0.25, 0.5, 0.75)

    def score(self, weights: dict[str, Tensor], statistics: BlockStatistics) -> float:
        return 0.0

    def raw_rates(self, scores: Sequence[float], sparsity: float) -> list[float]:
        return list(self.given)
