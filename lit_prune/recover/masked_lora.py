"""MaskedLoRA: a low-rank adapter that preserves the zeros, so that it can be merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from transformers import PreTrainedModel

from lit_prune.models import structure
from lit_prune.recover.adapter import add_adapter, check_detach, check_settings, check_targets, lora_config
from lit_prune.recover.base import ExportForm, Recovery


@final
@dataclass(frozen=True)
class MaskedLoRA(Recovery):
    """Freezes the pruned weights W and trains A and B of (W + alpha / r * B A) * M, where M is 0 wherever W is.

    Training and validation compute with the merged weights, and those are exported: plain weights with every pruned
    zero, which load without peft. A step takes one matrix product per linear more than LoRA's, for the gradient of the
    whole weight. Over another shape without masks, as that of a sliced model, the adapter is that of LoRA, which is
    merged as exactly and trained faster.

    Args:
        r: Rank.
        alpha: Numerator of the scale alpha / r.
        dropout: Share of A's columns (input channels) that a training step drops, in [0, 1). Dropout on the adapter's
            input, as in LoRA and over other shapes, would take one more matrix product.
        target_modules: Name suffixes of the linears that get an adapter; null selects all but the head, and in a
            mixture of fused experts only those of the attention: the experts are not trained.

    Raises:
        InputError: for a rank below 1, a dropout outside [0, 1), or target modules that match no linear that can have
            an adapter.
    """

    merge_keeps_zeros: ClassVar[bool] = True
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
        """Returns `merged`: a masked adapter keeps the zeros."""
        return "merged"

    def attach(self, model: PreTrainedModel) -> None:
        """Adds an adapter to ``model``, masked unless it has another shape without masks, and freezes the rest."""
        masked = structure.masked(model) or not structure.structures(model)
        add_adapter(model, lora_config(self, model), masked=masked)
