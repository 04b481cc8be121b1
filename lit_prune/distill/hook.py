"""The forward hook that replaces the student's loss by the loss of the distillation."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lit_prune.distill.base import TeacherState
from lit_prune.distill.distillation import Distillation
from lit_prune.distill.loss import divergence
from lit_prune.errors import InputError

LABELS = ("labels", "shift_labels", "num_items_in_batch")
IGNORED = -100


class DistillationHook:
    """A forward hook that replaces the student's `loss` by the loss of the distillation, if it requires gradients.

    A hook on the LLM works with any LightningModule that trains on the `loss` that the LLM returns. Validation, which
    runs without gradients, still gets the cross entropy.

    Args:
        distillation: The settings.
        teacher: The teacher's state.

    Attributes:
        losses: `cross_entropy` and `distillation` (T^2 * KL) of the last batch, nats per position; empty at first.
    """

    def __init__(self, distillation: Distillation, teacher: TeacherState) -> None:
        self.distillation, self.teacher = distillation, teacher
        self.losses: dict[str, Tensor] = {}

    def register(self, student: PreTrainedModel) -> RemovableHandle:
        """Registers the hook on ``student`` and returns the handle that removes it."""
        return student.register_forward_hook(self, with_kwargs=True)

    def __call__(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Returns the output with its loss replaced, or None to leave it as it is."""
        loss = getattr(output, "loss", output[0] if isinstance(output, tuple) else None)
        if loss is None or not loss.requires_grad:
            return None
        arguments = dict(zip(inspect.signature(student.forward).parameters, args, strict=False)) | kwargs
        counted_N = _counted_positions(arguments, output)
        inputs = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and name not in LABELS}
        temperature, weight = self.distillation.temperature, self.distillation.weight
        total = divergence(output.logits.flatten(0, -2), counted_N, self.teacher.output(inputs), temperature)
        count = arguments.get(
            "num_items_in_batch"
        )  # as in transformers, it replaces the number of positions as the divisor of the sum
        mean = total / (counted_N.sum().clamp(min=1) if count is None else count)
        self.losses = {"cross_entropy": loss.detach(), "distillation": mean.detach()}
        output.loss = (1 - weight) * loss + weight * mean
        return output


def _counted_positions(arguments: dict[str, Any], output: Any) -> Tensor:
    """Returns the mask of the flattened positions that count, with the labels shifted as in transformers."""
    shifted = arguments.get("shift_labels")
    if shifted is None:
        labels = arguments["labels"]
        shifted = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], IGNORED)], dim=-1)
    logits, tokens = getattr(output, "logits", None), arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    if logits is None or tokens is None or not logits.shape[:-1] == shifted.shape == tokens.shape[:2]:
        raise InputError(
            "`pruning.distillation` must see the logits of all positions, got others: let the LightningModule call the "
            "LLM without `return_dict=False` and `logits_to_keep`."
        )
    return (shifted != IGNORED).flatten()
