"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lit_prune.prune.base import MaskMethod, Propagate
from lit_prune.prune.patterns import Pattern, Unstructured


@final
@dataclass(frozen=True)
class Magnitude(MaskMethod):
    """Removes the smallest |W| of each whole matrix; looks at no activations.

    Half of [[1, -2, 3], [4, -5, 6]] leaves [[0, 0, 0], [4, -5, 6]].

    Args:
        pattern: How the removals may lie; null is Unstructured.
    """

    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", self.pattern or Unstructured())

    @property
    def propagate(self) -> Propagate:  # type: ignore[override]
        """What is pruned does not hang on what passes through."""
        return "dense"

    def prune(self, weight_OI: Tensor, norm_I: Tensor | None, rate: float) -> Tensor:
        """Returns ``weight_OI`` with its smallest magnitudes set to 0."""
        assert self.pattern is not None
        score_OI = weight_OI.float().abs().masked_fill(weight_OI == 0, -1)
        return torch.where(self.pattern.keep(score_OI, rate, by_row=False), weight_OI, 0)
