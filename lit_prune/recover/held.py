"""Zeros that training leaves alone: the gradient of a weight that is pruned is zero.

An optimizer that makes its step from gradients and weights then leaves a pruned weight where it is: its moments stay
zero, and weight decay takes a share of zero. It need not know of the masks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune import structure
from lit_prune.bits import packed, unpacked
from lit_prune.families import find_blocks


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
        if self.gone is None:
            parameter = self.parameter()
            assert parameter is not None
            self.gone = parameter.detach() == 0
        if self.gone.device != grad.device:
            self.gone = self.gone.to(grad.device)
        return grad.masked_fill(self.gone, 0)


def hold_zeros(model: PreTrainedModel) -> None:
    """Keeps what is exactly zero in the linears of the blocks at zero; done again, it takes up the zeros anew.

    It does so for all linears of the blocks, not only those of the latest cut, since an earlier one may have had other
    `targets`; in a linear that was never pruned a handful of weights happen to be zero, and stay.
    """
    for parameter in _pruned(model):
        held = _hook(parameter)
        if held is None:
            parameter.register_hook(Held(parameter))
        else:
            held.gone = None


def holds_zeros(model: nn.Module) -> bool:
    """Returns whether zeros of ``model`` are kept; see :func:`hold_zeros`."""
    return any(_hook(parameter) is not None for parameter in model.parameters())


def held_masks(model: nn.Module) -> dict[str, Tensor]:
    """Returns which weights are held at zero, by parameter, as bits; those of which no gradient has come are left out.

    A run that goes on must hold the same: a kept weight may be passing zero just then.
    """
    hooks = {name: _hook(parameter) for name, parameter in model.named_parameters()}
    return {name: packed(hook.gone) for name, hook in hooks.items() if hook is not None and hook.gone is not None}


def hold_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Lets ``model``, whose zeros are held, hold those that :func:`held_masks` returned."""
    for name, bits in masks.items():
        parameter = model.get_parameter(name)
        held = _hook(parameter)
        assert held is not None, f"{name} is not held"
        held.gone = unpacked(bits, parameter.shape).to(parameter.device)


def _pruned(model: PreTrainedModel) -> Iterator[Tensor]:
    """The parameters that hold the linears of the blocks, once each, as far as they are trained."""
    recipe = structure.record(model).get("recipe", {})
    blocks = find_blocks(model, blocks=recipe.get("blocks"))
    parameters = {id(linear.parameter): linear.parameter for block in blocks for linear in block.linears.values()}
    yield from (parameter for parameter in parameters.values() if parameter.requires_grad)


def _hook(parameter: Tensor) -> Held | None:
    hooks = (parameter._backward_hooks or {}).values()
    return next((hook for hook in hooks if isinstance(hook, Held)), None)
