"""What a teacher is: the dense model, kept in some way, and what it says of a batch.

Suffixes: N positions of a batch in a row, R rows of them, V vocabulary.
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
    """What becomes of the model that is taught.

    Args:
        recipe: How it is cut.
        recovery: What is trained after the cut; None is whatever was left trainable.
        steps: The steps of its cuts.
    """

    recipe: Recipe
    recovery: Recovery | None
    steps: tuple[int, ...] = (0,)

    @property
    def trained_beside(self) -> bool:
        """Whether all but the linears that are cut stays what it is, to the bit, and those what the one cut leaves."""
        leaves = self.recovery is not None and self.recovery.leaves_base
        return leaves and self.recipe.method.makes_zeros and len(self.steps) == 1


@dataclass(frozen=True)
class DenseModel:
    """The dense model, as it is right before the first cut.

    Args:
        model: It is left as it is.
        student: What becomes of it.
        temperature: That of the distillation.
        device: Where it may compute.
        windows: Gives the batches of the training that is to come.
        weights: What :meth:`TeacherState.weights` returned in a run that is resumed, in the place of the model's own.
    """

    model: PreTrainedModel
    student: Student
    temperature: float
    device: torch.device
    windows: Callable[[], Iterable[Batch]]
    weights: Mapping[str, Tensor] | None = None


class TeacherOutput(ABC):
    """What a teacher says of the positions of one batch."""

    @abstractmethod
    def log_q(self, rows_R: Tensor, log_p_RV: Tensor, temperature: float) -> Tensor:
        """Returns the logarithms of the teacher's probabilities, (rows, vocabulary), float32.

        Args:
            rows_R: Which of the batch's positions, of those in a row.
            log_p_RV: The student's, for a teacher that does not know all of its own.
            temperature: What logits are divided by.
        """


class TeacherState(ABC):
    """A teacher while a run lasts."""

    @abstractmethod
    def output(self, inputs: Mapping[str, Tensor]) -> TeacherOutput:
        """Returns what the dense model says of a batch.

        Args:
            inputs: The tensors that the student was called with, labels left out.
        """

    @abstractmethod
    def size_bytes(self) -> int:
        """Returns the bytes that are kept of the dense model, beside those that the student has itself."""

    def weights(self) -> dict[str, Tensor]:
        """Returns all that makes the teacher again, where it can be made of weights; see ``Teacher.stores``."""
        raise NotImplementedError(f"{type(self).__name__} cannot be made of weights")


class Teacher(ABC):
    """How the dense model is kept.

    Attributes:
        stores: Whether it can be put into a checkpoint, so that it need not be had from the model's source again.
        reads: Whether it reads the windows of the whole training before it begins.
    """

    stores: ClassVar[bool] = False
    reads: ClassVar[bool] = False

    def check(self, student: Student) -> None:  # noqa: B027 (most can teach whatever becomes of the model)
        """Raises InputError where ``student`` cannot be taught so, before anything is done."""

    @abstractmethod
    def keep(self, dense: DenseModel) -> TeacherState:
        """Returns the teacher, made of a model that is about to be cut."""
