"""A quantised linear with a masked adapter: y = x W'^T with W' = (Q + scale B A) * M.

Q is the dequantised weight and M the mask stored beside it. Q has more zeros than M, because quantisation rounds small
weights to zero; these are trained. Q and W' are computed in the forward pass and again in the backward pass, one linear
at a time; only x, A and B are saved in between, and the weight stays quantised. The gradients are as in masked_linear.
"""

from __future__ import annotations

from typing import Any, NoReturn, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_prune.models.quantised import dequantised, mask
from lit_prune.recover.layers.masked_linear import MaskedLayer, adapted_weight, weight_gradient, zeroed


class QuantisedProduct(torch.autograd.Function):
    """x ((Q + scale B A) * M)^T, saving no matrix of the weight's size for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, module: Any) -> Tensor:
        """Returns y (..., O) of x (..., I), in the type of x."""
        ctx.save_for_backward(x, a_RI, b_OR)
        ctx.scale, ctx.module = scale, module
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, quantised_sum(module, a_RI, b_OR, scale).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of x, A and B."""
        x, a_RI, b_OR = ctx.saved_tensors
        dx = da_RI = db_OR = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = dy @ quantised_sum(ctx.module, a_RI, b_OR, ctx.scale).to(dy.dtype)
            if any(ctx.needs_input_grad[1:3]):
                grad_OI = _masked(weight_gradient(dy, x, a_RI.dtype), ctx.module)
                da_RI = (b_OR.T @ grad_OI) * ctx.scale
                db_OR = (grad_OI @ a_RI.T) * ctx.scale
        return dx, da_RI, db_OR, None, None


def quantised_sum(module: Any, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Returns (Q + scale B A) * M of a quantised linear, in the data type that it was quantised from."""
    return _masked(adapted_weight(dequantised(module), a_RI, b_OR, scale), module)


def _masked(values_OI: Tensor, module: Any) -> Tensor:
    """Sets ``values_OI`` to 0 wherever a quantised linear is pruned, in place, and returns it."""
    keep_OI = mask(module)
    assert keep_OI is not None, "a masked adapter needs the mask of its base layer"
    return zeroed(values_OI, keep_OI)


@final
class MaskedQuantised(MaskedLayer):
    """The layer over a quantised linear, masked by the mask that it stores."""

    def product(self, x: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        """Returns x W'^T."""
        return QuantisedProduct.apply(x, a_RI, b_OR, scale, self.get_base_layer())

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Returns W' as the forward pass uses it, (out, in), not quantised."""
        return quantised_sum(self.get_base_layer(), *self.adapter())

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises TypeError: peft's merge would fill the zeros and quantise the sum again."""
        raise TypeError("a masked adapter over a quantised weight can be merged by the export only.")
