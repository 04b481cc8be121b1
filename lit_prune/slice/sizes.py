"""From rates to widths of the residual stream, in whole multiples."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.models.modeling_sliced import take_shape


def sizes_from_rates(rates: Sequence[float], hidden_size: int, multiple: int) -> list[int]:
    """Returns the width of every block: multiples of ``multiple`` whose sum is as near the rates' as a multiple allows.

    Every block gets the whole multiples it is owed, at least one; what is left goes to the largest remainders.
    Rates [0.3, 0.4] of 32 are owed 22.4 and 19.2; in multiples of 8 that is 24 and 16, 40 together.

    Args:
        rates: Share of ``hidden_size`` that each block gives, at most 1 - ``multiple`` / ``hidden_size``. Equal rates
            may give widths that differ by one multiple; the first blocks then get the wider ones.
        hidden_size: Width of the stream before it is sliced; a multiple of ``multiple``.
        multiple: What every width is a multiple of.
    """
    owed = [max((1 - rate) * hidden_size / multiple, 1.0) for rate in rates]
    units = [math.floor(width + 1e-9) for width in owed]
    spare = round(sum(owed)) - sum(units)
    by_remainder = sorted(range(len(owed)), key=lambda block: units[block] - owed[block])
    for block in by_remainder[: max(spare, 0)]:
        units[block] += 1
    return [unit * multiple for unit in units]


def slices(sizes: Sequence[int], hidden_size: int) -> list[float]:
    """Returns the share of ``hidden_size`` that each width leaves out; 24 of 32 is 0.25."""
    return [1 - size / hidden_size for size in sizes]


def check_multiple(multiple: int, hidden_size: int) -> None:
    """Raises InputError unless ``hidden_size`` is a whole number of multiples."""
    if hidden_size % multiple:
        divisors = [number for number in range(1, hidden_size + 1) if hidden_size % number == 0]
        near = sorted(sorted(divisors, key=lambda number: abs(number - multiple))[:3])
        raise InputError(
            f"`Slicing.multiple` must divide the model's width of {hidden_size}, got {multiple}; near it are "
            f"{', '.join(map(str, near))}."
        )


def sliced_parameters(config: PreTrainedConfig, sizes: Sequence[int]) -> int:
    """Returns the number of parameters of the sliced model that a dense model's config and ``sizes`` make.

    Args:
        config: The dense model's; left as it is.
        sizes: The width that each block reads, and at the end the head's.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        take_shape(model, sizes)
    return parameters(model)
