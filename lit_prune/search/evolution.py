"""An evolutionary search for rates that learns which blocks are costly to prune; it knows a loss function, no models.

After EvoPress (ICML 2025, arXiv 2410.14649): offspring differ from the best rates by moves of budget between blocks.
All are measured on a few calibration windows, the survivors and their parent on more, and the best of these is the next
parent. EvoPress draws the blocks of a move uniformly. Here every measurement also corrects an estimate of the cost of
pruning each block, and a tournament moves budget from costly blocks to cheap ones: see :class:`Evolution`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Point = tuple[int, ...]
Loss = Callable[[Point, Sequence[int]], float]
TOLERANCE = 1e-9
CONTENDERS = 3  # blocks in a tournament, but at most half of all
LEARNING_RATE = 0.5  # share of an estimate's error that one measurement corrects
ATTEMPTS = 1000  # random draws for the offspring of a generation


@dataclass(frozen=True)
class Space:
    """The rates that can be reached from the start by moves of budget between blocks.

    A point of the space has one integer per block: the units of ``sizes`` that were added to its budget. They add up to
    0, so that the mean of the rates, weighted by the sizes, does not change: for blocks of 100 and 50 weights at
    [0.5, 0.5], the point (10, -10) has the rates [0.6, 0.3].

    Attributes:
        start: The rate of each block at the start.
        sizes: Number of units that each block has.
        granularity: Number of units of which every change of a block's budget is a multiple.
        lower: Lower bound of each block's rate.
        upper: Upper bound of each block's rate.
        step: Budget of one move, as a share of the mean size.
    """

    start: Sequence[float]
    sizes: Sequence[int]
    granularity: Sequence[int]
    lower: Sequence[float]
    upper: Sequence[float]
    step: float

    @property
    def origin(self) -> Point:
        """The point of the start, where nothing is moved."""
        return (0,) * len(self.start)

    def rates(self, point: Point) -> list[float]:
        """Returns the rates at ``point``."""
        return [rate + part / size for rate, part, size in zip(self.start, point, self.sizes, strict=True)]

    def amount(self, one: int, other: int) -> int:
        """Returns the budget of a move between two blocks: the multiple of both granularities nearest to the step."""
        common = math.lcm(self.granularity[one], self.granularity[other])
        return common * max(round(self.step * sum(self.sizes) / len(self.sizes) / common), 1)

    def allows(self, point: Point) -> bool:
        """Returns whether the rates at ``point`` are within their bounds."""
        bounds = zip(self.rates(point), self.lower, self.upper, strict=True)
        return all(low - TOLERANCE <= rate <= high + TOLERANCE for rate, low, high in bounds)


@dataclass(frozen=True)
class Rounds:
    """The sizes of a generation and of its two rounds of selection.

    Attributes:
        offspring: Number of candidates.
        survivors: Number of candidates that are compared with their parent.
        first: Number of windows on which all candidates are measured.
        final: Number of windows, including the first ones, on which the survivors and their parent are measured.
    """

    offspring: int
    survivors: int
    first: int
    final: int

    def within(self, windows: int) -> Rounds:
        """Returns the rounds limited to ``windows`` windows."""
        final = min(self.final, windows)
        return Rounds(self.offspring, self.survivors, min(self.first, final), final)

    @property
    def evaluations(self) -> int:
        """The maximum number of measurements in a generation, each of one candidate on one window."""
        return self.offspring * self.first + self.survivors * (self.final - self.first) + self.final


class Evolution:
    """The state of an evolution: the best rates, and an estimate of the cost of pruning each block.

    ``costs`` estimates the rise of the loss when a block is pruned by one more step. A candidate that moves d_b
    steps is expected to change the loss by sum_b costs_b d_b; half of the error of this estimate corrects the costs
    along d (the normalised least-mean-squares rule): with d = (1, -1), +0.4 measured and 0 expected, the costs become
    (0.1, -0.1). A move takes budget from the costliest of three random blocks and gives it to the cheapest of three
    others; the random choice keeps the search exploring.

    Args:
        space: The rates that can be reached.
        rounds: The sizes of a generation.
        windows: Number of calibration windows; each generation draws some of them.
        loss: Function of a point and of the indices of some windows that returns the mean loss. It should cache its
            results, since it is called again for the same points.
        seed: Seed of all random draws; the same losses give the same search.
        moves: Most moves from the best rates to a candidate; None is a third of the number of blocks.
    """

    def __init__(
        self, space: Space, rounds: Rounds, windows: int, loss: Loss, seed: int, moves: int | None = None
    ) -> None:
        self.space, self.rounds, self.windows, self.loss = space, rounds.within(windows), windows, loss
        self.draw = random.Random(seed)
        self.best = space.origin
        self.costs = [0.0] * len(space.start)
        self.moves = max(moves or len(space.start) // 3, 1)

    def generation(self) -> bool:
        """Replaces the best rates by better offspring; returns False if no other rates can be reached."""
        offspring = self._offspring()
        if not offspring:
            return False
        windows = self.draw.sample(range(self.windows), self.rounds.final)
        first_windows, parent = windows[: self.rounds.first], self.best
        before = self.loss(parent, first_windows)
        losses = [self.loss(child, first_windows) for child in offspring]
        for child, loss in zip(offspring, losses, strict=True):
            self._learn(child, loss - before)
        ranked = sorted(range(len(offspring)), key=losses.__getitem__)
        rivals = [parent, *(offspring[index] for index in ranked[: self.rounds.survivors])]
        self.best = min(rivals, key=lambda point: self.loss(point, windows))
        return True

    def _offspring(self) -> list[Point]:
        children: dict[Point, None] = {}
        for _ in range(ATTEMPTS):
            child = self._child()
            if child != self.best:
                children[child] = None
            if len(children) == self.rounds.offspring:
                break
        return list(children)

    def _child(self) -> Point:
        """The best rates after one or more random moves, at most ``moves``."""
        point, blocks = self.best, range(len(self.best))
        if len(blocks) < 2:
            return point
        for _ in range(self.draw.randint(1, self.moves)):
            costly = max(self._drawn(blocks), key=self.costs.__getitem__)
            cheap = min(self._drawn(block for block in blocks if block != costly), key=self.costs.__getitem__)
            amount = self.space.amount(costly, cheap)
            parts = list(point)
            parts[costly] -= amount
            parts[cheap] += amount
            if self.space.allows(tuple(parts)):
                point = tuple(parts)
        return point

    def _drawn(self, blocks: Iterable[int]) -> list[int]:
        return self.draw.sample(list(blocks), max(min(CONTENDERS, len(self.best) // 2), 1))

    def _learn(self, child: Point, rise: float) -> None:
        """Corrects the costs by the rise of the loss from a parent to its child."""
        if not math.isfinite(rise):
            return
        unit = self.space.step * sum(self.space.sizes) / len(self.space.sizes)
        steps = [(part - before) / unit for part, before in zip(child, self.best, strict=True)]
        expected = sum(cost * step for cost, step in zip(self.costs, steps, strict=True))
        correction = LEARNING_RATE * (rise - expected) / sum(step * step for step in steps)
        self.costs = [cost + correction * step for cost, step in zip(self.costs, steps, strict=True)]
