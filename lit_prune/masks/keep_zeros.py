"""keep_zeros: the zeros of a pruned model stay zero in training outside lit_prune, for example with Trainer or TRL."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, final

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.masks.freeze import freeze_zeros, gradient_mask
from lit_prune.masks.zeros import zeros
from lit_prune.models.quantised import quantisation


@final
class FrozenZeros:
    """The hooks of :func:`keep_zeros`; also a context manager that removes them at its end."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Removes the hooks; further training fills the zeros."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> FrozenZeros:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def keep_zeros(model: PreTrainedModel, *, blocks: str | None = None) -> FrozenZeros:
    """Freezes the zeros in the linears of the blocks, for training by any other code, and returns a handle.

    The gradients of these weights are set to zero, so that moments stay zero and a clipped norm does not count them.
    After every step of a ``torch.optim.Optimizer`` the weights are set to zero again, which matters only to optimizers
    that have momentum from before the call or that mix the gradients of different weights, such as Muon. Hooks belong
    to the parameters: FSDP and DeepSpeed replace these, and lose the hooks; DDP does not. In two lines::

        keep_zeros(model)
        Trainer(model, ...).train()

    Args:
        model: A causal LM, pruned by lit_prune or by another tool, whose weights are trained.
        blocks: Dotted path of the decoder layers, where they are not found by themselves.

    Returns:
        A handle whose ``remove`` ends the freeze.

    Raises:
        InputError: for a model with an adapter or with quantised weights, whose own weights are not trained; for a
            model whose blocks are frozen; and for one without zeros.
    """
    _check(model)
    handles = freeze_zeros(model, blocks=blocks)
    masked = [parameter for parameter in model.parameters() if gradient_mask(parameter) is not None]
    hooks = FrozenZeros([*handles, register_optimizer_step_post_hook(_zero_pruned)])
    if zeros(masked)[0] == 0:
        hooks.remove()
        what = "zeros in the linears of its blocks" if masked else "blocks that are trained"
        raise InputError(
            f"`model` must have {what}, got none: call `keep_zeros` on a pruned model, before training it."
        )
    return hooks


def _check(model: PreTrainedModel) -> None:
    if hasattr(model, "peft_config"):
        raise InputError(
            "`model` must have no adapter, got one: training an adapter leaves the zeros alone, and merging it fills "
            "them. An adapter that keeps them is trained by `lit-prune fit` with MaskedLoRA."
        )
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"`model` must be a Hugging Face model, got {type(model).__name__}.")
    if quantisation(model) is not None:
        raise InputError("`model` must be in full precision, got quantised weights, which are not trained.")


@torch.no_grad()
def _zero_pruned(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            mask = gradient_mask(parameter)
            if mask is not None:
                mask.mask_weight(parameter)
