"""A linear with a masked adapter: y = x W'^T with W' = (W + scale B A) * M, M = (W != 0).

The product B A of plain LoRA is dense, and adding it fills every zero of a pruned W. Here the sum is masked before the
input is multiplied by it, so training uses exactly the weight that a merge gives. The gradients, with G = (dy^T x) * M:

    dx = dy W',    dA = scale B^T G,    dB = scale G A^T

G takes a third matrix product besides the two that plain LoRA on a frozen W takes. W' and G are computed when needed
and freed at once: only x and the parameters are saved for the backward pass.
Suffixes: O output channels, I input channels, R rank, P positions.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, final

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes, to view the bits of a float type


def masked_sum(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Returns (W + scale B A) * M, in the type of W.

    W = [[1, 0]], A = [[2, 3]], B = [[1]], scale 0.5 give [[1 + 0.5 * 2, 0]] = [[2, 0]].
    """
    return zeroed(adapted_weight(weight_OI, a_RI, b_OR, scale), weight_OI)


def adapted_weight(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Returns W + scale B A, computed in the wider type of W and A, and rounded once to that of W."""
    # A and B are in float32: rounded to a half-precision type first, small updates of them would have no effect
    sum_dtype = torch.promote_types(weight_OI.dtype, a_RI.dtype)
    with torch.autocast(weight_OI.device.type, enabled=False):
        return torch.addmm(weight_OI.to(sum_dtype), b_OR.to(sum_dtype), a_RI.to(sum_dtype), alpha=scale).to(
            weight_OI.dtype
        )


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns dy^T x, (out, in), in ``dtype``, over all positions."""
    dy_PO, x_PI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if dy.dtype == torch.float16:  # sums below 6e-8 would be 0 in float16; bfloat16 has the range of float32
        dy_PO, x_PI = dy_PO.to(dtype), x_PI.to(dtype)
    return (dy_PO.T @ x_PI).to(dtype)


def zeroed(values_OI: Tensor, weight_OI: Tensor) -> Tensor:
    """Sets ``values_OI`` to +0 wherever ``weight_OI`` (or a mask) is 0, in place, and returns it."""
    if values_OI.device.type != "cpu":
        return values_OI.masked_fill_(weight_OI == 0, 0)
    # On a CPU masked_fill_ branches on every element, and an irregular mask makes half of the branches mispredicted.
    # An AND of the bits with 0 or -1 (all ones) takes a tenth of the time. It also turns NaN, infinity and negative
    # values into +0, where a product with the mask would give NaN or -0.0.
    integer = INTEGERS[values_OI.element_size()]
    values_OI.view(integer).bitwise_and_((weight_OI != 0).to(integer).neg_())
    return values_OI


class MaskedProduct(torch.autograd.Function):
    """x ((W + scale B A) * M)^T, saving no matrix of W's size for the backward pass but W itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        """Returns y (..., O) of x (..., I), in the type of x."""
        ctx.save_for_backward(x, weight_OI, a_RI, b_OR)
        ctx.scale = scale
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, masked_sum(weight_OI, a_RI, b_OR, scale).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of x, W, A and B; a frozen W has none."""
        x, weight_OI, a_RI, b_OR = ctx.saved_tensors
        dx = grad_OI = da_RI = db_OR = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = dy @ masked_sum(weight_OI, a_RI, b_OR, ctx.scale).to(dy.dtype)
            if any(ctx.needs_input_grad[1:4]):
                grad_OI = zeroed(weight_gradient(dy, x, a_RI.dtype), weight_OI)
                da_RI = (b_OR.T @ grad_OI) * ctx.scale
                db_OR = (grad_OI @ a_RI.T) * ctx.scale
        dw_OI = grad_OI.to(weight_OI.dtype) if grad_OI is not None and ctx.needs_input_grad[1] else None
        return dx, dw_OI, da_RI, db_OR, None


class MaskedLayer(LoraLinear):
    """peft's LoRA layer over any kind of linear, with the sum of weight and adapter masked.

    Dropout drops columns of A, that is input channels, the same ones for all positions of a forward pass.
    """

    @abstractmethod
    def product(self, x: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        """Returns x W'^T."""

    @abstractmethod
    def merged_weight(self) -> Tensor:
        """Returns W' as the forward pass uses it, in the layout of the base layer's weight."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns x W'^T + bias, or the base layer's output if the adapter is disabled or merged."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        assert not kwargs, "masked adapters cannot be mixed within a batch"
        a_RI, b_OR, scale = self.adapter()
        dropout, device_type = self.lora_dropout[self._name], x.device.type
        if isinstance(dropout, nn.Dropout):
            a_RI = a_RI * dropout(torch.ones_like(a_RI[0]))
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        y = self.product(x, a_RI, b_OR, scale)
        base: Any = self.get_base_layer()
        return y if base.bias is None else y + base.bias.to(y.dtype)

    def adapter(self) -> tuple[Tensor, Tensor, float]:
        """Returns A (R, I), B (O, R) and the scale."""
        name = self._name
        a_RI, b_OR = (factors.get_parameter(f"{name}.weight") for factors in (self.lora_A, self.lora_B))
        return a_RI, b_OR, self.scaling[name]

    @property
    def _name(self) -> str:
        """Name of the active adapter, of which there is one."""
        assert len(self.active_adapters) == 1, "masked adapters cannot be mixed"
        return self.active_adapters[0]


@final
class MaskedLinear(MaskedLayer):
    """The layer over an ``nn.Linear`` or a ``Conv1D``, masked by the zeros of the weight.

    The weight is frozen, so it serves as its own mask: where it is exactly zero it stays zero. In a linear that was not
    pruned, that concerns only the few weights that happen to be zero.
    """

    def __init__(self, base_layer: Any, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    def product(self, x: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        """Returns x W'^T."""
        return MaskedProduct.apply(x, self.weight_OI, a_RI, b_OR, scale)

    @property
    def weight_OI(self) -> Tensor:
        """The weight under the adapter, (out, in)."""
        base: Any = self.get_base_layer()
        return base.weight.T if self.fan_in_fan_out else base.weight

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Returns W' as the forward pass uses it, in the layout of the base layer's weight."""
        merged_OI = masked_sum(self.weight_OI, *self.adapter())
        return merged_OI.T.contiguous() if self.fan_in_fan_out else merged_OI

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns W' - W, which peft's own ``merge`` adds to the weight and ``unmerge`` subtracts."""
        base: Any = self.get_base_layer()
        return super().get_delta_weight(adapter).masked_fill(base.weight == 0, 0)
