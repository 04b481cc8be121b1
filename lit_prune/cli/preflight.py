"""Checks before any work: the settings, the output folder, and the objects built from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_prune.callbacks.dynamic_pruning import DynamicPruningCallback
from lit_prune.callbacks.results import ResultsCallback, find_callback
from lit_prune.cli.defaults import OPTIONS_OF_A_CUT, first_given, option_values
from lit_prune.cli.failure import rank
from lit_prune.cli.signatures import WRITES
from lit_prune.data.datamodule import TextDataModule
from lit_prune.distributed import shards_weights
from lit_prune.errors import InputError
from lit_prune.export.plan import Outline
from lit_prune.fit.module import PrunableLM
from lit_prune.fit.preflight import (
    check_one_process,
    check_overfitting,
    check_processes,
    check_removes,
    check_resumed,
    check_scaled_gradients,
    check_trainer,
    check_without_weights,
    transformer_engine_error,
)
from lit_prune.models.families import supports_packing
from lit_prune.models.load import skeleton
from lit_prune.recover import LoRA, MaskedLoRA, QLoRA

ADAPTERS = (LoRA, MaskedLoRA, QLoRA)
METRICS = ("train/loss", "val/perplexity")  # logged by PrunableLM; callbacks can monitor them
OTHER_METRICS = ("train/distillation", "train/cross_entropy", "step", "epoch")
TRAINING = ("before", "recovery", "distillation")  # `prune` makes a cut of any `at_step` at once
OPTIONS_OF_TRAINING = tuple(f"--pruning.{name}" for name in TRAINING)
OPTIONS_OF_A_FOLDER = ("--format", "--export.")  # which the model is written to
OPTIONS_OF_A_MODEL = (*OPTIONS_OF_A_CUT, *OPTIONS_OF_TRAINING, *OPTIONS_OF_A_FOLDER)
MEASURE = ("validate", "test", "evaluate")


def check_effects(args: Sequence[str], verb: str, method: Namespace | None) -> None:
    """Raises InputError for an option that was given and has no effect for ``verb``.

    Args:
        args: The command line.
        verb: Its verb.
        method: The setting `pruning.method`.
    """
    values = option_values(args)
    if verb in MEASURE and (given := first_given(values, OPTIONS_OF_A_MODEL)):
        raise InputError(f"`{given}` must be left out for {verb}, which measures a model as it is.")
    if verb in ("prune", "score") and (given := first_given(values, OPTIONS_OF_TRAINING)):
        raise InputError(f"`{given}` must be left out for {verb}, which does not train: use `lit-prune fit`.")
    if verb == "score" and (given := first_given(values, ("--pruning.reconstruction", *OPTIONS_OF_A_FOLDER))):
        raise InputError(f"`{given}` must be left out for score, which writes no model: use `lit-prune prune`.")
    if verb == "fit" and method is None and (given := first_given(values, OPTIONS_OF_A_CUT)):
        raise InputError(
            f"`{given}` must be left out without `pruning.method`, which is null, so that nothing is cut: add "
            "`--pruning.method MLPWidth`, or another."
        )


def check_settings(config: Namespace, verb: str) -> None:
    """Checks the settings of ``verb`` that can be checked before any object is built from them.

    Raises:
        InputError: for a second DynamicPruningCallback, a barebones Trainer, an accelerator that this machine does not
            have, a precision that replaces the linears, an upload by a verb that writes no model, and a fit without an
            end.
    """
    if DynamicPruningCallback.__name__ in str(config.trainer.callbacks):
        raise InputError(
            "`trainer.callbacks` must not hold a DynamicPruningCallback: the group `pruning` configures it already."
        )
    if config.trainer.barebones:
        raise InputError(
            "`trainer.barebones` must be false: it switches off the logging and the checkpoints that every run needs."
        )
    if config.push_to_hub is not None and verb not in WRITES:
        raise InputError(f"`push_to_hub` must be left out for {verb}, which writes no model.")
    _check_accelerator(config.trainer.accelerator)
    # Lightning's plugin needs a package that is rarely installed, and says only that it is missing
    if str(config.trainer.precision).startswith("transformer-engine"):
        raise InputError(transformer_engine_error(config.trainer.precision))
    if verb == "fit":
        _check_end(config.trainer)


def _check_accelerator(name: object) -> None:
    """Checks that this machine has the accelerator, if that is given by its name."""
    if not isinstance(name, str) or name == "auto":
        return
    registered = AcceleratorRegistry.available_accelerators()
    available = {key for key in registered if AcceleratorRegistry[key]["accelerator"].is_available()}
    if name not in available and not (name == "gpu" and available & {"cuda", "mps"}):
        raise InputError(
            f"`trainer.accelerator` must be auto, or one that this machine has ({', '.join(sorted(available))}), got "
            f"{name}."
        )


def _check_end(trainer: Namespace) -> None:
    """Checks that training makes at least one step, and that it ends."""
    if trainer.max_steps < -1 or trainer.max_steps == 0:
        raise InputError(
            f"`trainer.max_steps` must be at least 1, or -1 for as many as `trainer.max_epochs` take, got "
            f"{trainer.max_steps}; `lit-prune prune` prunes without training."
        )
    # Lightning would train for 1000 epochs if nothing was given; fast_dev_run sets max_steps itself
    has_end = trainer.max_epochs not in (None, -1) or trainer.max_time is not None or trainer.fast_dev_run
    if trainer.max_steps == -1 and not has_end:
        raise InputError(
            "`trainer.max_steps` or `trainer.max_epochs` must be given, or `trainer.max_time` for a learning rate that "
            "does not decay. `lit-prune prune` prunes without training."
        )


def check_output(results: ResultsCallback, config: Namespace, verb: str) -> None:
    """Checks that the output folder is writable and that nothing in it would be overwritten."""
    # Lightning launches the other processes while the first runs, which may have made the folder by then
    if verb not in (*WRITES, "score", "evaluate") or rank() != 0:
        return
    results.folder.resume = results.folder.holds(config.get("ckpt_path"))
    results.folder.check()
    model = Path(config.output) / "model"
    if verb == "export" and model.exists() and not config.overwrite:
        raise InputError(
            f"`output` has a model already, {model}: choose another with `--output DIR`, or replace it with "
            "`--overwrite`."
        )


def check_objects(verb: str, trainer: Trainer, model: PrunableLM, datamodule: TextDataModule) -> None:
    """Checks that the model's config, the data and the recipe go together, before weights and text are read.

    Raises:
        InputError: for settings that contradict each other, or differ from those of the checkpoint.
    """
    pruning, results = find_callback(trainer, DynamicPruningCallback), find_callback(trainer, ResultsCallback)
    if verb == "fit":
        model.check_in_memory()
        check_trainer(pruning.fit_plan, trainer)
        _check_monitors(trainer)
        check_overfitting(trainer, datamodule)
        dtype = model.dtype_of_weights
        check_scaled_gradients(pruning.fit_plan, trainer, model.config.dtype if dtype == "auto" else dtype)
        if pruning.resume is not None:
            check_resumed(pruning.fit_plan, pruning.resume, trainer, model, datamodule)
    if verb in ("validate", "test") and shards_weights(trainer):
        raise InputError(f"`trainer.strategy` must not be ModelParallelStrategy for {verb}: use ddp.")
    if verb == "evaluate" and results.tasks is None:
        raise InputError("`tasks` must be given, such as `--tasks arc_easy,piqa`, got none.")
    if results.tasks is not None and rank() == 0:  # there is no other process yet
        results.check_tasks(datamodule.tokenizer, load=verb != "evaluate")
    if verb == "evaluate":  # reads no text of the data module
        return
    datamodule.check_vocabulary(model.config)
    prunes = pruning.fit_plan.recipe is not None and verb in ("fit", "prune", "score")
    if prunes:
        _check_pruning(verb, trainer)
    elif verb == "fit":
        _check_random_start(model, pruning)
    _check_packing(model, datamodule)
    if verb in ("fit", "prune", "score"):
        unloaded = skeleton(model.config, model.attn_implementation, model.trust_remote_code)
        check_without_weights(pruning.fit_plan, unloaded, datamodule, trains=verb == "fit")
        if verb != "score":
            check_removes(pruning.fit_plan, unloaded)
            results.check_format(pruning, unloaded, trains=verb == "fit", on_disk=model.on_disk)
            results.format.check_model(unloaded, datamodule.tokenizer)
    if verb == "export":
        _check_export(pruning, results, model, datamodule)
    _check_lengths(model, datamodule, pruning.fit_plan.calibration.seq_length if prunes else None)


def _check_export(
    pruning: DynamicPruningCallback, results: ResultsCallback, model: PrunableLM, datamodule: TextDataModule
) -> None:
    """Checks that the format can hold the model; the form of a checkpoint is checked when that is loaded."""
    if model.on_disk:
        raise InputError("`model.on_disk` must be false for export, which loads the whole model.")
    unloaded = skeleton(model.config, trust_remote_code=model.trust_remote_code)
    if pruning.resume is None:
        results.format.check(Outline.of(unloaded))
    results.format.check_model(unloaded, datamodule.tokenizer)


def _check_pruning(verb: str, trainer: Trainer) -> None:
    check_processes(trainer)
    if verb != "fit":
        check_one_process(trainer, verb)


def _check_random_start(model: PrunableLM, pruning: DynamicPruningCallback) -> None:
    if isinstance(pruning.fit_plan.recovery, ADAPTERS) and model.architecture is not None:
        raise InputError(
            "`pruning.recovery` must be null if `model.architecture` starts from random weights and nothing is pruned, "
            f"since an adapter leaves them frozen; got {pruning.fit_plan.recovery}."
        )


def _check_monitors(trainer: Trainer) -> None:
    """Checks the metrics that callbacks monitor, unless a callback of the user's own may log others."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if not all(type(callback).__module__.startswith(("lightning.", "lit_prune.")) for callback in callbacks):
        return
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(callback, (EarlyStopping, ModelCheckpoint)) and monitor not in (None, *METRICS, *OTHER_METRICS):
            raise InputError(
                f"`{type(callback).__name__}.monitor` must be one of {', '.join(METRICS)}, got {monitor!r}."
            )


def _check_packing(model: PrunableLM, datamodule: TextDataModule) -> None:
    instructions = datamodule.instructions
    if instructions is not None and instructions.packed and not supports_packing(model.config):
        raise InputError(
            f"`data.instructions.packed` must be false for the family {model.config.model_type!r}, whose attention "
            "would not keep the conversations of a window apart."
        )


def _check_lengths(model: PrunableLM, datamodule: TextDataModule, calibration: int | None) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = {
        "data.seq_length": datamodule.seq_length,
        "data.val_seq_length": datamodule.val_seq_length,
        "pruning.calibration.seq_length": calibration,
    }
    for field, length in lengths.items():
        if limit is not None and length is not None and length > limit:
            raise InputError(f"`{field}` must be at most {limit}, the model's limit, got {length}.")
