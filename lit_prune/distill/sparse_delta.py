"""SparseDelta: the weights that were taken, kept on the CPU and put back for the teacher's pass."""

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
    """Keeps only the weights that the cut removes, in the memory of the CPU, and puts them back for the teacher's pass.

    The dense model to the bit, at the bytes of what was removed. A step costs the dense model's forward pass more, and
    in it every linear that was cut is copied, and what it lost is brought to it.
    """

    def check(self, student: Student) -> None:
        """Raises InputError where weights change that were not removed."""
        refused = None
        if not student.recipe.method.keeps_values:
            refused = f"{type(student.recipe.method).__name__} changes weights that stay"
        elif student.recovery is None or not student.recovery.leaves_base:
            refused = f"`pruning.recovery` {student.recovery} does not leave the weights as they are, as LoRA does"
        elif student.steps != (0,):
            refused = f"it knows one cut, at step 0, and there are cuts at {', '.join(map(str, student.steps))}"
        if refused:
            raise InputError(f"`pruning.distillation.teacher` must not be SparseDelta here, {refused}: use Copy.")

    def keep(self, dense: DenseModel) -> TeacherState:
        """Returns the model that shares its weights with the student, but for those that are cut."""
        cut = cut_weights(dense.model, dense.student.recipe)
        teacher = teacher_model_of(dense.model, dict(dense.model.named_parameters()))
        return TeacherModel(
            teacher, dict(dense.model.named_parameters()), {name: DeltaWeight(weight) for name, weight in cut.items()}
        )


class DeltaWeight(LazyWeight):
    """A weight of the student, and what it lost.

    Which entries those are shows when it is first asked for: the cut is made by then, and a checkpoint is loaded.

    Args:
        weight: The student's, still dense.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.whole: Tensor | None = weight.detach().cpu().clone()
        self.values = torch.empty(0)

    @torch.no_grad()
    def dense(self, device: torch.device) -> Tensor:
        """Returns the student's weight with what it lost put back."""
        weight = self.weight.detach().to(device)
        gone = weight == 0
        if self.whole is not None:
            self.values, self.whole = self.whole[gone.cpu()], None
        return weight.masked_scatter(gone, self.values.to(device))

    def size_bytes(self) -> int:
        """Returns the bytes of what is kept."""
        kept = self.values if self.whole is None else self.whole
        return kept.numel() * kept.element_size()
