"""Checks of a fit before any work: the Trainer, the data, the checkpoint, and the model without its weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.calibration.windows import Batch
from lit_prune.checkpointing.resume import Resume
from lit_prune.checkpointing.settings import PROCESSES, Settings, run_settings
from lit_prune.data.batches import calibration_settings, check_calibration, check_limits, statistics_key
from lit_prune.data.datamodule import TextDataModule
from lit_prune.distributed import shards_weights
from lit_prune.errors import InputError
from lit_prune.fit.plan import FitPlan
from lit_prune.pipeline import check_expected_statistics, check_search, check_statistics

COPIES = "its copy of the weights does not follow their changes"
UNSUPPORTED_CALLBACKS: dict[type[Callback], str] = {
    WeightAveraging: COPIES,
    StochasticWeightAveraging: COPIES,
    ModelPruning: "it replaces the weights that are pruned by its own products with masks",
}


def check_fit(plan: FitPlan, trainer: Trainer) -> None:
    """Raises InputError if ``trainer`` and its data cannot carry out ``plan``.

    If they can, all processes set the same number of threads, on which the order of sums depends.
    """
    check_trainer(plan, trainer)
    check_data(plan, trainer)
    if not plan.idle:
        distributed.agree_on_threads()


def check_trainer(plan: FitPlan, trainer: Trainer) -> None:
    """Raises InputError if ``trainer`` cannot carry out ``plan``, as far as that is known before any text is read."""
    _check_sharding(trainer)
    _check_finetuning(plan, trainer)
    if plan.idle:
        return
    _check_callbacks(trainer)
    check_processes(trainer)
    _check_precision(trainer)
    if trainer.max_steps != -1:
        plan.check_end(trainer.max_steps)
    _check_sharded_plan(plan, trainer)


def check_scaled_gradients(plan: FitPlan, trainer: Trainer, dtype: torch.dtype | str | None) -> None:
    """Raises InputError if weights in float16 would be trained in `16-mixed`, whose scaler refuses their gradients.

    On a CPU, Lightning replaces `16-mixed` by `bf16-mixed`, which has no scaler.

    Args:
        plan: The fit plan.
        trainer: The Trainer.
        dtype: Data type of the LLM's weights, or its name; None if it is not known.
    """
    recoveries = (plan.before, plan.recovery) if plan.last_step > 0 else (plan.recovery,)
    adapts = all(recovery is not None and (recovery.leaves_base or recovery.quantises) for recovery in recoveries)
    is_float16 = str(dtype).removeprefix("torch.") == "float16"
    if is_float16 and not adapts and getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise InputError(
            f"`trainer.precision` must not be {trainer.precision} for weights in float16 that are trained themselves: "
            "load them by `--model.dtype float32`, or leave the precision at 32-true, which trains a float32 copy."
        )


def check_data(plan: FitPlan, trainer: Trainer) -> None:
    """Raises InputError if the training data end before the last cut, or do not suffice for calibration."""
    check_overfitting(trainer, _datamodule(trainer))
    check_limits(trainer)
    _check_validation_interval(trainer)
    if not plan.idle and trainer.max_steps == -1:
        plan.check_end(trainer.estimated_stepping_batches)
    if plan.recipe is None or not plan.recipe.needs_text:
        return
    if plan.last_step > 0:  # a cut at step 0 reads them right away
        check_calibration(trainer, plan.calibration)
    if hasattr(_datamodule(trainer), "calibration_windows"):
        distributed.check_shards(plan.calibration.batches)


def check_resumed(plan: FitPlan, resume: Resume, trainer: Trainer, pl_module: LightningModule, datamodule: Any) -> None:
    """Raises InputError if ``resume`` is of another run, as far as that is known before any text is read."""
    settings = resume_settings(plan, trainer, pl_module) | getattr(datamodule, "expected_settings", dict)()
    settings.pop(PROCESSES)  # Lightning has not launched the other processes yet
    resume.check_settings(settings)
    resume.check_end(trainer.max_steps)


def resume_settings(plan: FitPlan, trainer: Trainer, pl_module: LightningModule) -> Settings:
    """Returns the settings that a resumed run must share with the first, by field."""
    return plan.settings() | run_settings(trainer, pl_module) | plan.length_settings(trainer)


def check_without_weights(plan: FitPlan, model: PreTrainedModel, datamodule: Any, *, trains: bool) -> None:
    """Raises InputError if the plan does not fit ``model``, whose weights are not loaded yet.

    Checked are the family and the rates that the method supports, names of linears, settings of
    adapters, and the text and versions of cached statistics.
    """
    known = plan.target_perplexity is None and not (plan.recipe is not None and plan.recipe.counts_bytes)
    if known:  # other targets depend on the weights, and on the type in which they are exported
        plan = plan.resolved(model)
    if plan.recipe is not None:
        plan.recipe.check_method(model, plan.recipe.sparsity if plan.recipe.is_resolved else 0.0)
        plan.recipe.find(model)
    for recovery in (plan.before, plan.recovery) if trains else ():
        if recovery is not None:
            recovery.check(model)
    if plan.statistics is not None and plan.recipe is not None:
        key = statistics_key(calibration_settings(datamodule, plan.calibration), model)
        check_expected_statistics(plan.statistics, model, plan.recipe, key)


def check_removes(plan: FitPlan, model: PreTrainedModel) -> None:
    """Raises InputError if the last cut is rounded to nothing, as far as that is known before the weights are."""
    if plan.recipe is not None and plan.target_perplexity is None and not plan.recipe.counts_bytes:
        plan.recipe.check_removes(model)


def check_caches(plan: FitPlan, model: PreTrainedModel, batches: list[Batch], settings: dict[str, Any]) -> None:
    """Raises InputError if cached statistics, or the losses of an earlier search, are of another model or text."""
    if plan.recipe is None:
        return
    if plan.statistics is not None:
        check_statistics(plan.statistics, model, batches, plan.recipe, statistics_key(settings, model))
    check_search(model, batches, plan.recipe)


def check_processes(trainer: Trainer) -> None:
    """Raises InputError for a strategy that does not support cuts."""
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)):
        raise InputError(
            "`trainer.strategy` must be ddp or ModelParallelStrategy for pruning on several devices, got "
            f"{type(trainer.strategy).__name__}."
        )


def check_one_process(trainer: Trainer, verb: str) -> None:
    """Raises InputError if there is more than one process."""
    if trainer.world_size > 1:
        raise InputError(f"`trainer.devices` must be 1 for {verb}, which trains nothing, got {trainer.world_size}.")


def check_overfitting(trainer: Trainer, datamodule: Any) -> None:
    """Raises InputError for `overfit_batches` with our data module, whose loader takes no other sampler."""
    batches = getattr(trainer, "overfit_batches", 0)  # Lightning sets it without declaring it
    if batches and isinstance(datamodule, TextDataModule):
        raise InputError(
            f"`trainer.overfit_batches` must be 0 with TextDataModule, got {batches}: train on a short text, or give "
            "`trainer.limit_train_batches`."
        )


def _check_finetuning(plan: FitPlan, trainer: Trainer) -> None:
    """Raises InputError for BackboneFinetuning without a `backbone`, or where a recovery says what is trained."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, BackboneFinetuning) for callback in callbacks):
        return
    if not plan.idle or not hasattr(trainer.lightning_module, "backbone"):
        raise InputError(
            "`trainer.callbacks` must not hold BackboneFinetuning, which freezes and later trains a module's "
            "`backbone`: here `pruning.recovery` says what is trained."
        )


