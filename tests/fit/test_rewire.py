"""The Trainer's optimizers and wrapper after parameters were replaced."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lit_prune.fit.rewire import ignore_masks_in_ddp, rewire
from lit_prune.models.quantised import MASK
from tests.callbacks.test_dynamic_pruning import QUIET, Foreign, loader


class Replace(Callback):
    """Puts another head into the LLM at step 2."""

    def __init__(self, rewires: bool) -> None:
        self.rewires = rewires

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            pl_module.model.lm_head = nn.Linear(32, 64, bias=False, dtype=torch.float64)
            if self.rewires:
                rewire(trainer)


def trained(rewires: bool) -> tuple[Trainer, nn.Parameter]:
    module = Foreign()
    module.model.lm_head.weight = nn.Parameter(module.model.lm_head.weight.detach().clone())  # untied
    trainer = Trainer(**QUIET, max_steps=3, enable_checkpointing=False, callbacks=[Replace(rewires)])
    trainer.fit(module.double(), loader())
    return trainer, module.model.lm_head.weight


def test_the_optimizer_trains_the_new_parameters() -> None:
    for rewires in (True, False):
        trainer, weight = trained(rewires)
        states = trainer.optimizers[0].state
        assert (weight in states) is rewires
        assert all(int(state["step"]) == 1 for state in states.values()) is rewires  # begun anew


def test_ddp_does_not_send_masks() -> None:
    module = Foreign()
    ignore_masks_in_ddp(module)
    assert not hasattr(module, "_ddp_params_and_buffers_to_ignore")
    module.model.lm_head.register_buffer(MASK, torch.ones(3))
    module._ddp_params_and_buffers_to_ignore = ["model.other"]  # type: ignore[assignment]
    for _ in range(2):
        ignore_masks_in_ddp(module)
        assert module._ddp_params_and_buffers_to_ignore == ["model.other", f"model.lm_head.{MASK}"]
