"""Conversion of rates to widths of the residual stream, and the parameters of a model with such widths."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.models.remote_code.modeling_sliced import take_shape


def sizes_from_rates(rates: Sequence[float], hidden_size: int, multiple: int) -> list[int]:
    """Returns the width of every block, in multiples of ``multiple``, with a sum as close as possible to the exact one.

    Exact widths are rounded down, to at least one multiple; the multiples left over go to the largest remainders.
    Rates [0.3, 0.4] of 32 have the exact widths 22.4 and 19.2; in multiples of 8 they become 24 and 16.

    Args:
        rates: Share of ``hidden_size`` that each block loses, at most 1 - ``multiple`` / ``hidden_size``. Equal rates
            may give widths that differ by one multiple; the wider ones then come first.
        hidden_size: Width of the stream before it is sliced; a multiple of ``multiple``.
        multiple: Number of which every width is a multiple.
    """
    exact = [max((1 - rate) * hidden_size / multiple, 1.0) for rate in rates]
    units = [math.floor(width + 1e-9) for width in exact]
    spare = round(sum(exact)) - sum(units)
    by_remainder = sorted(range(len(exact)), key=lambda block: units[block] - exact[block])
    for block in by_remainder[: max(spare, 0)]:
        units[block] += 1
    return [unit * multiple for unit in units]


def rates_from_sizes(sizes: Sequence[int], hidden_size: int) -> list[float]:
    """Returns the share of ``hidden_size`` that each width omits; a width of 24 of 32 gives 0.25."""
    return [(hidden_size - size) / hidden_size for size in sizes]


def check_multiple(multiple: int, hidden_size: int) -> None:
    """Raises InputError unless ``multiple`` divides ``hidden_size`` and is less, so that widths can be smaller."""
    if hidden_size % multiple or multiple == hidden_size:
        divisors = [number for number in range(1, hidden_size) if hidden_size % number == 0]
        nearest = sorted(sorted(divisors, key=lambda number: abs(number - multiple))[:3])
        raise InputError(
            f"`Slicing.multiple` must divide the model's width of {hidden_size} and be less, got {multiple}. The "
            f"nearest divisors are {', '.join(map(str, nearest))}."
        )


def sliced_parameters(config: PreTrainedConfig, sizes: Sequence[int]) -> int:
    """Returns the number of parameters of a dense model after slicing it to ``sizes``.

    Args:
        config: The config of the dense model, which is not changed.
        sizes: The width that each block reads, then the width that the head reads.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        take_shape(model, sizes)
    return parameters(model)
