"""What a fit must be whose weights are sharded over processes, by Lightning's ModelParallelStrategy (FSDP2)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from transformers import PreTrainedModel

from lit_prune.distill import Distillation
from lit_prune.distributed import shards_weights
from lit_prune.errors import InputError
from lit_prune.fit.fsdp import is_sharded
from lit_prune.recover import Recovery


def check_strategy(trainer: Trainer) -> None:
    """Refuses tensor parallelism, and checkpoints in many files, where weights are sharded; asks nothing elsewhere."""
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


def check_cuts(trainer: Trainer, last_step: int, recovery: Recovery | None, distillation: Distillation | None) -> None:
    """Refuses what cannot be done to weights that are sharded: a cut, quantising, and having a teacher."""
    if not shards_weights(trainer):
        return
    if last_step > 0:
        raise InputError(
            f"`pruning.at_step` must be 0 under ModelParallelStrategy, which shards the weights after that, got "
            f"{last_step}: cut at the start, or use ddp."
        )
    if recovery is not None and recovery.quantises:
        raise InputError(
            f"`pruning.recovery` must leave the weights in full precision under ModelParallelStrategy, got {recovery}: "
            "use MaskedLoRA or LoRA, or ddp."
        )
    if distillation is not None:
        raise InputError(
            f"`pruning.distillation` must be null under ModelParallelStrategy, got {distillation}: train on the text "
            "alone, or use ddp."
        )


def check_whole(model: PreTrainedModel) -> None:
    """Refuses a model that was sharded too early."""
    if is_sharded(model):
        raise InputError(
            "`model` must be whole when it is cut, and was sharded already: in your LightningModule shard it only in "
            "the call of `configure_model` that comes after `setup`, as PrunableLM does."
        )


def check_sharded(model: PreTrainedModel) -> None:
    """Refuses to train a model that should have been sharded, and whose gradients nobody would average."""
    if not is_sharded(model):
        raise InputError(
            "`model` must be sharded in `configure_model` under ModelParallelStrategy, and was not: do so in the call "
            "that comes after `setup`, by `lit_prune.fit.fsdp.shard(self.model, self.device_mesh['data_parallel'])`."
        )
