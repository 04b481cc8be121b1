"""The loss of a student, put in the place of its own."""

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


class Distilled:
    """A forward hook of the student: a `loss` of its own that carries gradients becomes that of a distillation.

    Args:
        distillation: What is asked for.
        kept: The teacher.

    Attributes:
        seen: `cross_entropy` and `distillation` (T^2 * KL) of the last batch, nats a position; empty before one came.
    """

    def __init__(self, distillation: Distillation, kept: TeacherState) -> None:
        self.distillation, self.kept = distillation, kept
        self.seen: dict[str, Tensor] = {}

    def put_on(self, student: PreTrainedModel) -> RemovableHandle:
        """Lets ``student`` be taught; the handle's `remove` ends it."""
        return student.register_forward_hook(self, with_kwargs=True)

    def __call__(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Returns the output with another loss."""
        loss = getattr(output, "loss", output[0] if isinstance(output, tuple) else None)
        if loss is None or not loss.requires_grad:
            return None
        given = dict(zip(inspect.signature(student.forward).parameters, args, strict=False)) | kwargs
        counted_N = _counted(given, output)
        inputs = {name: x for name, x in given.items() if isinstance(x, Tensor) and name not in LABELS}
        temperature, weight = self.distillation.temperature, self.distillation.weight
        total = divergence(output.logits.flatten(0, -2), counted_N, self.kept.output(inputs), temperature)
        count = given.get("num_items_in_batch")
        mean = total / (counted_N.sum().clamp(min=1) if count is None else count)
        self.seen = {"cross_entropy": loss.detach(), "distillation": mean.detach()}
        output.loss = (1 - weight) * loss + weight * mean
        return output


def _counted(given: dict[str, Any], output: Any) -> Tensor:
    """Which positions the cross entropy counts, as transformers shifts its labels, all of the batch in a row."""
    shifted = given.get("shift_labels")
    if shifted is None:
        labels = given["labels"]
        shifted = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], IGNORED)], dim=-1)
    logits, given_to = getattr(output, "logits", None), given.get("input_ids")
    given_to = given.get("inputs_embeds") if given_to is None else given_to
    if logits is None or given_to is None or not logits.shape[:-1] == shifted.shape == given_to.shape[:2]:
        raise InputError(
            "`pruning.distillation` must see the logits of all positions: the LightningModule must call the LLM "
            "without `return_dict=False` and `logits_to_keep`."
        )
    return (shifted != IGNORED).flatten()
