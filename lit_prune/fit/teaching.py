"""The distillation of a run: its teacher is built right before the first cut, and restored when a run is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lit_prune.checkpointing.record import TeacherRecord
from lit_prune.data.batches import training_windows
from lit_prune.distill import DenseModel, Distillation, DistillationHook, Student
from lit_prune.errors import InputError
from lit_prune.models.tensors import digest


class Teaching:
    """The distillation of one run.

    Args:
        distillation: The settings.
        student: Description of the student.

    Raises:
        InputError: if the teacher does not support this student.
    """

    def __init__(self, distillation: Distillation, student: Student) -> None:
        assert distillation.teacher is not None
        distillation.teacher.check(student)
        self.distillation, self.teacher, self.student = distillation, distillation.teacher, student
        self.distilled: DistillationHook | None = None
        self._handle: RemovableHandle | None = None
        self._digest: str | None = None
        self._stored = False

    def begin(
        self, trainer: Trainer, model: PreTrainedModel, *, stored: bool, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Builds the teacher from the dense ``model``.

        Args:
            trainer: The Trainer, with the training loader and the device.
            model: The LLM, right before the first cut.
            stored: Whether checkpoints store the teacher, if it supports that, because the source no longer has it.
            weights: The teacher's weights from a checkpoint; None takes those of ``model``.
        """
        self._stored = stored and self.teacher.restorable
        self._digest = None if self._stored else _digest(model)
        device, temperature = trainer.strategy.root_device, self.distillation.temperature
        dense = DenseModel(model, self.student, temperature, device, lambda: training_windows(trainer), weights)
        self.distilled = DistillationHook(self.distillation, self.teacher.prepare(dense))

    def attach(self, model: PreTrainedModel) -> None:
        """Adds the distillation loss to the loss of ``model``; a second call does nothing."""
        assert self.distilled is not None
        if self._handle is None:
            self._handle = self.distilled.register(model)

    def resume(self, trainer: Trainer, model: PreTrainedModel, record: TeacherRecord | None) -> None:
        """Restores the teacher of a checkpoint, from its weights or from ``model``, just loaded from its source.

        Raises:
            InputError: if ``model`` is not the model that the teacher was built from.
        """
        if record is None:  # the checkpoint was saved before the first cut
            return
        self.begin(trainer, model, stored=record.weights is not None, weights=record.weights)
        if self._digest != record.digest:
            raise InputError(
                "`model.pretrained` must be the model that the checkpoint was made from; the weights of the teacher "
                "differ."
            )
        self.attach(model)

    def record(self) -> TeacherRecord | None:
        """Returns the record of the teacher for a checkpoint; None before the first cut."""
        if self.distilled is None:
            return None
        return TeacherRecord(self._digest, self.distilled.teacher.weights() if self._stored else None)

    def check_restored(self) -> None:
        """Raises InputError if a resumed run has no teacher, since `setup` did not know the path of the checkpoint."""
        if self.distilled is None:
            raise InputError(
                "`trainer.ckpt_path` must be set before `trainer.fit` is called if `pruning.distillation` is given: "
                "the teacher is built before the checkpoint's weights are loaded."
            )

    def log(self, pl_module: LightningModule) -> None:
        """Logs the terms of the last loss.

        Raises:
            InputError: if the LLM was called without `labels`, and hence without distillation.
        """
        if self.distilled is None:
            return
        if not self.distilled.losses:
            raise InputError(
                f"`pruning.distillation` must be null unless {type(pl_module).__name__}.training_step calls the LLM "
                "with `labels`: return `self.model(input_ids=..., attention_mask=..., labels=...).loss`."
            )
        for name, value in self.distilled.losses.items():
            pl_module.log(f"train/{name}", value)
        self.distilled.losses = {}


def _digest(model: nn.Module) -> str:
    """Returns the SHA-256 of all weights of ``model``."""
    lines = (f"{name} {digest(tensor)}" for name, tensor in model.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
