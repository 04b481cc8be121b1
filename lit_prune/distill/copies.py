"""Copy: a frozen copy of the dense model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from torch import Tensor, nn

from lit_prune.distill.base import DenseModel, Teacher, TeacherState
from lit_prune.distill.teacher_model import LazyWeight, TeacherModel, cut_weights, teacher_model_of
from lit_prune.errors import InputError

Store = Literal["same", "bfloat16", "nf4"]


@final
@dataclass(frozen=True)
class Copy(Teacher):
    """Keeps a frozen copy of the dense model, and runs it in every step.

    If the recovery leaves the weights as they are (LoRA, MaskedLoRA) and there is a single cut, by masks, only the
    linears that are cut are copied: embeddings, norms and head are shared with the student. Otherwise all weights are
    copied. A step takes an additional forward pass of the dense model.

    Args:
        store: Data type of the copy: `same` as the student's, which makes the copy the dense model bit for bit;
            `bfloat16`, in which it also computes, and which shares nothing with a student of another type; `nf4`, which
            stores the linears that are cut in 4 bits, by bitsandbytes, and dequantises them one at a time in every
            pass.

    Raises:
        InputError: for an unknown data type.
    """

    restorable: ClassVar[bool] = True

    store: Store = "same"

    def __post_init__(self) -> None:
        if self.store not in get_args(Store):
            raise InputError(f"`Copy.store` must be one of {', '.join(get_args(Store))}, got {self.store!r}.")

    def prepare(self, dense: DenseModel) -> TeacherState:
        """Returns the copy, which runs as a model of its own."""
        cut, parameters = cut_weights(dense.model, dense.student.recipe), dict(dense.model.named_parameters())
        converts = self.store == "bfloat16" and dense.model.dtype != torch.bfloat16
        shares = dense.student.keeps_uncut_weights and not converts  # a conversion would change the student's weights
        shared = {name: p for name, p in parameters.items() if shares and name not in cut}
        replacements, lazy_weights = dict(shared), {}
        # one weight at a time: there is never a second model in full precision
        for name in [name for name in parameters if name not in shared]:
            weight = _dense_weight(parameters[name], name, dense.weights)
            if self.store == "nf4" and name in cut:
                lazy_weights[name] = NF4Weight(weight)
                weight = weight[:0]
            replacements[name] = nn.Parameter(weight.to(torch.bfloat16 if converts else weight.dtype, copy=True), False)
        teacher: Any = teacher_model_of(dense.model, replacements)
        return TeacherModel(teacher.to(torch.bfloat16) if converts else teacher, shared, lazy_weights)


class NF4Weight(LazyWeight):
    """A weight quantised to NF4: 4 bits per entry, and a float32 scale for every 64 entries."""

    def __init__(self, weight: Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        state: Any
        # bitsandbytes ignores strides, so that a transposed view (Conv1D) has to be made contiguous first
        self.quantised, state = quantize_4bit(weight.detach().contiguous(), quant_type="nf4")
        self.state = state

    def materialise(self, device: torch.device) -> Tensor:
        """Returns the dequantised weight, in the data type that it was quantised from."""
        from bitsandbytes.functional import dequantize_4bit

        if self.quantised.device != device:
            self.quantised = self.quantised.to(device)
            self.state.to(device)
        return dequantize_4bit(self.quantised, self.state)

    def size_bytes(self) -> int:
        """Returns half a byte per entry, and the bytes of the scales."""
        return self.quantised.numel() + math.prod(self.state.absmax.shape) * self.state.absmax.element_size()


def _dense_weight(parameter: Tensor, name: str, weights: Mapping[str, Tensor] | None) -> Tensor:
    """Returns a weight of the dense model, from a checkpoint's ``weights`` if there are any."""
    return parameter.detach() if weights is None else weights[name].to(parameter.device, parameter.dtype)
