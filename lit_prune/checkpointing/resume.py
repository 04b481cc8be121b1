"""The checkpoint that a run goes on from, opened once and handed to everyone who needs a part of it."""

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
    """A checkpoint that a run goes on from, or that is exported.

    The command opens it before anything is made, so that a checkpoint of another run is refused in a second, and hands
    it to the callback, whose `setup` comes before Lightning opens the file on its own. The model is rebuilt from it
    once: by the callback's `setup` in a fit, which makes the teacher of the dense model first and shards the rebuilt
    one after it; by the module's `on_load_checkpoint` in validate, test and export, which have no such `setup`.

    Args:
        checkpoint: Lightning's checkpoint, as a dict.
        path: Where it lies.

    Attributes:
        record: What the run stored of itself.
    """

    def __init__(self, checkpoint: Mapping[str, Any], path: str | None = None) -> None:
        self.path, self.record = path, RunRecord.read_from(checkpoint)
        self._checkpoint = checkpoint
        self._is_rebuilt = False

    @classmethod
    def open(cls, path: str) -> Resume:
        """Opens the checkpoint at ``path``; tensors are read when they are used.

        Raises:
            InputError: if the file is no checkpoint of a fit with a DynamicPruningCallback.
        """
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises a dozen kinds for a file that is not its own
            raise InputError(f"`ckpt_path` must be a checkpoint of a fit, {path} cannot be read as one.") from error
        stored = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
        fields = {field.name for field in dataclasses.fields(RunRecord)}
        # Lightning leaves callbacks out of a file with weights alone; another version may have stored other fields
        if not stored or stored.keys() != fields or stored["settings"] is None:
            raise InputError(
                f"`ckpt_path` must be a whole checkpoint of a fit with a DynamicPruningCallback, {path} is none; one "
                "that was saved with `save_weights_only` cannot be resumed."
            )
        return cls(checkpoint, path)

    @classmethod
    def at(cls, path: str | PathLike[str] | None, opened: Resume | None) -> Resume | None:
        """Returns the checkpoint at ``path``, None without a path; it is not opened again if it is ``opened``."""
        if not path:
            return None
        return opened if opened is not None and opened.path == str(path) else cls.open(str(path))

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raises InputError that names every setting that is not what the checkpoint was made with."""
        check_settings(settings, self.record.settings or {})

    def rebuild(self, model: PreTrainedModel, *, restores: bool = True) -> None:
        """Gives ``model``, fresh from its source, the structure of the checkpoint; a second call does nothing.

        Args:
            model: The LLM.
            restores: Whether the weights that the checkpoint leaves out are put back when its weights are loaded.
        """
        if self._is_rebuilt or self.record.snapshot is None:
            return
        self._is_rebuilt = True
        self.record.snapshot.rebuild(model)
        if not restores:
            return

        # `load_state_dict` of a foreign LightningModule offers no other place than a hook of the LLM inside it
        def restore(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_args: Any) -> None:
            handle.remove()
            restore_weights(state_dict, module, prefix, self.record.dropped_weights or {})

        handle = model.register_load_state_dict_pre_hook(restore)

    def load(self, pl_module: LightningModule, callbacks: Sequence[Callback]) -> None:
        """Loads the weights into ``pl_module``, and the states of ``callbacks``, outside Lightning's loops.

        Raises:
            InputError: if the weights do not fit the model.
        """
        pl_module.on_load_checkpoint(dict(self._checkpoint))
        try:
            pl_module.load_state_dict(self._checkpoint["state_dict"])
        except RuntimeError as error:
            raise InputError(
                "`model.pretrained` must be the model that the checkpoint was made from, its weights do not fit: "
                f"{self.path}."
            ) from error
        for callback in callbacks:
            if callback.state_key in self._checkpoint["callbacks"]:
                callback.load_state_dict(self._checkpoint["callbacks"][callback.state_key])
