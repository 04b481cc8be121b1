"""The numbers of units that blocks keep of one part: from their rates, and as the structure of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.models.families import custom_class
from lit_prune.models.linears import PrunableLinear, linears_of
from lit_prune.models.remote_code.modeling_shrunk import layer_config
from lit_prune.models.structure import IMPORT, Description, Structure
from lit_prune.shrink.units.narrow import narrow, set_sizes
from lit_prune.shrink.units.parts import Part


@dataclass(frozen=True)
class PartSizes(Structure):
    """The number of units that each block has left of one part.

    Attributes:
        units: Number of units of each block.
        full: Number of units of each block of the dense model.
        fields: The fields of the config that have the number of units, each with its value per unit.
        fixed: Fields that the config must have explicitly, because their defaults depend on ``fields``.
        path: Dotted path of the list of blocks.
        name: Key in report.json.
        noun: One unit, in texts.
        find: Returns the part of a block from its linears and its config.
    """

    units: Sequence[int]
    full: Sequence[int]
    fields: Mapping[str, int]
    fixed: Mapping[str, int]
    path: str

    name: ClassVar[str]
    noun: ClassVar[str]
    find: ClassVar[Callable[[Mapping[str, PrunableLinear], Any], Part]]

    @property
    def sizes(self) -> dict[str, list[int]]:
        """The values of the config's fields, one for every block."""
        per_unit = {name: [units * each for units in self.units] for name, each in self.fields.items()}
        return per_unit | {name: [value] * len(self.units) for name, value in self.fixed.items()}

    def rebuild(self, model: PreTrainedModel) -> None:
        """Removes the last units of every block, as many as the model has more; see :meth:`Structure.rebuild`."""
        layers: Any = model.get_submodule(self.path)
        config = model.config.get_text_config()
        configs = [layer_config(config, index) for index in range(len(layers))]
        if all(
            getattr(one, name, None) == value
            for name, values in self.sizes.items()
            for one, value in zip(configs, values, strict=True)
        ):
            return
        for layer, one, units in zip(layers, configs, self.units, strict=True):
            part = type(self).find(linears_of(layer), one)
            if units < part.units:
                narrow(layer, part, torch.arange(units))
        set_sizes(model, layers, self.sizes)

    def of_blocks(self, kept: Sequence[int]) -> PartSizes:
        """Returns the sizes of the blocks ``kept``."""
        return replace(self, units=[self.units[block] for block in kept], full=[self.full[block] for block in kept])

    def describe(self, model: PreTrainedModel) -> Description:
        """Returns the numbers of units of the blocks and the share that was removed."""
        rates = rates_from_units(self.units, self.full)
        achieved = (sum(self.full) - sum(self.units)) / sum(self.full)
        most, least, full = max(self.units), min(self.units), max(self.full)
        span = f"{least}" if least == most else f"{least} to {most}"
        equal = "the same in every block" if least == most else f"rates from {min(rates):.2%} to {max(rates):.2%}"
        return Description(
            name=self.name,
            facts={"achieved": achieved, "units": list(self.units), "full": list(self.full)},
            done="Shrunk",
            outcome=f"the blocks have {span} of their {full} {self.noun}, {achieved:.2%} less in the mean.",
            rows={
                f"{self.noun} removed, mean over blocks": f"{achieved:.4f}",
                f"{self.noun} of the blocks": f"{span} of {full}, {equal}",
            },
            unit=self.noun,
            noun="size",
            sizes=tuple(self.units),
            full=full,
            achieved=achieved,
            loading=IMPORT if custom_class(model.config) == "shrunk" else "",
        )


def units_from_rates(
    rates: Sequence[float], full: Sequence[int], multiple: int, present: Sequence[int] | None = None
) -> list[int]:
    """Returns the number of units that each block keeps: a multiple of ``multiple``, or all that it has.

    Equal rates of equal blocks give equal numbers, the nearest to the exact one. Otherwise exact numbers are rounded
    down, to at least one multiple, and the blocks with the largest remainders get one multiple more, until the sum is
    as close as possible to the exact one. Rates [0.3, 0.4] of 32 have the exact numbers 22.4 and 19.2; in multiples of
    8 they become 24 and 16.

    Args:
        rates: Share of its units that each block loses.
        full: Number of units of each block without any loss.
        multiple: Number of which every smaller number of units is a multiple.
        present: Number of units that each block has left; None means all.
    """
    left = full if present is None else present
    exact = [min((1 - rate) * units, has) for rate, units, has in zip(rates, full, left, strict=True)]
    below = [_below(number, has, multiple) for number, has in zip(exact, left, strict=True)]
    steps = [min(has, (low // multiple + 1) * multiple) - low for low, has in zip(below, left, strict=True)]
    remainders = [(number - low) / step if step else 0.0 for number, low, step in zip(exact, below, steps, strict=True)]
    if len(set(zip(full, left, (round(rate, 9) for rate in rates), strict=True))) == 1:
        return [low + step if remainders[0] > 0.5 else low for low, step in zip(below, steps, strict=True)]
    missing = sum(exact) - sum(below)
    for block in sorted(range(len(below)), key=lambda block: -remainders[block]):
        if 2 * missing > steps[block] and steps[block]:
            below[block] += steps[block]
            missing -= steps[block]
    return below


def check_multiple(method: str, multiple: int, units: int, noun: str) -> None:
    """Raises InputError if ``multiple`` is not less than ``units``, so that none of them could go.

    Args:
        method: Name of the method that has the multiple.
        multiple: Number of which every smaller number of units is a multiple.
        units: Number of units where there are fewest.
        noun: The units, in the message.
    """
    if 1 < units <= multiple:
        raise InputError(
            f"`{method}.multiple` must be less than {units}, the number of {noun}, got {multiple}: one multiple stays, "
            "so that none could go. Choose a smaller one."
        )


def rates_from_units(units: Sequence[int], full: Sequence[int]) -> list[float]:
    """Returns the share of its units that each block loses; 24 of 32 is 0.25."""
    return [(all_units - kept) / all_units for kept, all_units in zip(units, full, strict=True)]


def units_left(rates: Sequence[float], full: Sequence[int]) -> list[int]:
    """Returns the number of units that each block has left of ``full``; 0.25 of 32 leaves 24."""
    return [round((1 - rate) * units) for rate, units in zip(rates, full, strict=True)]


def _below(exact: float, present: int, multiple: int) -> int:
    """The largest possible number of units up to ``exact``, or the smallest one."""
    if exact >= present - 1e-6:
        return present
    return min(present, max(multiple, math.floor(exact / multiple + 1e-9) * multiple))
