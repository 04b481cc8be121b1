"""SparseDelta: the removed weights, stored on the CPU and restored for the teacher's forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lit_prune.distill.base import DenseModel, Student, Teacher, TeacherState
from lit_prune.distill.teacher_model import LazyWeight, TeacherModel, cut_weights, teacher_model_of
from lit_prune.errors import InputError


@final
@dataclass(frozen=True)
class SparseDelta(Teacher):
    """Stores only the weights that the cut removes, in CPU memory, and restores them for the teacher's forward pass.

    The teacher is bit for bit the dense model, and takes the memory of the removed weights. A step takes an additional
    forward pass of the dense model, in which every linear that was cut is copied, and its removed weights are moved to
    the device.
    """

    def check(self, student: Student) -> None:
        """Raises InputError if remaining weights may change, or for any cuts but a single one at step 0."""
        reason = None
        if not student.recipe.method.keeps_values:
            reason = f"{type(student.recipe.method).__name__} changes weights that it does not remove"
        elif student.recovery is None or not student.recovery.leaves_base:
            reason = f"`pruning.recovery` {student.recovery} does not leave the weights as they are, as LoRA does"
        elif student.steps != (0,):
            reason = f"it supports a single cut, at step 0, and there are cuts at {', '.join(map(str, student.steps))}"
        if reason:
            raise InputError(f"`pruning.distillation.teacher` must not be SparseDelta here, {reason}: use Copy.")

    def prepare(self, dense: DenseModel) -> TeacherState:
        """Returns a model that shares all weights with the student, except those of the linears that are cut."""
        shared, cut = dict(dense.model.named_parameters()), cut_weights(dense.model, dense.student.recipe)
        lazy_weights = {name: DeltaWeight(weight) for name, weight in cut.items()}
        return TeacherModel(teacher_model_of(dense.model, shared), shared, lazy_weights)


class DeltaWeight(LazyWeight):
    """A weight of the student, and the values that the cut removes from it.

    Which entries are removed is known at the first use, after the cut and the loading of a checkpoint. Until then a
    copy of the dense weight is stored.

    Args:
        weight: The student's weight, still dense.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.unpruned: Tensor | None = weight.detach().cpu().clone()
        self.removed_values = torch.empty(0)

    @torch.no_grad()
    def materialise(self, device: torch.device) -> Tensor:
        """Returns the student's weight with the removed values restored."""
        weight = self.weight.detach().to(device)
        removed = weight == 0
        if self.unpruned is not None:
            self.removed_values, self.unpruned = self.unpruned[removed.cpu()], None
        return weight.masked_scatter(removed, self.removed_values.to(device))

    def size_bytes(self) -> int:
        """Returns the bytes of the removed values; before the first use those of the dense weight."""
        stored = self.removed_values if self.unpruned is None else self.unpruned
        return stored.numel() * stored.element_size()
