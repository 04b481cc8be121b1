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
    """Trains the whole model, except for parameters that are frozen; gradients of pruned weights are zero.

    Any optimizer that computes its steps from gradients and weights (SGD, AdamW with weight decay, ...) then leaves
    pruned weights, and their moments, at zero. Parameters that were frozen before stay frozen.

    Raises:
        InputError: if the whole model is frozen.
    """

    folds_under_masks: ClassVar[bool] = True

    def check(self, model: PreTrainedModel) -> None:
        """Raises InputError if all parameters of ``model`` are frozen."""
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError(
                "`pruning.recovery` must be a recovery that has something to train: FullFineTuning trains what the LLM "
                "leaves trainable, and all of it is frozen. Unfreeze it, or use MaskedLoRA."
            )

    def export_form(self, masked: bool) -> ExportForm:
        """Returns `full precision`: there is no adapter."""
        return "full precision"

    def attach(self, model: PreTrainedModel) -> None:
        """Freezes the zeros in the linears of the blocks."""
        freeze_zeros(model)
