"""FullFineTuning: all weights are trained, and what is pruned stays zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.masks.freeze import freeze_zeros
from lit_prune.recover.base import Recovery


@final
@dataclass(frozen=True)
class FullFineTuning(Recovery):
    """Trains the whole model, or what was left trainable of it; gradients of pruned weights are zero.

    Any optimizer whose steps are made of gradients and weights (SGD, AdamW with weight decay, ...) then leaves them at
    zero, and its moments too. What was frozen before stays frozen.

    Raises:
        InputError: if the whole model is frozen.
    """

    folds_under_masks: ClassVar[bool] = True

    def check(self, model: PreTrainedModel) -> None:
        """Raises InputError where nothing of ``model`` can be trained."""
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError(
                "`pruning.recovery` must be a recovery that has something to train: FullFineTuning trains what the LLM "
                "leaves trainable, and all of it is frozen. Unfreeze it, or use MaskedLoRA."
            )

    def attach(self, model: PreTrainedModel) -> None:
        """Makes the zeros in the linears of the blocks stay zeros."""
        freeze_zeros(model)
