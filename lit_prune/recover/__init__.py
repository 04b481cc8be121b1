"""What heals the model after the cut. One file a recovery; importing them here makes their short names resolve."""

from lit_prune.recover.base import Recovery, adapted_layers, adapter_config, merged_weight, rebuild, snapshot
from lit_prune.recover.lora import LoRA

__all__ = ["LoRA", "Recovery", "adapted_layers", "adapter_config", "merged_weight", "rebuild", "snapshot"]
