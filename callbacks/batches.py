"""The batches that a Trainer was given, asked for before its loops have set them up."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Trainer

from lit_prune.calibrate import Batch, Calibration, batches_of, first_batches
from lit_prune.errors import InputError

log = logging.getLogger("lit_prune")


def check_processes(trainer: Trainer) -> None:
    """Raises InputError on more than one process."""
    if trainer.world_size > 1:
        raise InputError(f"`pruning` works in one process so far, got {trainer.world_size}: `--trainer.devices 1`.")


def calibration_batches(trainer: Trainer, calibration: Calibration) -> list[Batch]:
    """Returns windows of the data module's training text, or the first batches of the training dataloader."""
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None and hasattr(datamodule, "calibration_windows"):
        windows = datamodule.calibration_windows(calibration.num_samples, calibration.seq_length, calibration.seed)
        log.info("Calibration windows begin at tokens %s of the training text.", windows.positions)
        return batches_of(windows, calibration.batch_size)
    return first_batches(_first_loader(trainer.fit_loop._data_source), calibration)


def validation_data(trainer: Trainer) -> tuple[Iterable[Batch], str] | None:
    """Returns the validation batches that the Trainer's `limit_val_batches` leaves, and what they are; None without."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    if not source.is_defined() or trainer.limit_val_batches == 0:
        return None
    loader, limit = _first_loader(source), trainer.limit_val_batches
    described = getattr(getattr(trainer, "datamodule", None), "describe", lambda _part: "validation dataloader")("val")
    if isinstance(limit, float):
        if limit == 1.0:
            return loader, described
        limit = int(limit * len(loader))
    return list(itertools.islice(loader, limit)), described


def _first_loader(source: Any) -> Any:
    """The dataloader that Lightning will ask its source for, of several the first: no public way is this early."""
    loader = source.dataloader()
    return loader[0] if isinstance(loader, (list, tuple)) else loader
