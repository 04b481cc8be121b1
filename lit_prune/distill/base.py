"""The interfaces of a teacher: its settings, its state during a run, and its output for a batch.

Suffixes: N positions of a batch, flattened; R rows selected from them; V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.calibration.windows import Batch
from lit_prune.recipe import Recipe
from lit_prune.recover import Recovery


@dataclass(frozen=True)
class Student:
    """The settings by which the student is pruned and trained.

    Args:
        recipe: The recipe of its cuts.
        recovery: The recovery after a cut; None trains the parameters that require gradients already.
        steps: The steps at which it is cut.
    """

    recipe: Recipe
    recovery: Recovery | None
    steps: tuple[int, ...] = (0,)

    @property
    def keeps_uncut_weights(self) -> bool:
        """Whether all weights outside the linears that are cut stay those of the dense model, bit for bit."""
        leaves_base = self.recovery is not None and self.recovery.leaves_base
        return leaves_base and self.recipe.method.makes_zeros and len(self.steps) == 1


@dataclass(frozen=True)
class DenseModel:
    """The model right before the first cut, from which a teacher is made.

    Args:
        model: The model; a teacher does not change it.
        student: The settings of the student that it becomes.
        temperature: The temperature of the distillation.
        device: Device on which it may compute.
        windows: Returns the batches of the coming training.
        weights: The result of :meth:`TeacherState.weights` if the run is resumed; it replaces the model's weights.
    """

    model: PreTrainedModel
    student: Student
    temperature: float
    device: torch.device
    windows: Callable[[], Iterable[Batch]]
    weights: Mapping[str, Tensor] | None = None


class TeacherOutput(ABC):
    """The teacher's distribution of the next token at every position of a batch."""

    @abstractmethod
    def log_q(self, rows_R: Tensor, log_p_RV: Tensor, temperature: float) -> Tensor:
        """Returns the teacher's log-probabilities, (rows, vocabulary), float32.

        Args:
            rows_R: Indices into the batch's flattened positions.
            log_p_RV: The student's log-probabilities, for a teacher that stores those of some tokens only.
            temperature: Divisor of the logits.
        """


class TeacherState(ABC):
    """A teacher that is ready to run on batches."""

    @abstractmethod
    def output(self, inputs: Mapping[str, Tensor]) -> TeacherOutput:
        """Returns the teacher's output for a batch.

        Args:
            inputs: The tensors that the student was called with, except labels.
        """

    @abstractmethod
    def size_bytes(self) -> int:
        """Returns the bytes that the teacher takes beside the student's weights."""

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights from which the teacher can be restored, see ``Teacher.restorable``."""
        raise NotImplementedError(f"{type(self).__name__} cannot be restored from weights")


class Teacher(ABC):
    """A form in which the dense model is stored as a teacher.

    Attributes:
        restorable: Whether the teacher can be restored from weights in a checkpoint, without the dense model's source.
        needs_windows: Whether the teacher reads all training windows before training begins.
    """

    restorable: ClassVar[bool] = False
    needs_windows: ClassVar[bool] = False

    def check(self, student: Student) -> None:  # noqa: B027 (most suit any student)
        """Raises InputError if this teacher does not suit ``student``."""

    @abstractmethod
    def prepare(self, dense: DenseModel) -> TeacherState:
        """Returns the state of the teacher, made from a model that is about to be pruned."""
