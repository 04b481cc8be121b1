"""Numbers of units that blocks keep, from their rates."""

from __future__ import annotations

import math
from collections.abc import Sequence


def units_from_rates(rates: Sequence[float], full: Sequence[int], multiple: int) -> list[int]:
    """Returns the number of units that each block keeps: a multiple of ``multiple``, or all.

    Equal rates of equal blocks give equal numbers, the nearest to the exact one. Otherwise exact numbers are rounded
    down, to at least one multiple, and the blocks with the largest remainders get one multiple more, until the sum is
    as close as possible to the exact one. Rates [0.3, 0.4] of 32 have the exact numbers 22.4 and 19.2; in multiples of
    8 they become 24 and 16.

    Args:
        rates: Share of its units that each block loses.
        full: Number of units of each block without any loss.
        multiple: Number of which every smaller number of units is a multiple.
    """
    exact = [(1 - rate) * units for rate, units in zip(rates, full, strict=True)]
    below = [_below(number, units, multiple) for number, units in zip(exact, full, strict=True)]
    steps = [min(units, (low // multiple + 1) * multiple) - low for low, units in zip(below, full, strict=True)]
    remainders = [(number - low) / step if step else 0.0 for number, low, step in zip(exact, below, steps, strict=True)]
    if len(set(zip(full, (round(rate, 9) for rate in rates), strict=True))) == 1:
        return [low + step if remainders[0] > 0.5 else low for low, step in zip(below, steps, strict=True)]
    missing = sum(exact) - sum(below)
    for block in sorted(range(len(below)), key=lambda block: -remainders[block]):
        if 2 * missing > steps[block] and steps[block]:
            below[block] += steps[block]
            missing -= steps[block]
    return below


def rates_from_units(units: Sequence[int], full: Sequence[int]) -> list[float]:
    """Returns the share of its units that each block loses; 24 of 32 is 0.25."""
    return [1 - kept / all_units for kept, all_units in zip(units, full, strict=True)]


def _below(exact: float, full: int, multiple: int) -> int:
    """The largest possible number of units up to ``exact``, or the smallest one."""
    if exact >= full - 1e-6:
        return full
    return min(full, max(multiple, math.floor(exact / multiple + 1e-9) * multiple))
