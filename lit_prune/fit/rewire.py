"""The wiring of a Trainer around a model whose parameters a cut has replaced."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from lit_prune.models.quantised import MASK


def rewire(trainer: Trainer) -> None:
    """Does again what Lightning did with the parameters in `strategy.setup`: precision, device, DDP, optimizers."""
    strategy: Any = trainer.strategy
    strategy.model = strategy.precision_plugin.convert_module(strategy.lightning_module)
    strategy.model_to_device()
    ignore_masks_in_ddp(strategy.lightning_module)
    if isinstance(strategy, DDPStrategy):  # its wrapper holds the parameters that were trained before
        strategy.configure_ddp()
    strategy.setup_optimizers(trainer)  # asks the module for an optimizer and a schedule from this step on
    strategy.setup_precision_plugin()


def ignore_masks_in_ddp(pl_module: LightningModule) -> None:
    """Keeps DDP from sending the masks of quantised weights in every step: all processes have the same for good."""
    masks = [name for name, _ in pl_module.named_buffers() if name.rpartition(".")[2] == MASK]
    if masks:
        others = getattr(pl_module, "_ddp_params_and_buffers_to_ignore", [])  # a foreign module may name some itself
        names = list(dict.fromkeys([*others, *masks]))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, names)
