"""Parameters, bytes and zeros of a model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lit_prune.masks.zeros import zeros
from lit_prune.models.quantised import packed_bytes, quantised_linears
from lit_prune.models.quantised import pruned as pruned_of


def parameters(model: nn.Module) -> int:
    """Returns the number of parameters, tied weights counted once; packed ones are as many as they stand for."""
    rest, quantised = _apart(model)
    return sum(parameter.numel() for parameter in rest) + sum(_weights(module) for module in quantised)


def size_bytes(model: nn.Module) -> int:
    """Returns the bytes that the parameters take, zeros included, tied weights counted once.

    Of quantised linears these are the packed weights with their scales and tables.
    """
    rest, quantised = _apart(model)
    return sum(parameter.nbytes for parameter in rest) + sum(packed_bytes(module) for module in quantised)


def full_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes that the parameters would take if none were quantised."""
    rest, quantised = _apart(model)
    return sum(parameter.nbytes for parameter in rest) + model.dtype.itemsize * sum(map(_weights, quantised))


def pruned(model: nn.Module) -> tuple[int, int]:
    """Returns the number of parameters that are zero, of quantised ones those under the mask, and of all."""
    rest, quantised = _apart(model)
    zero, total = zeros(rest)
    return zero + sum(map(pruned_of, quantised)), total + sum(map(_weights, quantised))


def _apart(model: nn.Module) -> tuple[list[nn.Parameter], list[Any]]:
    """The parameters that are what they are, and the linears whose weights are packed."""
    quantised = [module for _, module in quantised_linears(model)]
    packed = {id(module.weight) for module in quantised}
    return [parameter for parameter in model.parameters() if id(parameter) not in packed], quantised


def _weights(module: Any) -> int:
    return module.out_features * module.in_features
