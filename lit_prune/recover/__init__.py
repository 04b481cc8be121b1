"""Recoveries: ways to train a model after a cut; importing them here makes their short names resolve."""

from lit_prune.masks.freeze import freeze_zeros, freezes_zeros, gradient_masks, restore_gradient_masks
from lit_prune.recover.adapter import adapter_config, merged_weight, train_adapter
from lit_prune.recover.base import Recovery
from lit_prune.recover.full import FullFineTuning
from lit_prune.recover.lora import LoRA
from lit_prune.recover.masked_lora import MaskedLoRA
from lit_prune.recover.qlora import QLoRA
from lit_prune.recover.quantise import mark_quantised, quantise
from lit_prune.recover.rebuild import Snapshot

__all__ = [
    "FullFineTuning",
    "LoRA",
    "MaskedLoRA",
    "QLoRA",
    "Recovery",
    "Snapshot",
    "adapter_config",
    "freeze_zeros",
    "freezes_zeros",
    "gradient_masks",
    "mark_quantised",
    "merged_weight",
    "quantise",
    "restore_gradient_masks",
    "train_adapter",
]
