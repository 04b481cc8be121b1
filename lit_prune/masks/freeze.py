"""Zeros that training leaves alone: the gradient of a weight that is pruned is zero.

An optimizer that makes its step from gradients and weights then leaves a pruned weight where it is: its moments stay
zero, and weight decay takes a share of zero. It need not know of the masks.

Of a parameter that is sharded over processes (a DTensor) each holds the zeros of its rows: the gradient comes to it
summed and cut to these, past the hooks of autograd, so that a hook for what was accumulated does the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from lit_prune.models import structure
from lit_prune.models.bits import packed, unpacked
from lit_prune.models.families import find_blocks


class Held:
    """A gradient hook of one parameter: zero where the parameter was zero when its first gradient came.

    Until then the weights of a checkpoint may still be loaded, or the model moved. The mask is a bool a weight, an
    eighth of what AdamW keeps of it in float32. It is not read off the weights in every step: a kept weight that
    passes zero is no pruned one.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = weakref.ref(parameter)  # which holds this hook
        self.gone: Tensor | None = None

    def __call__(self, grad: Tensor) -> Tensor:
        """Returns ``grad`` with zeros where the parameter had them."""
        return grad.masked_fill(self._gone(grad.device), 0)

    def accumulated(self, parameter: Tensor) -> None:
        """Does the same to the gradient of this process's rows of a sharded parameter, in place."""
        assert isinstance(parameter.grad, DTensor)
        rows = parameter.grad.to_local()
        rows.masked_fill_(self._gone(rows.device), 0)

    def whole(self) -> Tensor | None:
        """Returns what is held, of a sharded parameter all rows, which the processes give each other; None before."""
        parameter = self._parameter()
        if self.gone is None or not isinstance(parameter, DTensor):
            return self.gone
        mesh, placements = parameter.device_mesh, parameter.placements
        shape, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(self.gone, mesh, placements, shape=shape, stride=stride).full_tensor()

    def take(self, gone: Tensor) -> None:
        """Holds what ``gone`` says, of a sharded parameter what it says of this process's rows."""
        parameter = self._parameter()
        if isinstance(parameter, DTensor):
            gone = distribute_tensor(gone, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        self.gone = gone.to(parameter.device)

    def _gone(self, device: torch.device) -> Tensor:
        if self.gone is None:
            parameter = self._parameter().detach()
            self.gone = (parameter.to_local() if isinstance(parameter, DTensor) else parameter) == 0
        self.gone = self.gone.to(device)
        return self.gone

    def _parameter(self) -> Tensor:
        parameter = self.parameter()
        assert parameter is not None
        return parameter


def freeze_zeros(model: PreTrainedModel) -> None:
    """Keeps what is exactly zero in the linears of the blocks at zero; done again, it takes up the zeros anew.

    It does so for all linears of the blocks, not only those of the latest cut, since an earlier one may have had other
    `targets`; in a linear that was never pruned a handful of weights happen to be zero, and stay.
    """
    for parameter in _pruned(model):
        held = _hook(parameter)
        if held is not None:
            held.gone = None
        elif isinstance(parameter, DTensor):
            parameter.register_post_accumulate_grad_hook(Held(parameter).accumulated)
        else:
            parameter.register_hook(Held(parameter))


def freezes_zeros(model: nn.Module) -> bool:
    """Returns whether zeros of ``model`` are kept; see :func:`freeze_zeros`."""
    return any(_hook(parameter) is not None for parameter in model.parameters())


def gradient_masks(model: nn.Module) -> dict[str, Tensor]:
    """Returns which weights are held at zero, by parameter, as bits; those of which no gradient has come are left out.

    A run that goes on must hold the same: a kept weight may be passing zero just then.
    """
    hooks = {name: _hook(parameter) for name, parameter in model.named_parameters()}
    masks = {name: hook.whole() for name, hook in hooks.items() if hook is not None}
    return {name: packed(mask) for name, mask in masks.items() if mask is not None}


def restore_gradient_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Lets ``model``, whose zeros are held, hold those that :func:`gradient_masks` returned."""
    for name, bits in masks.items():
        parameter = model.get_parameter(name)
        held = _hook(parameter)
        assert held is not None, f"{name} is not held"
        held.take(unpacked(bits, parameter.shape))


def _pruned(model: PreTrainedModel) -> Iterator[Tensor]:
    """The parameters that hold the linears of the blocks, once each, as far as they are trained."""
    recipe = structure.record(model).get("recipe", {})
    blocks = find_blocks(model, blocks=recipe.get("blocks"))
    parameters = {id(linear.parameter): linear.parameter for block in blocks for linear in block.linears.values()}
    yield from (parameter for parameter in parameters.values() if parameter.requires_grad)


def _hook(parameter: Tensor) -> Held | None:
    hooks: list[Any] = [*(parameter._backward_hooks or {}).values()]
    hooks += (getattr(hook, "__self__", None) for hook in (parameter._post_accumulate_grad_hooks or {}).values())
    return next((hook for hook in hooks if isinstance(hook, Held)), None)
