"""What is checked of a fit before its first batch: the Trainer, the checkpoint, the model without its weights."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.calibration.windows import Batch
from lit_prune.checkpointing.resume import Resume
from lit_prune.checkpointing.settings import PROCESSES, Settings, run_settings
from lit_prune.distributed import shards_weights
from lit_prune.errors import InputError
from lit_prune.fit.batches import calibration_settings, statistics_key
from lit_prune.fit.plan import FitPlan
from lit_prune.pipeline import check_expected_statistics, check_statistics


def check_fit(plan: FitPlan, trainer: Trainer) -> None:
    """Raises InputError for a Trainer, with its data, that cannot carry out ``plan``; lets processes compute alike."""
    check_trainer(plan, trainer)
    check_data(plan, trainer)
    if not plan.idle:
        distributed.agree_on_threads()


def check_trainer(plan: FitPlan, trainer: Trainer) -> None:
    """Raises InputError for a Trainer that cannot carry out ``plan``, as far as it is known before any text is read."""
    _check_sharding(trainer)
    if plan.idle:
        return
    check_processes(trainer)
    if trainer.max_steps != -1:
        plan.check_end(trainer.max_steps)
    _check_sharded_plan(plan, trainer)


def check_data(plan: FitPlan, trainer: Trainer) -> None:
    """Raises InputError for cuts that come after the end of the training data, and for too little to calibrate on."""
    if not plan.idle and trainer.max_steps == -1:
        plan.check_end(trainer.estimated_stepping_batches)
    if plan.recipe is not None and plan.recipe.needs_text and hasattr(_datamodule(trainer), "calibration_windows"):
        distributed.check_shards(-(-plan.calibration.num_samples // plan.calibration.batch_size))


def check_resumed(plan: FitPlan, resume: Resume, trainer: Trainer, pl_module: LightningModule, datamodule: Any) -> None:
    """Raises InputError for a checkpoint of another run, as far as that is known before any text is read."""
    settings = resume_settings(plan, trainer, pl_module) | getattr(datamodule, "expected_settings", dict)()
    settings.pop(PROCESSES)  # they do not know each other yet
    resume.check_settings(settings)


def resume_settings(plan: FitPlan, trainer: Trainer, pl_module: LightningModule) -> Settings:
    """Returns the settings that a resumed run must have in common with the first, by field."""
    return plan.settings() | run_settings(trainer, pl_module) | plan.length_settings(trainer)


def check_without_weights(plan: FitPlan, model: PreTrainedModel, datamodule: Any, *, trains: bool) -> None:
    """Raises InputError for what does not fit ``model``, whose weights are not loaded yet.

    These are names of linears, adapters, and cached statistics of another text or other versions.
    """
    if plan.recipe is not None:
        plan.recipe.find(model)
    for recovery in (plan.before, plan.recovery) if trains else ():
        if recovery is not None:
            recovery.check(model)
    if plan.stored is not None and plan.recipe is not None:
        key = statistics_key(calibration_settings(datamodule, plan.calibration), model)
        check_expected_statistics(plan.stored, model, plan.recipe, key)


def check_cached_statistics(
    plan: FitPlan, model: PreTrainedModel, batches: list[Batch], settings: dict[str, Any]
) -> None:
    """Raises InputError where the cached statistics are of another model or another text."""
    if plan.stored is not None and plan.recipe is not None:
        check_statistics(plan.stored, model, batches, plan.recipe, statistics_key(settings, model))


def check_processes(trainer: Trainer) -> None:
    """Raises InputError for a strategy that cuts are not made under."""
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)):
        raise InputError(
            "`trainer.strategy` must be ddp or ModelParallelStrategy for pruning on several devices, got "
            f"{type(trainer.strategy).__name__}."
        )


def check_one_process(trainer: Trainer, verb: str) -> None:
    """Raises InputError on more than one process."""
    if trainer.world_size > 1:
        raise InputError(f"`trainer.devices` must be 1 for {verb}, which trains nothing, got {trainer.world_size}.")


def _check_sharding(trainer: Trainer) -> None:
    """Refuses tensor parallelism, and checkpoints in many files, where weights are sharded."""
    if not shards_weights(trainer):
        return
    strategy: Any = trainer.strategy
    sizes = {name: getattr(strategy, f"_{name}") for name in ("data_parallel_size", "tensor_parallel_size")}
    for (name, size), rule in zip(sizes.items(), (trainer.world_size, 1), strict=True):
        if size != rule:
            raise InputError(
                f"`trainer.strategy.init_args.{name}` must be {rule}, got {size}: weights are sharded over all "
                "processes, and no product is."
            )
    if strategy._save_distributed_checkpoint:
        raise InputError(
            "`trainer.strategy.init_args.save_distributed_checkpoint` must be false, got true: a checkpoint is one "
            "file, which is there whole or not at all."
        )


def _check_sharded_plan(plan: FitPlan, trainer: Trainer) -> None:
    """Refuses what cannot be done to weights that are sharded: a later cut, quantising, and distillation."""
    if not shards_weights(trainer):
        return
    if plan.last_step > 0:
        raise InputError(
            f"`pruning.at_step` must be 0 under ModelParallelStrategy, which shards the weights after that, got "
            f"{plan.last_step}: cut at the start, or use ddp."
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
