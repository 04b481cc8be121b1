"""The interface of a teacher: a stored form of the dense model, its state during a run, its output for a batch.

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
    """How the model that is taught is pruned and trained.

    Args:
        recipe: The recipe of its cuts.
        recovery: The recovery after the cut; None trains whatever was left trainable.
        steps: The steps of its cuts.
    """

    recipe: Recipe
    recovery: Recovery | None
    steps: tuple[int, ...] = (0,)

    @property
    def trained_beside(self) -> bool:
        """Whether all weights but those of the linears that are cut stay those of the dense model, to the bit."""
        leaves_base = self.recovery is not None and self.recovery.leaves_base
        return leaves_base and self.recipe.method.makes_zeros and len(self.steps) == 1


@dataclass(frozen=True)
class DenseModel:
    """The dense model, as it is right before the first cut.

    Args:
        model: The model; it is not changed.
        student: How it is pruned and trained.
        temperature: The temperature of the distillation.
        device: Device on which it may compute.
        windows: Returns the batches of the coming training.
        weights: The result of :meth:`TeacherState.weights` in a run that is resumed, instead of the model's weights.
    """

    model: PreTrainedModel
    student: Student
    temperature: float
    device: torch.device
    windows: Callable[[], Iterable[Batch]]
    weights: Mapping[str, Tensor] | None = None


class TeacherOutput(ABC):
    """The teacher's distribution of the next token, at every position of one batch."""

    @abstractmethod
    def log_q(self, rows_R: Tensor, log_p_RV: Tensor, temperature: float) -> Tensor:
        """Returns the teacher's log-probabilities, (rows, vocabulary), float32.

        Args:
            rows_R: Indices into the batch's flattened positions.
            log_p_RV: The student's log-probabilities, for a teacher that stores only some of its own.
            temperature: Divisor of the logits.
        """


class TeacherState(ABC):
    """A teacher during a run."""

    @abstractmethod
    def output(self, inputs: Mapping[str, Tensor]) -> TeacherOutput:
        """Returns the dense model's output for a batch.

        Args:
            inputs: The tensors that the student was called with, except labels.
        """

    @abstractmethod
    def size_bytes(self) -> int:
        """Returns the bytes that the teacher takes in addition to the student's weights."""

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights from which the teacher can be restored, if that is possible; see ``Teacher.stores``."""
        raise NotImplementedError(f"{type(self).__name__} cannot be restored from weights")


class Teacher(ABC):
    """A way to store the dense model as a teacher.

    Attributes:
        stores: Whether a checkpoint can hold the teacher, so that a resumed run does not need the model's source.
        reads: Whether it reads the windows of the whole training before training begins.
    """

    stores: ClassVar[bool] = False
    reads: ClassVar[bool] = False

    def check(self, student: Student) -> None:  # noqa: B027 (most can teach any student)
        """Raises InputError if this teacher does not suit ``student``."""

    @abstractmethod
    def prepare(self, dense: DenseModel) -> TeacherState:
        """Returns the teacher's state, made from a model that is about to be pruned."""
