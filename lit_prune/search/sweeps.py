"""A search for rates by sweeps over the blocks; it knows a loss function, no models.

EvoPress (ICML 2025, arXiv 2410.14649) draws exchanges of budget between blocks and keeps those that lower the loss;
most of its measurements reject a candidate. Here every measurement counts: a sweep measures what the loss does when one
block loses a little more, and when it loses a little less, and then solves for the exchange between all blocks at once.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from lit_prune.search.space import Group, Point, Space

Loss = Callable[[Point, Sequence[int]], float]
_Key = TypeVar("_Key")
MOST = 64  # blocks in a sweep
REACH = 3.0  # largest change of a block, in multiples of what a sweep changes
LEAST_REACH = 0.05
SHARES = (0.25, 0.5, 1.0)  # of the reach, of the candidates
FLATTEST = 0.5  # smallest curvature of a block, as a share of the median of those that are positive
BENT = 1e-3  # smallest curvature of a block over its whole size, as a share of the steepest slope


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
    the best rates so far on other windows, if there are enough. The bounds become wider or narrower with the candidate
    that was best.

    A flat parabola, or one that bends down, would send a block to its bounds: the curvature is at least half of the
    median of those that bend up, for blocks of the same size.

    Args:
        space: The rates that can be reached.
        step: What a sweep changes, as a share of a block.
        windows: Number of windows on which everything is measured; each sweep draws some, and others to compare on.
        available: Number of calibration windows.
        loss: Function of a point and of the indices of some windows that returns the mean loss. It should cache its
            results, since it is called again for the same points.
        seed: Seed of all random draws; the same losses give the same search.
        together: Families of groups of blocks, each for a sweep that takes the blocks of a group together. After them
            comes a sweep over single blocks, and then the families again.
    """

    def __init__(
        self,
        space: Space,
        step: float,
        windows: int,
        available: int,
        loss: Loss,
        seed: int,
        together: Sequence[Sequence[Group]] = (),
    ) -> None:
        self.space, self.step, self.windows, self.available = space, step, min(windows, available), available
        self.loss, self.draw = loss, random.Random(seed)
        self.best, self.reach = space.origin, [REACH] * len(space.start)
        self._singles: list[Group] = [(block,) for block in range(len(space.start))]
        families = [list(family) for family in together if len(family) > 1 and any(len(group) > 1 for group in family)]
        self._turns = itertools.cycle([*families, []])  # nothing stands for single blocks
        self._due: list[Group] = []  # of the family whose turn it is
        self._waiting: list[Group] = []  # single blocks that have their turns before others

    def sweep(self, most: int = MOST) -> bool:
        """Replaces the best rates by better ones, if there are any; returns False if no others can be reached.

        Args:
            most: Number of blocks, or groups, that are measured at most; the following sweep goes on with others.
        """
        if not self.space.movable(self.best):
            return False
        here, there = self._windows()
        curves = {group: self._curve(group, here) for group in self._next(most)}
        candidates = {share: self._exchanged(curves, share) for share in SHARES}
        losses = {share: self.loss(point, there) for share, point in candidates.items() if point != self.best}
        better = [share for share, loss in losses.items() if loss < self.loss(self.best, there)]
        if better:
            share = min(better, key=losses.__getitem__)
            self.best = candidates[share]
            self._extend(curves, 2 * share)
        elif losses:
            self._extend(curves, min(SHARES))
        return True

    def _windows(self) -> tuple[Sequence[int], Sequence[int]]:
        """Returns the windows of a sweep, and those on which its candidates are compared."""
        count = self.windows
        if 2 * count <= self.available:
            drawn = self.draw.sample(range(self.available), 2 * count)
            return drawn[:count], drawn[count:]
        return self.draw.sample(range(self.available), count), self.draw.sample(range(self.available), count)

    def _extend(self, groups: Iterable[Group], factor: float) -> None:
        """Multiplies the reach of all blocks of ``groups``, within its limits."""
        for block in (block for group in groups for block in group):
            self.reach[block] = min(max(factor * self.reach[block], LEAST_REACH), REACH)

    def _next(self, most: int) -> list[Group]:
        """Returns the groups of the next sweep: all, or up to ``most`` whose turn it is in a random order."""
        if not self._due:
            self._due = list(next(self._turns)) or self._some(most)
        if len(self._due) == 1:  # which has nothing to exchange with
            others = [single for single in self._singles if single[0] not in self._due[0]]
            self._due += self.draw.sample(others, len(others))
        if len(self._due) > most:
            self.draw.shuffle(self._due)
        groups, self._due = self._due[:most], self._due[most:]
        return sorted(groups)

    def _some(self, most: int) -> list[Group]:
        """Returns all single blocks, or ``most`` of them, so that all have their turns before one has another."""
        if not self._waiting:
            self._waiting = list(self._singles)
            if len(self._waiting) > most:
                self.draw.shuffle(self._waiting)
        some, self._waiting = self._waiting[:most], self._waiting[most:]
        return some

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

    def _exchanged(self, curves: Mapping[Group, Curve], share: float) -> Point:
        """Returns the point with the least sum of ``curves``, with all changes within a share of the blocks' reach."""
        rooms = {block: self._room(block, share) for group in curves for block in group}
        sizes = {group: sum(self.space.sizes[block] for block in group) for group in curves}
        bends = [bend for group, curve in curves.items() if (bend := curve.curvature * sizes[group]) > 0]
        steepest = max(abs(curve.slope) for curve in curves.values())
        least = max(FLATTEST * median(bends) if bends else 0.0, BENT * steepest) or 1.0
        bounded = {}
        for group, curve in curves.items():
            low, high = (sum(side) for side in zip(*(rooms[block] for block in group), strict=True))
            curvature = max(curve.curvature, least / sizes[group])
            bounded[group] = Curve(curve.slope, curvature, low if curve.low else 0.0, high if curve.high else 0.0)
        wanted, bounds = dict[int, float](), dict[int, tuple[float, float]]()
        for exchangeable in self.space.exchangeable(rooms):
            own = {group: bounded[group] for group in curves if group[0] in exchangeable}
            for group, change in least_sum(own).items():
                curve = bounded[group]
                for block in group:
                    low, high = rooms[block]
                    total, room = (curve.high, high) if change > 0 else (curve.low, low)
                    wanted[block] = change * room / total if total else 0.0
                    bounds[block] = low if curve.low else 0.0, high if curve.high else 0.0
        return self.space.moved(self.best, wanted, bounds)

    def _room(self, block: int, share: float) -> tuple[float, float]:
        """Returns the least and the greatest change within a share of a block's reach, one unit if there is room."""
        most = max(share * self.reach[block] * self.step * self.space.sizes[block], self.space.granularity[block])
        low, high = self.space.room(self.best, block)
        return -min(most, low), min(most, high)


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


def evaluations_of_sweep(blocks: int, windows: int) -> int:
    """Returns the number of measurements of a sweep: 18 for two blocks and two windows.

    These are all blocks twice and the best rates on the first windows, and the candidates and the best rates on others.
    """
    return (2 * blocks + 1 + len(SHARES) + 1) * windows
