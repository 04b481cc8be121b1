"""The batches of a Trainer's dataloaders, read before its loops have set them up."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.calibration.windows import Batch, Calibration, batches_of, first_batches
from lit_prune.data.loaders import ResumableLoader
from lit_prune.errors import InputError
from lit_prune.random_states import random_states, restore_random_states

ValidationData = tuple[Iterable[Batch], str]  # batches, and what they are


def calibration_batches(trainer: Trainer, calibration: Calibration) -> tuple[list[Batch], dict[str, Any]]:
    """Returns windows of the data module's training text, or the first batches of the training dataloader.

    The second value describes them for the report: the settings, the text, the tokenizer, and where in the text the
    windows begin.
    """
    datamodule = getattr(trainer, "datamodule", None)
    settings = calibration_settings(datamodule, calibration)
    if datamodule is not None and hasattr(datamodule, "calibration_windows"):
        windows = datamodule.calibration_windows(calibration.num_samples, calibration.tokens, calibration.seed)
        return batches_of(windows, calibration.batch_size), settings | {"positions": windows.positions}
    loader = _first_loader(trainer.fit_loop._data_source)
    with _aside(loader):
        return first_batches(loader, calibration), settings


def calibration_settings(datamodule: Any, calibration: Calibration) -> dict[str, Any]:
    """Returns the description of calibration windows as far as it is known before any text is read."""
    described = getattr(datamodule, "describe", lambda _part: "training dataloader")("train")
    text = {"text": described, "tokenizer": getattr(datamodule, "tokenizer_name", None), "positions": None}
    return asdict(calibration) | {"seq_length": calibration.tokens} | text


def statistics_key(settings: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Returns the names of the model and of the windows in ``settings``, which cached statistics are known by."""
    windows = {name: value for name, value in settings.items() if name not in ("positions", "batch_size")}
    return {"model": model.name_or_path} | {f"calibration.{name}": value for name, value in windows.items()}


def validation_data(trainer: Trainer) -> ValidationData | None:
    """Returns the validation batches that the Trainer's `limit_val_batches` leaves, and what they are; None without."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    if not source.is_defined() or trainer.limit_val_batches == 0:
        return None
    with distributed.single_process():  # all batches: the measurement shares them out itself
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


def training_windows(trainer: Trainer) -> Iterator[Batch]:
    """Yields the batches that the training will see, and leaves the order of the training as it is.

    Where the order is not known ahead, all batches of one epoch.

    Raises:
        InputError: for a loader without an end, and for a `limit_train_batches` that leaves none of its batches.
    """
    loader = _first_loader(trainer.fit_loop._data_source)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise InputError(
            f"`pruning.distillation.teacher` must not be TopK for a training loader that is no DataLoader of a data "
            f"set with a length, got {type(loader).__name__}: use Copy."
        )
    limit, steps = trainer.limit_train_batches, trainer.max_steps * trainer.accumulate_grad_batches
    with _undrawn(loader):
        if not isinstance(loader, ResumableLoader) or trainer.max_steps == trainer.max_epochs == -1:
            yield from loader
            return
        each = int(limit * len(loader)) if isinstance(limit, float) else min(limit, len(loader))
        if each < 1:
            raise InputError(
                f"`trainer.limit_train_batches` must leave at least one batch, {limit} of {len(loader)} does not."
            )
        left = steps if trainer.max_steps != -1 else each * (trainer.max_epochs or 1)
        for epoch in itertools.count():
            loader.ordered.set_epoch(epoch)
            yield from itertools.islice(loader, min(each, left))
            left -= each
            has_all = each == len(loader) and loader.ordered.num_replicas == 1
            if left <= 0 or has_all:  # no other window comes in a later epoch
                return


@contextmanager
def _undrawn(loader: DataLoader) -> Iterator[None]:
    """Puts every random generator that ``loader`` draws from back where it was."""
    generators = {id(g): g for g in (loader.generator, getattr(loader.sampler, "generator", None)) if g is not None}
    states, before = {key: generator.get_state() for key, generator in generators.items()}, random_states()
    try:
        with _aside(loader):
            yield
    finally:
        restore_random_states(before)
        for key, generator in generators.items():
            generator.set_state(states[key])


def _aside(loader: Any) -> AbstractContextManager[None]:
    return loader.position_preserved() if isinstance(loader, ResumableLoader) else nullcontext()


def _first_loader(source: Any) -> Any:
    """Returns the dataloader, of several the first; this early Lightning has no public way to it."""
    loader = source.dataloader()
    return loader[0] if isinstance(loader, (list, tuple)) else loader
