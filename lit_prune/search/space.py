"""The rates that a search can reach from its start by exchanges of budget; it knows no models."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

Point = tuple[int, ...]
Group = tuple[int, ...]
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Space:
    """The rates that can be reached from the start by exchanges of budget between blocks.

    A point of the space has one integer per block: the units of ``sizes`` that were added to its budget. They add up to
    0, so that the mean of the rates, weighted by the sizes, does not change: for blocks of 100 and 50 weights at
    [0.5, 0.5], the point (10, -10) has the rates [0.6, 0.3]. Instead of blocks, they can be of linears or parts.

    Attributes:
        start: The rate of each block at the start.
        sizes: Number of units that each block has.
        granularity: Number of units of which every change of a block's budget is a multiple.
        lower: Lower bound of each block's rate.
        upper: Upper bound of each block's rate.
        balance: Smallest and largest sum of a point, where granularities differ too much for a sum of 0.
    """

    start: Sequence[float]
    sizes: Sequence[int]
    granularity: Sequence[int]
    lower: Sequence[float]
    upper: Sequence[float]
    balance: tuple[float, float] = (0.0, 0.0)

    @property
    def origin(self) -> Point:
        """The point of the start, where nothing is moved."""
        return (0,) * len(self.start)

    def rates(self, point: Point) -> list[float]:
        """Returns the rates at ``point``; a rate at a bound is the bound itself, which a sum of floats may miss."""
        sums = [rate + part / size for rate, part, size in zip(self.start, point, self.sizes, strict=True)]
        return [_snapped(rate, *bounds) for rate, *bounds in zip(sums, self.lower, self.upper, strict=True)]

    def on_budget(self, target: float, tolerance: float) -> Space:
        """Returns the space that starts, and stays, as near as ``tolerance`` units to a mean rate of ``target``.

        Equal rates of equal blocks may be off by half a unit in every block. The blocks with the finest granularity
        make up for that.
        """
        excess = self._excess(target)
        finest = [block for block, each in enumerate(self.granularity) if each == min(self.granularity)]
        parts = list(self.origin)
        if abs(excess) > tolerance:
            self._spread(parts, tuple(finest), round(abs(excess)), -1 if excess > 0 else 1)
        nearer = replace(self, start=self.rates(tuple(parts)))
        excess = nearer._excess(target)
        return replace(nearer, balance=(min(-tolerance - excess, 0.0), max(tolerance - excess, 0.0)))

    def _excess(self, target: float) -> float:
        """Returns the units by which the start exceeds a mean rate of ``target``."""
        return sum((rate - target) * size for rate, size in zip(self.start, self.sizes, strict=True))

    def movable(self, point: Point) -> bool:
        """Returns whether one block can get budget from another at ``point``."""
        rooms = [[bool(side) for side in self.room(point, block)] for block in range(len(point))]
        givers = [block for block, (below, _) in enumerate(rooms) if below]
        takers = [block for block, (_, above) in enumerate(rooms) if above]
        return any(giver != taker for giver in givers for taker in takers)

    def nearest(self, point: Point, block: int, wanted: float) -> int:
        """Returns the possible change of a block's budget nearest to ``wanted``, one unit at least if there is room."""
        grain, (below, above) = self.granularity[block], self.room(point, block)
        units = min(max(round(abs(wanted) / grain), 1) * grain, above if wanted > 0 else below)
        return units if wanted > 0 else -units

    def room(self, point: Point, block: int) -> tuple[int, int]:
        """Returns the most that can be taken from the budget of a block, and the most that can be added."""
        return self._room(point, block, -1), self._room(point, block, 1)

    def exchangeable(self, blocks: Collection[int]) -> list[Group]:
        """Returns the groups of ``blocks`` that can exchange budget: all of them, unless their units do not fit.

        Units of 20 and 60 fit, those of 20 and 30 do not, unless the sum may be off.
        """
        grains = sorted({self.granularity[block] for block in blocks})
        if any(self.balance) or all(grain % grains[0] == 0 for grain in grains):
            return [tuple(blocks)]
        return [tuple(block for block in blocks if self.granularity[block] == grain) for grain in grains]

    def moved(self, point: Point, wanted: Mapping[int, float], bounds: Mapping[int, tuple[float, float]]) -> Point:
        """Returns ``point`` with the budgets of some blocks changed as ``wanted``, rounded to their granularity.

        The blocks with the coarsest granularity are rounded first, and those with a finer one make up for it, so that
        the sum of the point comes to the middle of its bounds. If that is not possible, ``point`` comes back.

        Args:
            point: Where the blocks are.
            wanted: The change of each block.
            bounds: The least and the greatest change of each of these blocks.
        """
        parts, missing = list(point), sum(self.balance) / 2 - sum(point)
        for grain in sorted({self.granularity[block] for block in wanted}, reverse=True):
            own = [block for block in wanted if self.granularity[block] == grain]
            limits = {block: _multiples(*bounds[block], grain) for block in own}
            missing += sum(wanted[block] for block in own)
            counts = {block: math.floor(wanted[block] / grain + TOLERANCE) for block in own}
            counts = {block: min(max(counts[block], limits[block][0]), limits[block][1]) for block in own}
            left = round(missing / grain) - sum(counts.values())
            sign = 1 if left > 0 else -1
            order = sorted(own, key=lambda block: sign * (counts[block] - wanted[block] / grain))
            while left and (free := [block for block in order if counts[block] != limits[block][sign > 0]]):
                for block in free[: abs(left)]:
                    counts[block] += sign
                    left -= sign
            for block in own:
                parts[block] += counts[block] * grain
            missing -= sum(counts.values()) * grain
        return tuple(parts) if self.allows(tuple(parts)) else point

    def _spread(self, parts: list[int], group: Group, amount: int, sign: int) -> int:
        """Adds up to ``amount`` to the blocks of ``group``, or removes it, and returns how much that was."""
        size, wanted, done = self._size(group), 0.0, 0
        for block in group:
            wanted += amount * self.sizes[block] / size
            granularity = self.granularity[block]
            change = granularity * round((wanted - done) / granularity)
            change = max(min(change, self._room(parts, block, sign)), 0)
            parts[block] += sign * change
            done += change
        for block in group:  # what the last ones could not take
            granularity = self.granularity[block]
            change = max(min(granularity * ((amount - done) // granularity), self._room(parts, block, sign)), 0)
            parts[block] += sign * change
            done += change
        return done

    def _room(self, parts: Sequence[int], block: int, sign: int) -> int:
        """Returns the most that can be added to the budget of a block, or removed from it."""
        rate = self.start[block] + parts[block] / self.sizes[block]
        room = (self.upper[block] - rate if sign > 0 else rate - self.lower[block]) + TOLERANCE
        return self.granularity[block] * math.floor(room * self.sizes[block] / self.granularity[block])

    def _size(self, group: Group) -> int:
        return sum(self.sizes[block] for block in group)

    def allows(self, point: Point) -> bool:
        """Returns whether the rates at ``point``, and their sum, are within their bounds."""
        least, most = self.balance
        bounds = zip(self.rates(point), self.lower, self.upper, strict=True)
        in_bounds = all(low - TOLERANCE <= rate <= high + TOLERANCE for rate, low, high in bounds)
        return in_bounds and least - TOLERANCE <= sum(point) <= most + TOLERANCE


def _snapped(rate: float, *bounds: float) -> float:
    """Returns the bound that ``rate`` equals but for the rounding of floats; else ``rate``."""
    return next((bound for bound in bounds if abs(rate - bound) <= TOLERANCE), rate)


def _multiples(low: float, high: float, grain: int) -> tuple[int, int]:
    """Returns the least and the greatest multiple of ``grain`` between ``low`` and ``high``, which 0 is."""
    return math.ceil(low / grain - TOLERANCE), math.floor(high / grain + TOLERANCE)
