"""What a run that goes on from a checkpoint must have in common with the run that wrote it."""

from __future__ import annotations

import re
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_prune.distributed import shards_weights
from lit_prune.errors import InputError
from lit_prune.models import structure

Settings = dict[str, Any]
PROCESSES = "trainer.devices * trainer.num_nodes"


def run_settings(trainer: Trainer, pl_module: LightningModule) -> Settings:
    """Returns the settings of a run's training by field, as JSON can hold them: how it is trained, what is read.

    A LightningModule and a data module may have settings of their own to say, by ``resume_settings()``.
    """
    settings: Settings = {
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.precision": str(trainer.precision),
        PROCESSES: trainer.world_size,
        "trainer.strategy": "ModelParallelStrategy" if shards_weights(trainer) else "one that keeps weights whole",
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
    """Raises InputError that names every setting that is not what the checkpoint was made with."""
    others = {field: value for field, value in settings.items() if field in made_with and made_with[field] != value}
    if others:
        raise InputError(_message(others, made_with))


def _message(others: Settings, made_with: Settings) -> str:
    """What differs: the first in full, the rest after it."""
    told = [(f"`{field}`", _differing(made_with[field], value)) for field, value in others.items()]
    rest = "".join(f"; so must {field}, {values}" for field, values in told[1:])
    return (
        f"{told[0][0]} must be what the checkpoint was made with, {told[0][1]}{rest}; change "
        f"{'them' if rest else 'it'} back, or begin a new run."
    )


def _differing(before: Any, now: Any) -> str:
    """Two values in words, with short numbers unless those are what differs."""
    texts = [f"{before}", f"{now}"]
    short = [re.sub(r"\d+\.\d{7,}", lambda found: f"{float(found[0]):.6g}", text) for text in texts]
    before, now = short if short[0] != short[1] else texts
    return f"{before}, got {now}"
