"""The teacher of a run: made right before the first cut, asked in every step after it, restored by a resumed run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lit_prune.checkpointing.record import TeacherRecord
from lit_prune.distill import DenseModel, Distillation, DistillationHook, Student
from lit_prune.errors import InputError
from lit_prune.fit.batches import training_windows
from lit_prune.models.digest import digest


class Teaching:
    """The distillation of one run.

    Args:
        distillation: Its settings.
        student: What the LLM becomes.

    Raises:
        InputError: for a student that this teacher cannot teach.
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
        """Makes the teacher of the dense ``model``.

        Args:
            trainer: Its training loader and device.
            model: The LLM, right before the first cut.
            stored: Whether checkpoints hold the teacher, if it can be stored, because the source cannot give it again.
            weights: The teacher's weights in a checkpoint; None takes those of ``model``.
        """
        self._stored = stored and self.teacher.restorable
        self._digest = None if self._stored else _digest(model)
        device, temperature = trainer.strategy.root_device, self.distillation.temperature
        dense = DenseModel(model, self.student, temperature, device, lambda: training_windows(trainer), weights)
        self.distilled = DistillationHook(self.distillation, self.teacher.prepare(dense))

    def put_on(self, model: PreTrainedModel) -> None:
        """Adds the distillation to the loss of ``model`` from now on; a second call does nothing."""
        assert self.distilled is not None
        if self._handle is None:
            self._handle = self.distilled.register(model)

    def resume(self, trainer: Trainer, model: PreTrainedModel, record: TeacherRecord | None) -> None:
        """Restores the teacher of a checkpoint; ``model`` is fresh from its source.

        Raises:
            InputError: if that is not the model which taught.
        """
        if record is None:  # the first cut is still to come
            return
        self.begin(trainer, model, stored=record.weights is not None, weights=record.weights)
        if self._digest != record.digest:
            raise InputError(
                "`model.pretrained` must be the model that the checkpoint was made from, the dense model that teaches "
                "is another."
            )
        self.put_on(model)

    def record(self) -> TeacherRecord | None:
        """Returns what a checkpoint holds of the teacher; None before the first cut."""
        if self.distilled is None:
            return None
        return TeacherRecord(self._digest, self.distilled.teacher.weights() if self._stored else None)

    def check_begun(self) -> None:
        """Raises InputError where a run goes on after its first cut without a teacher: `setup` knew no checkpoint."""
        if self.distilled is None:
            raise InputError(
                "`trainer.ckpt_path` must be set before `trainer.fit` is called, where `pruning.distillation` is "
                "given: the teacher is made before the weights load."
            )

    def log(self, pl_module: LightningModule) -> None:
        """Logs the parts of the last loss.

        Raises:
            InputError: if the LLM was called without `labels`, and so without the distillation.
        """
        if self.distilled is None:
            return
        if not self.distilled.losses:
            raise InputError(
                f"`pruning.distillation` must see the LLM called with `labels`, {type(pl_module).__name__}."
                "training_step did not: return `self.model(input_ids=..., attention_mask=..., labels=...).loss`."
            )
        for name, value in self.distilled.losses.items():
            pl_module.log(f"train/{name}", value)
        self.distilled.losses = {}


def _digest(model: nn.Module) -> str:
    """Returns the SHA-256 of all weights."""
    lines = (f"{name} {digest(tensor)}" for name, tensor in model.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
