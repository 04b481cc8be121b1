"""The rates of several parts of the blocks, from the share that each block is to lose of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lit_prune.allocate.base import TOLERANCE, meet_budget, weighted_mean

LAST = 1e-9  # weight of a part that loses what the first cannot


@dataclass(frozen=True)
class PartRates:
    """What one part can remove from the blocks.

    Attributes:
        removable: Number of parameters that the part has in each block of the dense model.
        current: Share of its units that each block has lost already.
        most: Largest rate of a block.
        weight: Rate of the part relative to the others.
        step: Half the share of its units that is removed at once.
        sizes: Number of units of each block of the dense model.
        rounded: Function of rates, ``sizes`` and ``current`` that returns the rates that are possible.
        least: Smallest rate of a block, but for rounding.
    """

    removable: Sequence[int]
    current: Sequence[float]
    most: float
    weight: float
    step: float
    sizes: Sequence[int]
    rounded: Callable[[Sequence[float], Sequence[int], Sequence[float]], list[float]]
    least: float = 0.0

    @property
    def can_lose(self) -> bool:
        """Whether a block can lose more than it has lost."""
        pairs = zip(self.removable, self.current, strict=True)
        return any(size and self.most > rate + TOLERANCE for size, rate in pairs)

    def loses(self, rates: Sequence[float]) -> bool:
        """Returns whether a block loses more at ``rates`` than it has lost."""
        return any(rate > now + TOLERANCE for rate, now in zip(rates, self.current, strict=True))

    def bounds(self, block: int) -> tuple[float, float]:
        """Returns the smallest and the largest rate of a block."""
        low = max(self.current[block], self.least)
        return low, max(self.most, low)

    def parameters(self, rates: Sequence[float]) -> float:
        """Returns the number of parameters that the part loses at ``rates``, with what it has lost."""
        return sum(rate * size for rate, size in zip(rates, self.removable, strict=True))

    def within(self, least: float, most: float) -> PartRates:
        """Returns the part with further bounds of its rates."""
        return replace(self, least=least, most=min(self.most, most))

    def rounded_down(self, rates: Sequence[float], sizes: Sequence[int], current: Sequence[float]) -> list[float]:
        """Returns the greatest rates up to ``rates`` that are possible, block by block."""
        return [
            self._rounded_down(rate, size, low) if size else rate
            for rate, size, low in zip(rates, sizes, current, strict=True)
        ]

    def _rounded_down(self, rate: float, size: int, low: float) -> float:
        (nearest,) = self.rounded([rate], [size], [low])
        if nearest <= rate + TOLERANCE:
            return nearest
        (below,) = self.rounded([max(rate - 2 * self.step * min(self.sizes) / size, 0.0)], [size], [low])
        return below

    def removed(self, amount: float) -> float:
        """Returns the number of parameters that go if every block loses ``amount`` times the weight of what it has."""
        gone = (
            (min(rate + (1 - rate) * amount * self.weight, max(self.most, rate)) - rate) * size
            for rate, size in zip(self.current, self.removable, strict=True)
        )
        return sum(gone)


def split(rates: Sequence[float], parts: Sequence[PartRates]) -> list[list[float]]:
    """Returns the rates of every part, each possible for it, at which the blocks lose ``rates`` of all parts together.

    Parts with large steps come first. What they lose more or less than planned because of their rounding, the others
    lose less or more, in all blocks alike.

    Args:
        rates: Share that each block is to lose of the parameters of all parts.
        parts: What the parts can remove.
    """
    planned = list(zip(*(_planned(rate, parts, block) for block, rate in enumerate(rates)), strict=True))
    found, missing = [list(own) for own in planned], 0.0
    steps = [round(part.step * sum(part.removable), 6) for part in parts]
    order = sorted(range(len(parts)), key=lambda index: (-steps[index], parts[index].weight))
    for done, index in enumerate(order):
        part = parts[index]
        if not sum(part.removable):  # experts whose mixtures are gone
            continue
        shift = missing / sum(sum(parts[other].removable) for other in order[done:])
        bounds = [part.bounds(block) for block in range(len(rates))]
        wanted = [min(max(rate + shift, low), high) for rate, (low, high) in zip(planned[index], bounds, strict=True)]
        possible = part.rounded(wanted, part.sizes, part.current)
        found[index] = [max(rate, low) for rate, low in zip(possible, part.current, strict=True)]
        differences = zip(part.removable, planned[index], found[index], strict=True)
        missing += sum(number * (rate - own) for number, rate, own in differences)
    return found


def split_first(first: int, rates: Sequence[float], parts: Sequence[PartRates]) -> list[list[float]] | None:
    """Returns the rates of every part, as :func:`split` does, where one part loses as much as it can.

    Args:
        first: Index of that part; the others lose what it cannot.
        rates: Share that each block is to lose of the parameters of all parts.
        parts: What the parts can remove.

    Returns:
        The rates, or None if they miss what is to go by more than the part with the smallest step can make up for.
    """
    weighted = [replace(part, weight=LAST) for part in parts]
    # what it lost more by rounding, others that lose nothing could not make up for
    weighted[first] = replace(parts[first], weight=1.0, rounded=parts[first].rounded_down)
    found = split(rates, weighted)
    missing = sum(rate * sum(part.removable[block] for part in parts) for block, rate in enumerate(rates))
    missing -= sum(part.parameters(own) for part, own in zip(parts, found, strict=True))
    steps = [part.step * max(part.removable) or math.inf for part in parts]  # in parameters
    index = steps.index(min(steps))
    finest, own = parts[index], found[index]
    bounds = [finest.bounds(block)[missing > 0] for block in range(len(rates))]
    room = abs(finest.parameters(bounds) - finest.parameters(own)) + steps[index]
    return found if abs(missing) <= room else None


def _planned(rate: float, parts: Sequence[PartRates], block: int) -> list[float]:
    """Returns the rates of the parts of one block, in the proportion of their weights, before rounding."""
    sizes = [part.removable[block] for part in parts]
    lower, upper = zip(*(part.bounds(block) for part in parts), strict=True)
    if not sum(sizes):
        return list(lower)
    target = min(max(rate, weighted_mean(lower, sizes)), weighted_mean(upper, sizes))
    return meet_budget(
        lambda amount: [min(amount * part.weight, high) for part, high in zip(parts, upper, strict=True)],
        target,
        sizes=sizes,
        lower=lower,
        upper=1.0,
    )
