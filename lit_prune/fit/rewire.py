"""Reconnects a Trainer to a model whose parameters a cut has replaced."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from lit_prune.models.quantised import MASK


def rewire(trainer: Trainer) -> None:
    """Repeats the steps of Lightning's `strategy.setup`, in its order: precision, device, DDP, optimizers."""
    strategy: Any = trainer.strategy
    strategy.model = strategy.precision_plugin.convert_module(strategy.lightning_module)
    strategy.model_to_device()
    ignore_masks_in_ddp(strategy.lightning_module)
    if isinstance(strategy, DDPStrategy):  # the old wrapper's reducer holds the former parameters
        strategy.configure_ddp()
    strategy.setup_optimizers(trainer)  # calls `configure_optimizers`, whose schedule starts at the current step
    strategy.setup_precision_plugin()


def ignore_masks_in_ddp(pl_module: LightningModule) -> None:
    """Keeps DDP from broadcasting the masks of quantised weights in every step: they never change."""
    masks = [name for name, _ in pl_module.named_buffers() if name.rpartition(".")[2] == MASK]
    if masks:
        ignored = getattr(pl_module, "_ddp_params_and_buffers_to_ignore", [])  # set by the user's own module
        names = list(dict.fromkeys([*ignored, *masks]))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, names)
