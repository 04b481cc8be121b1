"""The number of parameters, the bytes and the zeros of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_prune.masks.zeros import zeros
from lit_prune.models.quantised import convertible, packed_bytes, quantised_linears
from lit_prune.models.quantised import pruned as pruned_weights


def parameters(model: nn.Module) -> int:
    """Returns the number of parameters, counting tied weights once and quantised ones at their unpacked shape."""
    rest, quantised = _split(model)
    return sum(parameter.numel() for parameter in rest) + sum(_weights(module) for module in quantised)


def size_bytes(model: nn.Module) -> int:
    """Returns the bytes of the parameters, including zeros and counting tied weights once.

    Quantised linears contribute their packed weights, scales and tables.
    """
    rest, quantised = _split(model)
    return sum(parameter.nbytes for parameter in rest) + sum(packed_bytes(module) for module in quantised)


def bytes_in(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Returns the bytes that the parameters would have after ``quantised.convert`` to ``dtype``."""
    changed = {id(tensor): tensor for _, _, tensor in convertible(model, dtype) if isinstance(tensor, nn.Parameter)}
    return size_bytes(model) + sum(tensor.numel() * (dtype.itemsize - tensor.itemsize) for tensor in changed.values())


def full_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes that the parameters would have if none were quantised."""
    rest, quantised = _split(model)
    return sum(parameter.nbytes for parameter in rest) + model.dtype.itemsize * sum(map(_weights, quantised))


def pruned(model: nn.Module) -> tuple[int, int]:
    """Returns the number of pruned parameters and the number of all parameters.

    A parameter is pruned if it is zero; a quantised weight, which rounding too can make zero, if its mask says so.
    """
    rest, quantised = _split(model)
    zero, total = zeros(rest)
    return zero + sum(map(pruned_weights, quantised)), total + sum(map(_weights, quantised))


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[Any]]:
    """The parameters that are not quantised, and the linears with quantised weights."""
    quantised = [module for _, module in quantised_linears(model)]
    packed = {id(module.weight) for module in quantised}
    return [parameter for parameter in model.parameters() if id(parameter) not in packed], quantised


def _weights(module: Any) -> int:
    return module.out_features * module.in_features
