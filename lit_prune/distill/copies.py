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

    If the recovery leaves the weights as they are (LoRA, MaskedLoRA) and there is a single cut by masks, only the
    linears that are cut are copied: embedding, norms and head are shared with the student. Otherwise all weights are
    copied. A step takes an additional forward pass of the dense model.

    Args:
        store: Data type of the copy: `same` as the student's weights, which is the dense model to the bit; `bfloat16`,
            which also computes in it, and shares nothing with a student of another type; `nf4`, which stores the
            linears that are cut in 4 bits, by bitsandbytes, and dequantises them one at a time in every pass.

    Raises:
        InputError: for an unknown data type.
    """

    stores: ClassVar[bool] = True

    store: Store = "same"

    def __post_init__(self) -> None:
        if self.store not in get_args(Store):
            raise InputError(f"`Copy.store` must be one of {', '.join(get_args(Store))}, got {self.store!r}.")

    def prepare(self, dense: DenseModel) -> TeacherState:
        """Returns the copy."""
        cut, parameters = cut_weights(dense.model, dense.student.recipe), dict(dense.model.named_parameters())
        half = self.store == "bfloat16" and dense.model.dtype != torch.bfloat16
        shares = dense.student.trained_beside and not half  # converting the copy would convert what it shares
        shared = {name: p for name, p in parameters.items() if shares and name not in cut}
        replacements, lazy_weights = dict(shared), {}
        for name in [
            name for name in parameters if name not in shared
        ]:  # one by one: no second model in full precision
            weight = _dense_weight(parameters[name], name, dense.weights)
            if self.store == "nf4" and name in cut:
                lazy_weights[name] = NF4Weight(weight)
                weight = weight[:0]
            replacements[name] = nn.Parameter(weight.to(torch.bfloat16 if half else weight.dtype, copy=True), False)
        teacher: Any = teacher_model_of(dense.model, replacements)
        return TeacherModel(teacher.to(torch.bfloat16) if half else teacher, shared, lazy_weights)


class NF4Weight(LazyWeight):
    """A weight in the 4 bits of NF4, with a scale in float32 for every 64 entries."""

    def __init__(self, weight: Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        state: Any
        # bitsandbytes reads the memory as it lies: a transposed view (Conv1D) must be contiguous first
        self.quantised, state = quantize_4bit(weight.detach().contiguous(), quant_type="nf4")
        self.state = state

    def materialise(self, device: torch.device) -> Tensor:
        """Returns the dequantised weight, in the type that it was quantised from."""
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
