"""The checkpoint that a run is resumed from, opened once and shared by all who read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.checkpointing.record import RunRecord
from lit_prune.checkpointing.settings import check_settings
from lit_prune.checkpointing.weights import restore_weights
from lit_prune.errors import InputError
from lit_prune.models.structure import KEY


class Resume:
    """A checkpoint that a run is resumed from, or that is exported.

    The command opens the file before it builds any object, so that a checkpoint of another run is refused at once, and
    passes it to the DynamicPruningCallback, whose `setup` comes before Lightning opens the file itself.

    The model is rebuilt once from the checkpoint. In a fit the callback's `setup` does that: a teacher has to be built
    from the dense model before it, and the model may be sharded after it. For validate, test and export the module's
    `on_load_checkpoint` does, since the callback's `setup` does nothing there.

    Args:
        checkpoint: Lightning's checkpoint, as a dict.
        path: Path of the file.

    Attributes:
        record: The record of the run in the checkpoint.
        step: Number of optimizer steps before it.
    """

    def __init__(self, checkpoint: Mapping[str, Any], path: str | None = None) -> None:
        self.path, self.record = path, RunRecord.read_from(checkpoint)
        self._checkpoint = checkpoint
        self.step: int = checkpoint["global_step"]
        self._is_rebuilt = False

    @classmethod
    def open(cls, path: str) -> Resume:
        """Opens the checkpoint at ``path``, memory-mapped.

        Raises:
            InputError: if the file is not a checkpoint of a fit with a DynamicPruningCallback.
        """
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises a dozen types for files of other formats
            raise InputError(f"`ckpt_path` must be a checkpoint of a fit, {path} cannot be read as one.") from error
        stored = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
        fields = {field.name for field in dataclasses.fields(RunRecord)}
        # a file saved with `save_weights_only` has no record of the callback; another version's has other fields
        if not stored or stored.keys() != fields or stored["settings"] is None:
            raise InputError(
                f"`ckpt_path` must be a whole checkpoint of a fit with a DynamicPruningCallback, got {path}; one that "
                "was saved with `save_weights_only` cannot be resumed."
            )
        return cls(checkpoint, path)

    @classmethod
    def at(cls, path: str | PathLike[str] | None, opened: Resume | None) -> Resume | None:
        """Returns the checkpoint at ``path``, or ``opened`` if that is the same file; None without a path."""
        if not path:
            return None
        return opened if opened is not None and opened.path == str(path) else cls.open(str(path))

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raises InputError if ``settings`` differ from those that the checkpoint was saved with, and names them."""
        check_settings(settings, self.record.settings or {})

    def check_end(self, max_steps: int) -> None:
        """Raises InputError if a training of so many steps, without a limit if negative, has ended before."""
        if 0 <= max_steps < self.step:
            raise InputError(
                f"`trainer.max_steps` must be at least {self.step}, the step of the checkpoint, got {max_steps}."
            )

    def rebuild(self, model: PreTrainedModel, *, restores: bool = True) -> None:
        """Gives ``model`` the structure of the checkpoint, in place; a second call does nothing.

        Args:
            model: The LLM, just loaded from its source.
            restores: Whether to restore the weights that the checkpoint leaves out when its weights are loaded.
        """
        if self._is_rebuilt or self.record.snapshot is None:
            return
        self._is_rebuilt = True
        self.record.snapshot.rebuild(model)
        if not restores:
            return

        # the state dict has to be completed before Lightning loads it, and with a LightningModule that we do not
        # control, a hook of the LLM inside it is the only place for that
        def restore(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_args: Any) -> None:
            handle.remove()
            restore_weights(state_dict, module, prefix, self.record.dropped_weights or {})

        handle = model.register_load_state_dict_pre_hook(restore)

    def load(self, pl_module: LightningModule, callbacks: Sequence[Callback]) -> None:
        """Loads the weights into ``pl_module`` and the states of ``callbacks``, outside Lightning's loops.

        Raises:
            InputError: if the weights do not fit the model.
        """
        pl_module.on_load_checkpoint(dict(self._checkpoint))
        try:
            pl_module.load_state_dict(self._checkpoint["state_dict"])
        except RuntimeError as error:
            raise InputError(
                "`model.pretrained` must be the model that the checkpoint was made from; the weights do not fit those "
                f"of {self.path}."
            ) from error
        for callback in callbacks:
            if callback.state_key in self._checkpoint["callbacks"]:
                callback.load_state_dict(self._checkpoint["callbacks"][callback.state_key])
