"""Copy: a second, frozen model."""

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
    """Keeps a frozen copy of the dense model, and asks it anew in every step.

    Where a recovery trains beside the weights (LoRA, MaskedLoRA) and there is one cut of masks, only the linears that
    are cut are kept twice: embedding, norms and head are those of the student. Else all is kept twice. A step costs the
    dense model's forward pass more.

    Args:
        store: In which type it is kept: `same` as the student's weights, the dense model to the bit; `bfloat16`, which
            computes in it too, and shares nothing with a student of another type; `nf4`, the linears that are cut in 4
            bits by bitsandbytes, made whole one at a time in every pass.

    Raises:
        InputError: for a type that is none of these.
    """

    stores: ClassVar[bool] = True

    store: Store = "same"

    def __post_init__(self) -> None:
        if self.store not in get_args(Store):
            raise InputError(f"`Copy.store` must be one of {', '.join(get_args(Store))}, got {self.store!r}.")

    def keep(self, dense: DenseModel) -> TeacherState:
        """Returns the copy; a weight that is kept in another type is made into it by itself."""
        cut, every = cut_weights(dense.model, dense.student.recipe), dict(dense.model.named_parameters())
        half = self.store == "bfloat16" and dense.model.dtype != torch.bfloat16
        shares = dense.student.trained_beside and not half  # what is shared is not converted
        shared = {name: p for name, p in every.items() if shares and name not in cut}
        given, parts = dict(shared), {}
        for name in [name for name in every if name not in shared]:
            weight = _own(every[name], name, dense.weights)
            if self.store == "nf4" and name in cut:
                parts[name] = Packed(weight)
                weight = weight[:0]
            given[name] = nn.Parameter(weight.to(torch.bfloat16 if half else weight.dtype, copy=True), False)
        teacher = teacher_model_of(dense.model, given)
        return TeacherModel(teacher.to(torch.bfloat16) if half else teacher, shared, parts)  # type: ignore[arg-type]


class Packed(LazyWeight):
    """A weight in the 4 bits of NF4, 64 of them under one scale in float32."""

    def __init__(self, weight: Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        state: Any
        self.packed, state = quantize_4bit(weight.detach().contiguous(), quant_type="nf4")
        self.state = state

    def dense(self, device: torch.device) -> Tensor:
        """Returns the weight as the 4 bits have it, in the type that it had."""
        from bitsandbytes.functional import dequantize_4bit

        if self.packed.device != device:
            self.packed = self.packed.to(device)
            self.state.to(device)
        return dequantize_4bit(self.packed, self.state)

    def size_bytes(self) -> int:
        """Returns half a byte an entry, and those of the scales."""
        return self.packed.numel() + math.prod(self.state.absmax.shape) * self.state.absmax.element_size()


def _own(parameter: Tensor, name: str, weights: Mapping[str, Tensor] | None) -> Tensor:
    """A weight of the dense model, as a checkpoint has it or as it is."""
    return parameter.detach() if weights is None else weights[name].to(parameter.device, parameter.dtype)
