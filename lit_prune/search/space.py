"""The rates that a search can reach from its start by moves of budget; it knows no models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Point = tuple[int, ...]
Group = tuple[int, ...]
Family = Sequence[Group]
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Space:
    """The rates that can be reached from the start by moves of budget between blocks.

    A point of the space has one integer per block: the units of ``sizes`` that were added to its budget. They add up to
    0, so that the mean of the rates, weighted by the sizes, does not change: for blocks of 100 and 50 weights at
    [0.5, 0.5], the point (10, -10) has the rates [0.6, 0.3]. Instead of blocks, they can be of linears or parts.

    Attributes:
        start: The rate of each block at the start.
        sizes: Number of units that each block has.
        granularity: Number of units of which every change of a block's budget is a multiple.
        lower: Lower bound of each block's rate.
        upper: Upper bound of each block's rate.
        step: Budget of a move, as a share of the smaller of the two blocks or groups.
        balance: Smallest and largest sum of a point, where granularities differ too much for a sum of 0.
    """

    start: Sequence[float]
    sizes: Sequence[int]
    granularity: Sequence[int]
    lower: Sequence[float]
    upper: Sequence[float]
    step: float
    balance: tuple[float, float] = (0.0, 0.0)

    @property
    def origin(self) -> Point:
        """The point of the start, where nothing is moved."""
        return (0,) * len(self.start)

    def rates(self, point: Point) -> list[float]:
        """Returns the rates at ``point``."""
        return [rate + part / size for rate, part, size in zip(self.start, point, self.sizes, strict=True)]

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

    def moved(self, point: Point, source: Group, target: Group, scale: float = 1.0) -> Point:
        """Returns ``point`` after a move from one group of blocks to another, or ``point`` if bounds do not allow it.

        The budget is ``scale * step`` of the smaller group, rounded to the granularity. It is spread over the blocks of
        each group in proportion to their sizes, as far as their bounds allow. The group with the coarser granularity
        comes first, and the other brings the sum of the point to the middle of its bounds: a unit of 80 parameters goes
        for 3 of 30, and the next one for 2, as the first took 10 too much.
        """
        grains = [max(self.granularity[block] for block in group) for group in (source, target)]
        unit = max(grains) if any(self.balance) else math.lcm(*(self.granularity[block] for block in source + target))
        wanted = self.step * scale * min(self._size(source), self._size(target))
        excess = round(sum(point) - sum(self.balance) / 2)
        parts = list(point)
        room = min(
            sum(self._room(parts, block, sign) for block in group) for group, sign in ((source, -1), (target, 1))
        )
        amount = min(unit * max(round(wanted / unit), 1), unit * (room // unit))
        if grains[0] > grains[1]:
            taken = self._spread(parts, source, amount, -1)
            self._spread(parts, target, taken - excess, 1)
        elif grains[0] < grains[1]:
            given = self._spread(parts, target, amount, 1)
            self._spread(parts, source, given + excess, -1)
        else:
            self._spread(parts, target, self._spread(parts, source, amount, -1), 1)
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
