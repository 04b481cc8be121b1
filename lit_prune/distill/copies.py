"""Copy: a second, frozen model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.distill.base import Dense, Kept, Teacher
from lit_prune.distill.twin import Part, Twin, cut_weights, twin_of
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

    def keep(self, dense: Dense) -> Kept:
        """Returns the copy."""
        cut = cut_weights(dense.model, dense.student.recipe)
        half = self.store == "bfloat16" and dense.model.dtype != torch.bfloat16
        shares = dense.student.trained_beside and not half  # what is shared is not converted
        shared = {name: p for name, p in dense.model.named_parameters() if shares and name not in cut}
        twin = twin_of(dense.model, shared)
        _load(twin, dense.weights or {})
        if half:
            twin.to(torch.bfloat16)  # type: ignore[arg-type]
        if self.store != "nf4":
            return Twin(twin, shared)
        return Twin(twin, shared, {name: Packed(twin.get_parameter(name)) for name in cut})


class Packed(Part):
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


@torch.no_grad()
def _load(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    own: dict[str, nn.Parameter] = dict(model.named_parameters())
    for name, tensor in weights.items():
        own[name].copy_(tensor)
