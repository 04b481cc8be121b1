"""Gradient masks: zeros stay zero in training because the gradient of a pruned weight is zero.

The optimizer need not know of the masks: without a gradient the moments of a pruned weight stay zero, and weight decay
of a zero is zero.

For a parameter that is sharded over processes (a DTensor), each process masks its own rows. FSDP writes the reduced
gradient of a shard directly into ``grad``, past the tensor hooks of autograd, so a post-accumulate hook masks it there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lit_prune.models import structure
from lit_prune.models.families import find_blocks
from lit_prune.models.tensors import pack_bits, unpack_bits


class GradientMask:
    """A gradient hook of one parameter that zeroes the gradient wherever the parameter is pruned.

    The mask is read from the weights when the first gradient comes, not when the hook is registered: until then a
    checkpoint may be loaded, or the model moved. It is not read again in later steps, since a weight that was not
    pruned may pass through zero. It takes one byte a weight, an eighth of AdamW's moments in float32.

    Attributes:
        zeros: True where the parameter is pruned, of a sharded one this process's rows; None before a gradient.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = weakref.ref(
            parameter
        )  # the parameter refers to this hook: a strong reference would be a cycle
        self.zeros: Tensor | None = None

    def __call__(self, grad: Tensor) -> Tensor:
        """Returns ``grad`` with zeros where the parameter is pruned."""
        return grad.masked_fill(self._zeros_on(grad.device), 0)

    def mask_shard(self, parameter: Tensor) -> None:
        """Masks the gradient of this process's rows of a sharded parameter, in place."""
        assert isinstance(parameter.grad, DTensor)
        rows = parameter.grad.to_local()
        rows.masked_fill_(self._zeros_on(rows.device), 0)

    def mask_weight(self, parameter: Tensor) -> None:
        """Sets the pruned weights of ``parameter`` to zero, in place; does nothing before the first gradient."""
        if self.zeros is not None:
            weight = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            weight.detach().masked_fill_(self._zeros_on(weight.device), 0)

    def full_zeros(self) -> Tensor | None:
        """Returns the mask of the whole parameter, gathered if it is sharded; None before the first gradient."""
        parameter = self._parameter()
        if self.zeros is None or not isinstance(parameter, DTensor):
            return self.zeros
        mesh, placements = parameter.device_mesh, parameter.placements
        shape, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(self.zeros, mesh, placements, shape=shape, stride=stride).full_tensor()

    def set_zeros(self, zeros: Tensor) -> None:
        """Sets the mask from that of the whole parameter, of which a sharded one keeps this process's rows."""
        parameter = self._parameter()
        if isinstance(parameter, DTensor):
            zeros = distribute_tensor(zeros, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        self.zeros = zeros.to(parameter.device)

    def _zeros_on(self, device: torch.device) -> Tensor:
        if self.zeros is None:
            parameter = self._parameter().detach()
            self.zeros = (parameter.to_local() if isinstance(parameter, DTensor) else parameter) == 0
        self.zeros = self.zeros.to(device)
        return self.zeros

    def _parameter(self) -> Tensor:
        parameter = self.parameter()
        assert parameter is not None
        return parameter


def freeze_zeros(model: PreTrainedModel, *, blocks: str | None = None) -> list[RemovableHandle]:
    """Freezes all weights of the blocks' linears that are exactly zero; a second call reads the zeros again.

    All linears of the blocks are covered, not only those of the latest cut, since an earlier cut may have had other
    `targets`. In a linear that was never pruned this freezes the few weights that happen to be zero.

    Args:
        model: A causal LM without an adapter.
        blocks: Dotted path of the blocks; None takes that of the record, or finds them.

    Returns:
        The handles of the hooks, one for each parameter that had none.
    """
    handles = []
    for parameter in _trained_linears(model, blocks):
        mask = gradient_mask(parameter)
        if mask is not None:
            mask.zeros = None
        elif isinstance(parameter, DTensor):
            handles.append(parameter.register_post_accumulate_grad_hook(GradientMask(parameter).mask_shard))
        else:
            handles.append(parameter.register_hook(GradientMask(parameter)))
    return handles


def freezes_zeros(model: nn.Module) -> bool:
    """Returns whether :func:`freeze_zeros` was called on ``model``."""
    return any(gradient_mask(parameter) is not None for parameter in model.parameters())


def gradient_masks(model: nn.Module) -> dict[str, Tensor]:
    """Returns the masks of frozen zeros by parameter, as bits; parameters without a gradient so far are omitted.

    A resumed run needs them to freeze the same weights: masks read again would include weights just passing through
    zero.
    """
    hooks = {name: gradient_mask(parameter) for name, parameter in model.named_parameters()}
    masks = {name: hook.full_zeros() for name, hook in hooks.items() if hook is not None}
    return {name: pack_bits(mask) for name, mask in masks.items() if mask is not None}


def restore_gradient_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Restores ``masks`` from :func:`gradient_masks` on ``model``, whose zeros must be frozen."""
    for name, bits in masks.items():
        parameter = model.get_parameter(name)
        mask = gradient_mask(parameter)
        assert mask is not None, f"{name} has no gradient mask"
        mask.set_zeros(unpack_bits(bits, parameter.shape))


def gradient_mask(parameter: Tensor) -> GradientMask | None:
    """Returns the gradient mask of ``parameter``; None without one."""
    # torch has no public way to list the hooks of a tensor
    hooks: list[Any] = [*(parameter._backward_hooks or {}).values()]
    hooks += (getattr(hook, "__self__", None) for hook in (parameter._post_accumulate_grad_hooks or {}).values())
    return next((hook for hook in hooks if isinstance(hook, GradientMask)), None)


def _trained_linears(model: PreTrainedModel, blocks: str | None = None) -> Iterator[Tensor]:
    """Yields the trainable parameters of the blocks' linears, each once."""
    recipe = structure.record(model).get("recipe", {})
    found = find_blocks(model, blocks=blocks or recipe.get("blocks"))
    # several linears, such as fused experts, may be slices of one parameter
    parameters = {id(linear.parameter): linear.parameter for block in found for linear in block.linears.values()}
    yield from (parameter for parameter in parameters.values() if parameter.requires_grad)
