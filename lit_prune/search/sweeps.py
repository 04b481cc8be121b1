"""A search for rates by sweeps over the blocks; it knows a loss function, no models.

EvoPress (ICML 2025, arXiv 2410.14649) draws exchanges of budget between blocks and keeps those that lower the loss;
most of its measurements reject a candidate. Here every measurement counts: a sweep measures what the loss does when one
block loses a little more, and when it loses a little less, and then solves for the exchange between all blocks at once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from lit_prune.search.space import Group, Point, Space

Loss = Callable[[Point, Sequence[int]], float]
_Key = TypeVar("_Key")
MOST = 64  # blocks in a sweep
REACH = 3.0  # largest change of a block, in multiples of what a sweep changes
SHARES = (0.25, 0.5, 1.0)  # of the reach, of the candidates
FLATTEST = 0.5  # smallest curvature of a block, as a share of the median


@dataclass(frozen=True)
class Curve:
    """A parabola for the rise of the loss when the budget of one block changes by x: slope x + curvature x^2 / 2.

    Attributes:
        slope: Rise for every unit, at the best rates.
        curvature: Change of the slope for every unit.
        low: Least change, at most 0.
        high: Greatest change, at least 0.
    """

    slope: float
    curvature: float
    low: float
    high: float

    @classmethod
    def through(cls, low: float, high: float, rise: Callable[[float], float]) -> Curve:
        """Returns the parabola through 0 and the ``rise`` at ``low`` and at ``high``; a line if one of them is 0.

        A change whose rise is not finite is beyond the bounds of the curve.
        """
        below, above = (rise(change) if change else 0.0 for change in (low, high))
        low, high = (low if math.isfinite(below) else 0.0), (high if math.isfinite(above) else 0.0)
        if low and high:
            curvature = 2 * (above / high - below / low) / (high - low)
            return cls(above / high - curvature * high / 2, curvature, low, high)
        return cls(above / high if high else below / low if low else 0.0, 0.0, low, high)


class Sweeps:
    """The state of a search: the best rates, and how far the next candidates go from them.

    A sweep measures the loss with each block's budget a ``step`` of its size higher and lower, all on the same windows.
    Three measurements give a parabola per block, and the exchange of budget with the least sum of all parabolas is
    found for three bounds of the changes. Since blocks do not add up exactly, these three candidates are compared with
    the best rates so far on other windows. The bounds become wider or narrower with the candidate that was best.

    A flat parabola, or one that bends down, would send a block to its bounds: the curvature is at least half of the
    median of the blocks (per share of a block).

    Args:
        space: The rates that can be reached.
        step: What a sweep changes, as a share of a block.
        windows: Number of windows on which everything is measured; each sweep draws some, and others to compare on.
        available: Number of calibration windows.
        loss: Function of a point and of the indices of some windows that returns the mean loss. It should cache its
            results, since it is called again for the same points.
        seed: Seed of all random draws; the same losses give the same search.
        together: Groups of blocks that the first sweep takes as one; None starts with single blocks.
    """

    def __init__(
        self,
        space: Space,
        step: float,
        windows: int,
        available: int,
        loss: Loss,
        seed: int,
        together: Sequence[Group] | None = None,
    ) -> None:
        self.space, self.step, self.windows, self.available = space, step, min(windows, available), available
        self.loss, self.draw = loss, random.Random(seed)
        self.best, self.reach = space.origin, REACH
        self._singles: list[Group] = [(block,) for block in range(len(space.start))]
        self._due = list(together or self._singles)  # that have their turns before all single blocks come again

    def sweep(self, most: int = MOST) -> bool:
        """Replaces the best rates by better ones, if there are any; returns False if no others can be reached.

        Args:
            most: Number of blocks, or groups, that are measured at most; the following sweep goes on with others.
        """
        if not self.space.movable(self.best):
            return False
        here, there = (self.draw.sample(range(self.available), self.windows) for _ in range(2))
        curves = {group: self._curve(group, here) for group in self._next(most)}
        candidates = {share: self._exchanged(curves, share * self.reach) for share in SHARES}
        losses = {share: self.loss(point, there) for share, point in candidates.items() if point != self.best}
        better = [share for share, loss in losses.items() if loss < self.loss(self.best, there)]
        if better:
            share = min(better, key=losses.__getitem__)
            self.best, self.reach = candidates[share], min(2 * share * self.reach, REACH)
        else:
            self.reach *= min(SHARES)
        return True

    def _next(self, most: int) -> list[Group]:
        """Returns the groups of the next sweep: all, or up to ``most`` whose turn it is in a random order."""
        if len(self._due) < 2:  # one alone has nothing to exchange with
            self._due = list(self._singles)
        if len(self._due) > most:
            self.draw.shuffle(self._due)
        groups, self._due = self._due[:most], self._due[most:]
        return sorted(groups)

    def _curve(self, group: Group, windows: Sequence[int]) -> Curve:
        """Measures ``group`` with more and with less budget."""
        changes = {
            sign: {
                block: self.space.nearest(self.best, block, sign * self.step * self.space.sizes[block])
                for block in group
            }
            for sign in (-1, 1)
        }
        low, high = (sum(changes[sign].values()) for sign in (-1, 1))

        def rise(change: float) -> float:
            own = changes[1 if change > 0 else -1]
            changed = tuple(part + own.get(block, 0) for block, part in enumerate(self.best))
            return self.loss(changed, windows) - self.loss(self.best, windows)

        return Curve.through(low, high, rise)

    def _exchanged(self, curves: Mapping[Group, Curve], reach: float) -> Point:
        """Returns the point with the least sum of ``curves``, where no block changes by more than ``reach`` steps."""
        sizes = {group: sum(self.space.sizes[block] for block in group) for group in curves}
        flattest = FLATTEST * median(curve.curvature * sizes[group] for group, curve in curves.items())
        bounded = {}
        for group, curve in curves.items():
            low, high = self._room(group, reach)
            curvature = max(curve.curvature, flattest / sizes[group], 1e-12)
            bounded[group] = Curve(curve.slope, curvature, low if curve.low else 0.0, high if curve.high else 0.0)
        wanted: dict[int, float] = {}
        for exchangeable in self.space.exchangeable():
            for group, change in least_sum(
                {group: bounded[group] for group in curves if group[0] in exchangeable}
            ).items():
                wanted |= {block: change * self.space.sizes[block] / sizes[group] for block in group}
        return self.space.moved(self.best, wanted)

    def _room(self, group: Group, reach: float) -> tuple[float, float]:
        """Returns the least and the greatest change of a group that all its blocks can share by their sizes."""
        shares = []
        for block in group:
            size, (low, high) = self.space.sizes[block], self.space.room(self.best, block)
            most = max(reach * self.step * size, self.space.granularity[block])
            shares.append((min(most, low) / size, min(most, high) / size))
        size = sum(self.space.sizes[block] for block in group)
        low, high = (min(side) for side in zip(*shares, strict=True))
        return -low * size, high * size


def least_sum(curves: Mapping[_Key, Curve]) -> dict[_Key, float]:
    """Returns the changes of sum 0, within the bounds of the ``curves``, for which the sum of all rises is least.

    Two curves x^2 / 2 and 2 x + x^2 / 2 give 1 and -1. At the least sum, all slopes that are not at a bound are equal;
    this slope is found by bisection.
    """
    steep = max((abs(c.slope) + c.curvature * max(-c.low, c.high) for c in curves.values()), default=0.0)
    low, high = -steep, steep

    def changes(slope: float) -> dict[_Key, float]:
        wanted = {block: (slope - curve.slope) / curve.curvature for block, curve in curves.items()}
        return {block: min(max(change, curves[block].low), curves[block].high) for block, change in wanted.items()}

    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(changes(middle).values()) < 0 else (low, middle)
    return changes((low + high) / 2)
