"""Parameters, bytes and zeros of a model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lit_prune.masks.zeros import zeros
from lit_prune.models.quantised import packed_bytes, quantised_linears
from lit_prune.models.quantised import pruned as pruned_of


def parameters(model: nn.Module) -> int:
    """Returns the number of parameters, tied weights counted once; quantised ones as they were before."""
    rest, quantised = _split(model)
    return sum(parameter.numel() for parameter in rest) + sum(_weights(module) for module in quantised)


def size_bytes(model: nn.Module) -> int:
    """Returns the bytes of the parameters, zeros included, tied weights counted once.

    Quantised linears count with their packed weights, scales and tables.
    """
    rest, quantised = _split(model)
    return sum(parameter.nbytes for parameter in rest) + sum(packed_bytes(module) for module in quantised)


def full_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes that the parameters would have if none were quantised."""
    rest, quantised = _split(model)
    return sum(parameter.nbytes for parameter in rest) + model.dtype.itemsize * sum(map(_weights, quantised))


def pruned(model: nn.Module) -> tuple[int, int]:
    """Returns the number of parameters that are pruned, and of all.

    Pruned are zeros; of quantised weights, which have zeros by rounding too, those under the mask.
    """
    rest, quantised = _split(model)
    zero, total = zeros(rest)
    return zero + sum(map(pruned_of, quantised)), total + sum(map(_weights, quantised))


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[Any]]:
    """The parameters that are not quantised, and the linears whose weights are."""
    quantised = [module for _, module in quantised_linears(model)]
    packed = {id(module.weight) for module in quantised}
    return [parameter for parameter in model.parameters() if id(parameter) not in packed], quantised


def _weights(module: Any) -> int:
    return module.out_features * module.in_features
