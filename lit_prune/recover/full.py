"""FullFineTuning: trains all weights, under gradient masks that keep pruned weights at zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.masks.freeze import freeze_zeros
from lit_prune.recover.base import ExportForm, Recovery


@final
@dataclass(frozen=True)
class FullFineTuning(Recovery):
    """Trains the whole model with the gradients of pruned weights set to zero.

    Any optimizer that computes its steps from gradients and weights (SGD, AdamW with weight decay, ...) then leaves
    pruned weights, and their moments, at zero. Parameters that are already frozen stay frozen.

    Raises:
        InputError: if the whole model is frozen.
    """

    merge_keeps_zeros: ClassVar[bool] = True

    def check(self, model: PreTrainedModel) -> None:
        """Raises InputError if all parameters of ``model`` are frozen."""
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError(
                "`pruning.recovery` must be a recovery that has something to train, got FullFineTuning for an LLM "
                "whose parameters are all frozen: unfreeze some, or use MaskedLoRA, which adds parameters."
            )

    def export_form(self, masked: bool) -> ExportForm:
        """Returns `full precision`: there is no adapter."""
        return "full precision"

    def attach(self, model: PreTrainedModel) -> None:
        """Freezes the zeros in the linears of the blocks."""
        freeze_zeros(model)
