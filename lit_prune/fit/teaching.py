"""The teacher of a run: made right before the first cut, asked in every step after it, made again by a resumed run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lit_prune.checkpointing.resume import Settings
from lit_prune.distill import DenseModel, Distillation, DistillationHook, Student
from lit_prune.errors import InputError
from lit_prune.fit.batches import training_windows
from lit_prune.models.digest import digest


class Teaching:
    """A distillation while a run lasts.

    Args:
        distillation: What is asked for.
        student: What becomes of the LLM.

    Raises:
        InputError: for a student that cannot be taught so.
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
            stored: Whether checkpoints must hold the teacher, where that is possible, since its source has it not.
            weights: The teacher's, from a checkpoint, in the place of the model's.
        """
        self._stored = stored and self.teacher.stores
        self._digest = None if self._stored else _digest(model)
        device, temperature = trainer.strategy.root_device, self.distillation.temperature
        dense = DenseModel(model, self.student, temperature, device, lambda: training_windows(trainer), weights)
        self.distilled = DistillationHook(self.distillation, self.teacher.prepare(dense))

    def put_on(self, model: PreTrainedModel) -> None:
        """Lets ``model`` be taught from now on, if it is not yet."""
        assert self.distilled is not None
        if self._handle is None:
            self._handle = self.distilled.register(model)

    def settings(self, trainer: Trainer) -> Settings:
        """Returns what a resumed run must have in common with the first beside what any run must: its length."""
        fields = ("max_steps", "max_epochs", "limit_train_batches") if self.teacher.reads else ()
        return {f"trainer.{field}": getattr(trainer, field) for field in fields}

    def resume(self, trainer: Trainer, model: PreTrainedModel, state: dict[str, Any] | None) -> None:
        """Makes the teacher again that :meth:`state` told of; ``model`` is fresh from its source."""
        if state is None:  # the first cut is still to come
            return
        weights = state["weights"]
        self.begin(trainer, model, stored=weights is not None, weights=weights)
        if self._digest != state["digest"]:
            raise InputError(
                "`model.pretrained` must be the model that the checkpoint was made from, the dense model that teaches "
                "is another."
            )
        self.put_on(model)

    def state(self) -> dict[str, Any] | None:
        """Returns what a checkpoint must hold: a digest of the dense model, or the teacher's weights."""
        if self.distilled is None:
            return None
        return {"digest": self._digest, "weights": self.distilled.teacher.weights() if self._stored else None}

    def check_begun(self) -> None:
        """Raises InputError where a run goes on after its first cut, and was told so too late to have its teacher."""
        if self.distilled is None:
            raise InputError(
                "`trainer.ckpt_path` must be set before `trainer.fit` is called, where `pruning.distillation` is "
                "given: the teacher is made before the weights load."
            )

    def log(self, pl_module: LightningModule) -> None:
        """Logs the parts of the last loss.

        Raises:
            InputError: if the LLM was not called in such a way that it could be taught.
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
    """The SHA-256 of all weights."""
    every = (f"{name} {digest(tensor)}" for name, tensor in model.state_dict().items())
    return hashlib.sha256("\n".join(every).encode()).hexdigest()
