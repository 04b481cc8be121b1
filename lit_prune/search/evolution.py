"""An evolutionary search of rates that learns which blocks are costly. It deals with rates and a loss, not with models.

After EvoPress (ICML 2025, arXiv 2410.14649): the offspring of the best rates differ from them by moves of budget
between blocks; they are measured on few calibration windows, the survivors and their parent on more, and the best of
these is the next parent. EvoPress draws the blocks of a move uniformly. Here every measurement also corrects an
estimate of what a block's budget costs, and moves go, by tournament, from costly blocks to cheap ones: see
:class:`Evolution`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Moved = tuple[int, ...]
Loss = Callable[[Moved, Sequence[int]], float]
TOLERANCE = 1e-9
CONTENDERS = 3  # of a tournament, and at most half of the blocks
LEARNED = 0.5  # share of an estimate's error that one measurement corrects
ATTEMPTS = 1000  # at offspring that the bounds allow


@dataclass(frozen=True)
class Space:
    """The rates that can be reached from those at the start by moves of budget between blocks.

    A point of the space is one whole number a block, the budget that was moved to it in the unit of ``sizes``. The
    numbers add up to 0, so that the mean of the rates, weighted by the sizes, does not change: for blocks of 100 and 50
    weights at [0.5, 0.5], (10, -10) gives [0.6, 0.3].

    Attributes:
        start: The rate of each block at the start.
        sizes: Number of units that each block has.
        granularity: Number of units by multiples of which the budget of each block can change.
        lower: Least rate of each block.
        upper: Largest rate of each block.
        step: Budget of one move, as a share of the mean size.
    """

    start: Sequence[float]
    sizes: Sequence[int]
    granularity: Sequence[int]
    lower: Sequence[float]
    upper: Sequence[float]
    step: float

    @property
    def origin(self) -> Moved:
        """The point at which nothing is moved."""
        return (0,) * len(self.start)

    def rates(self, moved: Moved) -> list[float]:
        """Returns the rates at the point ``moved``."""
        return [rate + part / size for rate, part, size in zip(self.start, moved, self.sizes, strict=True)]

    def amount(self, one: int, other: int) -> int:
        """Returns the budget of a move between two blocks: of what both can change by, the nearest to the step."""
        common = math.lcm(self.granularity[one], self.granularity[other])
        return common * max(round(self.step * sum(self.sizes) / len(self.sizes) / common), 1)

    def allows(self, moved: Moved) -> bool:
        """Returns whether the rates are within their bounds."""
        bounds = zip(self.rates(moved), self.lower, self.upper, strict=True)
        return all(low - TOLERANCE <= rate <= high + TOLERANCE for rate, low, high in bounds)


@dataclass(frozen=True)
class Rounds:
    """The sizes of a generation and of its two rounds of selection.

    Attributes:
        offspring: Number of candidates.
        survivors: Number of candidates that are compared with their parent.
        first: Number of windows that all candidates are measured on.
        final: Number of windows that the survivors and their parent are measured on, the first ones among them.
    """

    offspring: int
    survivors: int
    first: int
    final: int

    def within(self, windows: int) -> Rounds:
        """Returns the same, with no more than ``windows`` windows."""
        final = min(self.final, windows)
        return Rounds(self.offspring, self.survivors, min(self.first, final), final)

    @property
    def evaluations(self) -> int:
        """The largest number of measurements that a generation takes, of one candidate on one window each."""
        return self.offspring * self.first + self.survivors * (self.final - self.first) + self.final


class Evolution:
    """An evolution: the best rates, and an estimate of what the budget of each block costs.

    ``costs`` estimates by how much the loss rises when a block is pruned by one step more. A candidate that moves d_b
    steps is expected to change the loss by sum_b costs_b d_b; half of the error of this estimate corrects the costs
    along d (the normalised least-mean-squares rule): with d = (1, -1), +0.4 measured and 0 expected, the costs become
    (0.1, -0.1). A move takes budget from the costliest of three random blocks and gives it to the cheapest of three
    others, so that it still explores.

    Args:
        space: The rates that can be reached.
        rounds: The sizes of a generation.
        windows: Number of calibration windows; each generation draws some of them.
        loss: Mean loss at a point of the space over some windows, by their indices. It is called again for points that
            it has measured, and should remember them.
        seed: Seed of all random draws; the same losses give the same search.
    """

    def __init__(self, space: Space, rounds: Rounds, windows: int, loss: Loss, seed: int) -> None:
        self.space, self.rounds, self.windows, self.loss = space, rounds.within(windows), windows, loss
        self.draw = random.Random(seed)
        self.best = space.origin
        self.costs = [0.0] * len(space.start)

    def generation(self) -> bool:
        """Replaces the best by better offspring, if there are any; returns False if no other rates can be reached."""
        offspring = self._offspring()
        if not offspring:
            return False
        windows = self.draw.sample(range(self.windows), self.rounds.final)
        few, parent = windows[: self.rounds.first], self.best
        before = self.loss(parent, few)
        losses = [self.loss(child, few) for child in offspring]
        for child, loss in zip(offspring, losses, strict=True):
            self._learn(child, loss - before)
        ranked = sorted(range(len(offspring)), key=losses.__getitem__)
        rivals = [parent, *(offspring[index] for index in ranked[: self.rounds.survivors])]
        self.best = min(rivals, key=lambda moved: self.loss(moved, windows))
        return True

    def _offspring(self) -> list[Moved]:
        children: dict[Moved, None] = {}
        for _ in range(ATTEMPTS):
            child = self._child()
            if child != self.best:
                children[child] = None
            if len(children) == self.rounds.offspring:
                break
        return list(children)

    def _child(self) -> Moved:
        """The best rates after one or more moves of budget, up to a third as many as there are blocks."""
        moved, blocks = self.best, range(len(self.best))
        if len(blocks) < 2:
            return moved
        for _ in range(self.draw.randint(1, max(len(blocks) // 3, 1))):
            costly = max(self._drawn(blocks), key=self.costs.__getitem__)
            cheap = min(self._drawn(block for block in blocks if block != costly), key=self.costs.__getitem__)
            amount = self.space.amount(costly, cheap)
            parts = list(moved)
            parts[costly] -= amount
            parts[cheap] += amount
            if self.space.allows(tuple(parts)):
                moved = tuple(parts)
        return moved

    def _drawn(self, blocks: Iterable[int]) -> list[int]:
        return self.draw.sample(list(blocks), max(min(CONTENDERS, len(self.best) // 2), 1))

    def _learn(self, child: Moved, rise: float) -> None:
        """Corrects the costs by the difference between the losses of a child and its parent."""
        if not math.isfinite(rise):
            return
        unit = self.space.step * sum(self.space.sizes) / len(self.space.sizes)
        steps = [(part - before) / unit for part, before in zip(child, self.best, strict=True)]
        expected = sum(cost * step for cost, step in zip(self.costs, steps, strict=True))
        correction = LEARNED * (rise - expected) / sum(step * step for step in steps)
        self.costs = [cost + correction * step for cost, step in zip(self.costs, steps, strict=True)]