def _check_callbacks(trainer: Trainer) -> None:
    """Raises InputError for callbacks that change weights, or keep a copy of them, beside a cut or an adapter."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        reasons = [reason for kind, reason in UNSUPPORTED_CALLBACKS.items() if isinstance(callback, kind)]
        if reasons:
            raise InputError(
                f"`trainer.callbacks` must not hold {type(callback).__name__} beside pruning or recovery: {reasons[0]}."
            )


def _check_precision(trainer: Trainer) -> None:
    """Raises InputError for precision plugins that replace the linears, which then can be neither cut nor adapted."""
    if isinstance(trainer.precision_plugin, BitsandbytesPrecision):
        raise InputError(
            "`trainer.plugins` must not hold BitsandbytesPrecision, which quantises the linears before the cut: use "
            "`--pruning.recovery QLoRA`, which quantises them after it."
        )
    if isinstance(trainer.precision_plugin, TransformerEnginePrecision):
        raise InputError(transformer_engine_error("transformer-engine"))


def transformer_engine_error(precision: str) -> str:
    """Returns the error message for Transformer Engine as the Trainer's ``precision``."""
    return (
        f"`trainer.precision` must not be {precision}, which replaces the linears that are pruned: use bf16-mixed or "
        "bf16-true."
    )


def _check_validation_interval(trainer: Trainer) -> None:
    """Raises InputError for a `val_check_interval` longer than an epoch; Lightning checks it only after `setup`."""
    if type(trainer.val_check_interval) is not int or trainer.check_val_every_n_epoch is None:
        return
    try:
        trainer.fit_loop.setup_data()
    except ValueError as error:
        raise InputError(
            f"`trainer.val_check_interval` must be at most the number of batches of an epoch, got "
            f"{trainer.val_check_interval}; with `trainer.check_val_every_n_epoch=null` it counts batches over epochs."
        ) from error


def _check_sharding(trainer: Trainer) -> None:
    """Raises InputError for tensor parallelism and distributed checkpoints."""
    if not shards_weights(trainer):
        return
    strategy: Any = trainer.strategy
    sizes = {name: getattr(strategy, f"_{name}") for name in ("data_parallel_size", "tensor_parallel_size")}
    for (name, size), rule in zip(sizes.items(), (trainer.world_size, 1), strict=True):
        if size != rule:
            raise InputError(
                f"`trainer.strategy.init_args.{name}` must be {rule}, got {size}: weights are sharded over all "
                "processes, without tensor parallelism."
            )
    if strategy._save_distributed_checkpoint:
        raise InputError(
            "`trainer.strategy.init_args.save_distributed_checkpoint` must be false, got true: a checkpoint is one "
            "file, which is written atomically."
        )


def _check_sharded_plan(plan: FitPlan, trainer: Trainer) -> None:
    """Raises InputError for what sharded weights do not allow: cuts after step 0, quantisation and distillation."""
    if not shards_weights(trainer):
        return
    if plan.last_step > 0:
        raise InputError(
            f"`pruning.at_step` must be 0 under ModelParallelStrategy, since later the weights are sharded, got "
            f"{plan.last_step}: prune at the start, or use ddp."
        )
    if plan.recovery is not None and plan.recovery.quantises:
        raise InputError(
            f"`pruning.recovery` must leave the weights in full precision under ModelParallelStrategy, got "
            f"{plan.recovery}: use MaskedLoRA or LoRA, or ddp."
        )
    if plan.distillation is not None:
        raise InputError(
            f"`pruning.distillation` must be null under ModelParallelStrategy, got {plan.distillation}: train on the "
            "text alone, or use ddp."
        )


def _datamodule(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)
