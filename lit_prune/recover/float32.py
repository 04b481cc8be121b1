"""A linear that stays in float32, for parameters that are trained inside a model of any data type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, final

import torch
from torch import Tensor, nn


@final
class Float32Linear(nn.Linear):
    """An ``nn.Linear`` whose floating-point parameters stay in float32 (or float64) when the model is cast.

    Lightning's `precision: bf16-true` and `16-true` cast the whole module before the first step, and so would undo a
    cast of the parameters that a resumed run has restored by then.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Returns a linear with the parameters of ``linear``, cast to float32 at least."""
        with torch.device("meta"):
            wide = cls(linear.in_features, linear.out_features, linear.bias is not None)
        for name, parameter in linear.named_parameters():
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            setattr(wide, name, nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad))
        return wide.train(linear.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_type(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype in (torch.float32, torch.float64) else tensor.to(moved.device)

        return super()._apply(keep_type, recurse)
