"""The settings of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lit_prune.distill.base import Teacher
from lit_prune.distill.copies import Copy
from lit_prune.errors import InputError


@final
@dataclass(frozen=True)
class Distillation:
    """Distillation of the model right before the first cut into the pruned one, arXiv 1503.02531.

    loss = (1 - weight) * cross entropy + weight * T^2 * KL(teacher || student), where both distributions are the
    softmax of logits / T, and the divergence is averaged over the positions that the cross entropy counts.

    Args:
        temperature: T; above 0.
        weight: Weight of the divergence in the loss, in (0, 1].
        teacher: Form in which the dense model is stored: Copy, TopK or SparseDelta; null is Copy.

    Raises:
        InputError: for a number out of its range.
    """

    temperature: float = 1.0
    weight: float = 0.5
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"`pruning.distillation.temperature` must be above 0, got {self.temperature}.")
        if not 0 < self.weight <= 1:
            raise InputError(
                f"`pruning.distillation.weight` must be in (0, 1], the divergence's share of the loss, got "
                f"{self.weight}; to train without a teacher leave `pruning.distillation` out."
            )
        object.__setattr__(self, "teacher", self.teacher or Copy())
