"""Batches of a Trainer's dataloaders, read before its loops have set those up."""

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

ValidationData = tuple[Iterable[Batch], str]  # batches, and their description


def calibration_batches(trainer: Trainer, calibration: Calibration) -> tuple[list[Batch], dict[str, Any]]:
    """Returns calibration batches and their description.

    The batches are windows of the data module's training text, or the first batches of the training dataloader. The
    description is for the report: the settings, the text, the tokenizer, and the positions of the windows in the text.
    """
    datamodule = getattr(trainer, "datamodule", None)
    settings = calibration_settings(datamodule, calibration)
    if datamodule is not None and hasattr(datamodule, "calibration_windows"):
        windows = datamodule.calibration_windows(calibration.num_samples, calibration.tokens, calibration.seed)
        return batches_of(windows, calibration.batch_size), settings | {"positions": windows.positions}
    loader = _first_loader(trainer.fit_loop._data_source)
    with _position_preserved(loader):
        return first_batches(loader, calibration), settings


def check_calibration(trainer: Trainer, calibration: Calibration) -> None:
    """Raises InputError if the training data cannot give the windows of a later :func:`calibration_batches`."""
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None and hasattr(datamodule, "calibration_windows"):
        datamodule.calibration_windows(calibration.num_samples, calibration.tokens, calibration.seed)
        return
    loader = _first_loader(trainer.fit_loop._data_source)
    with _random_states_preserved(loader):
        first_batches(loader, calibration)


def calibration_settings(datamodule: Any, calibration: Calibration) -> dict[str, Any]:
    """Returns the description of the calibration batches, without the positions, before any text is read."""
    description = getattr(datamodule, "describe", lambda _part: "training dataloader")("train")
    text = {"text": description, "tokenizer": getattr(datamodule, "tokenizer_name", None), "positions": None}
    return asdict(calibration) | {"seq_length": calibration.tokens} | text


def statistics_key(settings: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Returns the key of cached statistics: the name of the model and the ``settings`` that the windows depend on."""
    windows = {name: value for name, value in settings.items() if name not in ("positions", "batch_size")}
    return {"model": model.name_or_path} | {f"calibration.{name}": value for name, value in windows.items()}


def validation_data(trainer: Trainer) -> ValidationData | None:
    """Returns the validation batches that `limit_val_batches` allows, and their description; None without any."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    if not source.is_defined() or trainer.limit_val_batches == 0:
        return None
    with distributed.single_process():  # a loader of all batches, which `measure` distributes over the processes
        loader, limit = _first_loader(source), trainer.limit_val_batches
    describe = getattr(getattr(trainer, "datamodule", None), "describe", lambda _part: "validation dataloader")
    description = describe("val")
    if limit == 1.0 and isinstance(limit, float):
        return loader, description
    return list(itertools.islice(loader, _batches_allowed(loader, limit, "limit_val_batches"))), description


def check_limits(trainer: Trainer) -> None:
    """Checks that the Trainer's limits leave batches to train on and, unless that is switched off, to validate on.

    Raises:
        InputError: for an `accumulate_grad_batches` or `limit_train_batches` of 0, and for a share that leaves no batch
            or is of a loader without a length.
    """
    loop = trainer.fit_loop
    parts: tuple[tuple[str, Any, Any], ...] = (
        ("limit_train_batches", trainer.limit_train_batches, loop._data_source),
        ("limit_val_batches", trainer.limit_val_batches, loop.epoch_loop.val_loop._data_source),
    )
    if trainer.accumulate_grad_batches < 1:
        raise InputError(
            f"`trainer.accumulate_grad_batches` must be at least 1, got {trainer.accumulate_grad_batches}."
        )
    if trainer.limit_train_batches == 0:
        raise InputError("`trainer.limit_train_batches` must be above 0 for fit, which trains, got 0.")
    for field, limit, source in parts:
        if isinstance(limit, float) and 0 < limit < 1 and source.is_defined():
            _batches_allowed(_first_loader(source), limit, field)


def _batches_allowed(loader: Any, limit: int | float, field: str) -> int:
    """Returns the number of batches of ``loader`` that a limit of the Trainer allows; raises InputError for none."""
    if isinstance(limit, int) and limit > 0:
        return limit
    try:
        batches = len(loader)
    except (TypeError, NotImplementedError) as error:
        raise InputError(
            f"`trainer.{field}` must be a number of batches for a loader without a length, got {limit}."
        ) from error
    if int(limit * batches) < 1:
        raise InputError(f"`trainer.{field}` must leave at least one batch, {limit} of {batches} does not.")
    return int(limit * batches)


def training_windows(trainer: Trainer) -> Iterator[Batch]:
    """Yields the batches that the training will read, without changing their order in the training.

    If the order cannot be known beforehand, all batches of one epoch are yielded.

    Raises:
        InputError: for a loader without a length, and for a `limit_train_batches` that leaves no batch.
    """
    loader = _first_loader(trainer.fit_loop._data_source)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise InputError(
            f"`pruning.distillation.teacher` must not be TopK unless the training loader is a DataLoader of a data "
            f"set with a length, got {type(loader).__name__}: use Copy."
        )
    limit, steps = trainer.limit_train_batches, trainer.max_steps * trainer.accumulate_grad_batches
    with _random_states_preserved(loader):
        if not isinstance(loader, ResumableLoader) or trainer.max_steps == trainer.max_epochs == -1:
            yield from loader
            return
        per_epoch = min(_batches_allowed(loader, limit, "limit_train_batches"), len(loader))
        remaining = steps if trainer.max_steps != -1 else per_epoch * (trainer.max_epochs or 1)
        for epoch in itertools.count():
            loader.ordered.set_epoch(epoch)
            yield from itertools.islice(loader, min(per_epoch, remaining))
            remaining -= per_epoch
            covers_data = per_epoch == len(loader) and loader.ordered.num_replicas == 1
            if remaining <= 0 or covers_data:  # later epochs have the same windows
                return


@contextmanager
def _random_states_preserved(loader: DataLoader) -> Iterator[None]:
    """Restores the state of every random generator that ``loader`` draws from."""
    generators = {id(g): g for g in (loader.generator, getattr(loader.sampler, "generator", None)) if g is not None}
    states, before = {key: generator.get_state() for key, generator in generators.items()}, random_states()
    try:
        with _position_preserved(loader):
            yield
    finally:
        restore_random_states(before)
        for key, generator in generators.items():
            generator.set_state(states[key])


def _position_preserved(loader: Any) -> AbstractContextManager[None]:
    return loader.position_preserved() if isinstance(loader, ResumableLoader) else nullcontext()


def _first_loader(source: Any) -> Any:
    """Returns the first dataloader of a Trainer's data source, to which Lightning has no public access in `setup`."""
    loader = source.dataloader()
    return loader[0] if isinstance(loader, (list, tuple)) else loader
