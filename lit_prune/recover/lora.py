"""LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685, through peft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from transformers import PreTrainedModel

from lit_prune.recover.adapter import add_adapter, check_detach, check_settings, check_targets, lora_config
from lit_prune.recover.base import ExportForm, Recovery


@final
@dataclass(frozen=True)
class LoRA(Recovery):
    """Freezes the pruned weights W and trains A and B of W + alpha / r * B A.

    For a masked model the adapter is exported beside the pruned weights, not merged: B A is dense, and adding it would
    fill every zero. MaskedLoRA can be merged.

    Args:
        r: Rank.
        alpha: Numerator of the scale alpha / r.
        dropout: Dropout on the adapter's input, in [0, 1).
        target_modules: Name suffixes of the linears that get an adapter; null selects all but the head, and in a
            mixture of fused experts only those of the attention: the experts are not trained.

    Raises:
        InputError: for a rank below 1, a dropout outside [0, 1), or target modules that match no linear that can have
            an adapter.
    """

    leaves_base: ClassVar[bool] = True

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    def check(self, model: PreTrainedModel) -> None:
        """Raises InputError for target modules that match no linear that can have an adapter."""
        check_targets(self, model)

    def check_detach(self, model: PreTrainedModel) -> None:
        """Raises InputError for an adapter on a head that is tied to the embedding."""
        check_detach(self, model)

    def export_form(self, masked: bool) -> ExportForm:
        """Returns `adapter` over masks, whose zeros a merge would fill; else `merged`."""
        return "adapter" if masked else "merged"

    def attach(self, model: PreTrainedModel) -> None:
        """Adds an adapter to ``model`` and freezes everything else."""
        add_adapter(model, lora_config(self, model))
