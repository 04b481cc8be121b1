"""What a run that goes on from a checkpoint must have in common with the run that wrote it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_prune import structure
from lit_prune.errors import InputError
from lit_prune.sharded import shards

Settings = dict[str, Any]


def run_settings(trainer: Trainer, pl_module: LightningModule) -> Settings:
    """Returns the settings of a run's training by field, as JSON can hold them: how it is trained, what is read.

    A LightningModule and a data module may have settings of their own to say, by ``resume_settings()``.
    """
    settings: Settings = {
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.precision": str(trainer.precision),
        "trainer.devices * trainer.num_nodes": trainer.world_size,
        "trainer.strategy": "ModelParallelStrategy" if shards(trainer) else "one that keeps weights whole",
    }
    for part in (pl_module, getattr(trainer, "datamodule", None)):
        settings |= getattr(part, "resume_settings", dict)()
    return settings


def stored_run(path: str) -> dict[str, Any]:
    """Returns what the callback and the module stored of a run in the checkpoint at ``path``.

    Raises:
        InputError: if the file is no checkpoint of a fit with a DynamicPruningCallback.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a dozen kinds for a file that is none of its own
        raise InputError(f"`ckpt_path` must be a checkpoint of a fit, {path} cannot be read as one.") from error
    stored = checkpoint.get(structure.KEY) if isinstance(checkpoint, dict) else None
    if not stored or "settings" not in stored:
        raise InputError(
            f"`ckpt_path` must be a whole checkpoint of a fit with a DynamicPruningCallback, {path} is none; one that "
            "was saved with `save_weights_only` cannot be resumed."
        )
    return stored


def check_settings(settings: Settings, made_with: Settings) -> None:
    """Raises InputError for the first setting that is not what the checkpoint was made with."""
    for field, value in settings.items():
        if field in made_with and made_with[field] != value:
            raise InputError(
                f"`{field}` must be what the checkpoint was made with, {made_with[field]}, got {value}; change it "
                "back, or begin a new run."
            )
