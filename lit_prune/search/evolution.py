"""Better rates by trying: an evolution that learns which blocks are dear. It knows of rates and a loss, of no model.

After EvoPress (ICML 2025, arXiv 2410.14649): offspring of the best rates so far, each made by moving budget between
blocks, are measured on few calibration windows, those that survive and their parent on more, and the best of these is
the next parent. EvoPress draws the blocks of a move evenly. Here every measurement also corrects an estimate of what a
block's budget costs, and moves go, by tournament, from dear blocks to cheap ones: see :class:`Evolution`.
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
    """The rates that are possible: those at the start, and what whole moves of budget make of them.

    What was moved is one whole number a block, in the unit of ``sizes``, and their sum is 0: the mean of the rates,
    weighted by the sizes, stays what it was. Of blocks of 100 and 50 weights at [0.5, 0.5], (10, -10) makes [0.6, 0.3].

    Attributes:
        start: The rate of each block at the start.
        sizes: What each block has to give.
        grains: What each block gives can change by multiples of this only.
        lower: The rate that each block does not fall below.
        upper: The rate that each block does not exceed.
        step: What one move takes from a block and gives to another, as a share of the mean size.
    """

    start: Sequence[float]
    sizes: Sequence[int]
    grains: Sequence[int]
    lower: Sequence[float]
    upper: Sequence[float]
    step: float

    @property
    def origin(self) -> Moved:
        """Nothing moved."""
        return (0,) * len(self.start)

    def rates(self, moved: Moved) -> list[float]:
        """Returns the rates after ``moved``."""
        return [rate + part / size for rate, part, size in zip(self.start, moved, self.sizes, strict=True)]

    def amount(self, one: int, other: int) -> int:
        """Returns what a move between two blocks takes: what both can give that is nearest to the step."""
        common = math.lcm(self.grains[one], self.grains[other])
        return common * max(round(self.step * sum(self.sizes) / len(self.sizes) / common), 1)

    def allows(self, moved: Moved) -> bool:
        """Returns whether the rates keep to their bounds."""
        bounds = zip(self.rates(moved), self.lower, self.upper, strict=True)
        return all(low - TOLERANCE <= rate <= high + TOLERANCE for rate, low, high in bounds)


@dataclass(frozen=True)
class Rounds:
    """How a generation is sifted.

    Attributes:
        offspring: Candidates of a generation.
        survivors: How many of them meet their parent.
        first: Windows that all candidates are measured on.
        final: Windows that the survivors and their parent are measured on, the first ones among them.
    """

    offspring: int
    survivors: int
    first: int
    final: int

    def within(self, windows: int) -> Rounds:
        """Returns the same for so many windows in all."""
        final = min(self.final, windows)
        return Rounds(self.offspring, self.survivors, min(self.first, final), final)

    @property
    def evaluations(self) -> int:
        """What a generation takes at most, in windows."""
        return self.offspring * self.first + self.survivors * (self.final - self.first) + self.final


class Evolution:
    """The best rates so far, what blocks cost as far as it is known, and how both become better.

    ``costs`` estimates by how much the loss rises when a block gives one step more. A candidate that moves d_b steps is
    expected to change the loss by sum_b costs_b d_b; half of what it does otherwise corrects the costs along d (the
    normalised least-mean-squares rule): d = (1, -1), measured +0.4 where 0 was expected, makes costs (0.1, -0.1). Each
    move takes from the dearest and gives to the cheapest of three blocks that are drawn, so that chance still explores.

    Args:
        space: The rates that are possible.
        rounds: How a generation is sifted.
        windows: How many calibration windows there are; each generation draws its own.
        loss: Mean loss of what was moved over some windows, by their indices; measured once, told again for nothing.
        seed: Seed of all that is drawn; the same losses give the same search.
    """

    def __init__(self, space: Space, rounds: Rounds, windows: int, loss: Loss, seed: int) -> None:
        self.space, self.rounds, self.windows, self.loss = space, rounds.within(windows), windows, loss
        self.draw = random.Random(seed)
        self.best = space.origin
        self.costs = [0.0] * len(space.start)

    def generation(self) -> bool:
        """Makes offspring and keeps the best, or their parent; returns False where there is nowhere to go."""
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
        found: dict[Moved, None] = {}
        for _ in range(ATTEMPTS):
            child = self._child()
            if child != self.best:
                found[child] = None
            if len(found) == self.rounds.offspring:
                break
        return list(found)

    def _child(self) -> Moved:
        """The best with some moves of budget, up to a third as many as there are blocks."""
        moved, blocks = self.best, range(len(self.best))
        if len(blocks) < 2:
            return moved
        for _ in range(self.draw.randint(1, max(len(blocks) // 3, 1))):
            dear = max(self._drawn(blocks), key=self.costs.__getitem__)
            cheap = min(self._drawn(block for block in blocks if block != dear), key=self.costs.__getitem__)
            amount = self.space.amount(dear, cheap)
            parts = list(moved)
            parts[dear] -= amount
            parts[cheap] += amount
            if self.space.allows(tuple(parts)):
                moved = tuple(parts)
        return moved

    def _drawn(self, blocks: Iterable[int]) -> list[int]:
        return self.draw.sample(list(blocks), max(min(CONTENDERS, len(self.best) // 2), 1))

    def _learn(self, child: Moved, rise: float) -> None:
        """Corrects the costs by what a child did to the loss of its parent."""
        if not math.isfinite(rise):
            return
        unit = self.space.step * sum(self.space.sizes) / len(self.space.sizes)
        steps = [(part - before) / unit for part, before in zip(child, self.best, strict=True)]
        expected = sum(cost * step for cost, step in zip(self.costs, steps, strict=True))
        by = LEARNED * (rise - expected) / sum(step * step for step in steps)
        self.costs = [cost + by * step for cost, step in zip(self.costs, steps, strict=True)]
