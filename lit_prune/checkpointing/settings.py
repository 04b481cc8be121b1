"""The settings that a resumed run must share with the run that wrote its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_prune.distributed import shards_weights
from lit_prune.errors import InputError

Settings = dict[str, Any]
PROCESSES = "trainer.devices * trainer.num_nodes"


def run_settings(trainer: Trainer, pl_module: LightningModule) -> Settings:
    """Returns the settings of a training, by field, in types that JSON can hold.

    A LightningModule or data module adds its own settings with a method ``resume_settings()``.
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


def check_settings(settings: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
    """Raises InputError if ``settings`` differ from ``made_with``, those of the checkpoint; it names every field."""
    changed = {field: value for field, value in settings.items() if field in made_with and made_with[field] != value}
    if changed:
        raise InputError(_message(changed, made_with))


def _message(changed: Settings, made_with: Mapping[str, Any]) -> str:
    """Returns the message about the settings that changed: the first in full, then the others."""
    details = [(f"`{field}`", _difference(made_with[field], value)) for field, value in changed.items()]
    rest = "".join(f"; so must {field}, {values}" for field, values in details[1:])
    return (
        f"{details[0][0]} must be what the checkpoint was made with, {details[0][1]}{rest}; change "
        f"{'them' if rest else 'it'} back, or begin a new run."
    )


def _difference(before: Any, now: Any) -> str:
    """Returns both values as text, with long numbers rounded unless that makes them equal."""
    texts = ["null" if value is None else f"{value}" for value in (before, now)]
    short = [re.sub(r"\d+\.\d{7,}", lambda match: f"{float(match[0]):.6g}", text) for text in texts]
    before, now = short if short[0] != short[1] else texts
    return f"{before}, got {now}"
