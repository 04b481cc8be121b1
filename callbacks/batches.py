"""The batches that a Trainer was given, asked for before its loops have set them up."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from transformers import PreTrainedModel

from lit_prune import processes
from lit_prune.calibrate import Batch, Calibration, batches_of, first_batches
from lit_prune.errors import InputError


def check_processes(trainer: Trainer) -> None:
    """Raises InputError for a strategy that cuts are not made under."""
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise InputError(
            f"`trainer.strategy` must be ddp for pruning on several devices, got {type(trainer.strategy).__name__}."
        )


def check_one_process(trainer: Trainer, verb: str) -> None:
    """Raises InputError on more than one process."""
    if trainer.world_size > 1:
        raise InputError(f"`trainer.devices` must be 1 for {verb}, which trains nothing, got {trainer.world_size}.")


def calibration_batches(trainer: Trainer, calibration: Calibration) -> tuple[list[Batch], dict[str, Any]]:
    """Returns windows of the data module's training text, or the first batches of the training dataloader.

    Beside them, what the report says of them: the settings, which text and tokenizer, and where in the text the windows
    begin.
    """
    datamodule, settings = getattr(trainer, "datamodule", None), asdict(calibration)
    described = getattr(datamodule, "describe", lambda _part: "training dataloader")("train")
    settings |= {"text": described, "tokenizer": getattr(datamodule, "tokenizer_name", None), "positions": None}
    if datamodule is not None and hasattr(datamodule, "calibration_windows"):
        windows = datamodule.calibration_windows(calibration.num_samples, calibration.seq_length, calibration.seed)
        return batches_of(windows, calibration.batch_size), settings | {"positions": windows.positions}
    return first_batches(_first_loader(trainer.fit_loop._data_source), calibration), settings


def named(settings: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Returns what of ``settings`` says which windows they are, and the model's name, for the key of statistics."""
    kept = {name: value for name, value in settings.items() if name not in ("positions", "batch_size")}
    return {"model": model.name_or_path} | {f"calibration.{name}": value for name, value in kept.items()}


def validation_data(trainer: Trainer) -> tuple[Iterable[Batch], str] | None:
    """Returns the validation batches that the Trainer's `limit_val_batches` leaves, and what they are; None without."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    if not source.is_defined() or trainer.limit_val_batches == 0:
        return None
    with processes.alone():  # all of it: whoever measures shares it out
        loader, limit = _first_loader(source), trainer.limit_val_batches
    described = getattr(getattr(trainer, "datamodule", None), "describe", lambda _part: "validation dataloader")("val")
    if isinstance(limit, float):
        if limit == 1.0:
            return loader, described
        limit = int(limit * len(loader))
    if limit < 1:
        raise InputError(
            f"`trainer.limit_val_batches` must leave at least one batch, {trainer.limit_val_batches} of {len(loader)} "
            "does not; 0 switches validation off."
        )
    return list(itertools.islice(loader, limit)), described


def _first_loader(source: Any) -> Any:
    """The dataloader that Lightning will ask its source for, of several the first: no public way is this early."""
    loader = source.dataloader()
    return loader[0] if isinstance(loader, (list, tuple)) else loader
