"""An evolutionary search for rates that learns which blocks are costly to prune; it knows a loss function, no models.

After EvoPress (ICML 2025, arXiv 2410.14649): offspring differ from the best rates by moves of budget between blocks.
All are measured on a few calibration windows, the survivors and their parent on more, and the best of these is the next
parent. EvoPress draws the blocks of a move uniformly. Here every measurement also corrects an estimate of the cost of
pruning each block, a tournament moves budget from costly blocks to cheap ones, moves can be between whole groups, and
what all successful offspring changed is tried together: see :class:`Evolution`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_prune.search.space import Family, Group, Point, Space

Loss = Callable[[Point, Sequence[int]], float]
CONTENDERS = 3  # groups in a tournament, but at most half of the family
LEARNING_RATE = 0.5  # share of an estimate's error that one measurement corrects
SHRINKAGE, GROWTH = 0.6, 1.2  # of the moves, after a generation without better rates and one with such
SMALLEST = 0.05  # share of the step that moves keep
MOVES = 3  # most moves from the best rates to a candidate
ATTEMPTS = 1000  # random draws for the offspring of a generation


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
        combined = self.final if self.offspring > 1 else 0
        return self.offspring * self.first + self.survivors * (self.final - self.first) + self.final + combined


class Evolution:
    """The state of an evolution: the best rates, and an estimate of the cost of pruning each group of blocks.

    A move takes budget from one group of a family, such as the single blocks, and gives it to another. The cost of a
    group estimates the rise of the loss for every step of budget that its blocks get, beyond what other groups with
    these blocks account for. A candidate that gives group g d_g steps is expected to change the loss by
    sum_g costs_g d_g; half of the error of this estimate corrects the costs along d (the normalised least-mean-squares
    rule): with single blocks, d = (1, -1), +0.4 measured and 0 expected, the costs become (0.1, -0.1). A move takes
    from the costliest of three random groups and gives to the cheapest of three others; the random choice keeps the
    search exploring.

    All offspring with a lower loss than their parent are also combined into one more candidate, which has the moves of
    all. After a generation without better rates moves become smaller, otherwise larger again.

    Args:
        space: The rates that can be reached.
        rounds: The sizes of a generation.
        windows: Number of calibration windows; each generation draws some of them.
        loss: Function of a point and of the indices of some windows that returns the mean loss. It should cache its
            results, since it is called again for the same points.
        seed: Seed of all random draws; the same losses give the same search.
        families: Families of disjoint groups, between which budget moves; None is one family of the single blocks.
        moves: Most moves from the best rates to a candidate; None is a third of the number of blocks, but at most 3.
    """

    def __init__(
        self,
        space: Space,
        rounds: Rounds,
        windows: int,
        loss: Loss,
        seed: int,
        families: Sequence[Family] | None = None,
        moves: int | None = None,
    ) -> None:
        self.space, self.rounds, self.windows, self.loss = space, rounds.within(windows), windows, loss
        self.draw = random.Random(seed)
        self.best, self.scale = space.origin, 1.0
        singles = [(block,) for block in range(len(space.start))]
        self.families = [family for family in families or [singles] if len(family) > 1]
        self.costs = {group: 0.0 for family in self.families for group in family}
        self._costs = [0.0] * len(space.start)  # of every block: the sum of those of its groups
        self.moves = moves or max(min(len(space.start) // 3, MOVES), 1)

    def generation(self) -> bool:
        """Replaces the best rates by better offspring; returns False if no other rates can be reached."""
        offspring = self._offspring()
        if not offspring:
            return False
        windows = self.draw.sample(range(self.windows), self.rounds.final)
        first_windows, parent = windows[: self.rounds.first], self.best
        before = self.loss(parent, first_windows)
        losses = {child: self.loss(child, first_windows) for child in offspring}
        for child, loss in losses.items():
            self._learn(child, loss - before)
        ranked = sorted(offspring, key=losses.__getitem__)
        combined = self._combined([child for child in ranked if losses[child] < before])
        rivals = [parent, *ranked[: self.rounds.survivors], combined]
        self.best = min(rivals, key=lambda point: self.loss(point, windows))
        self.scale = max(self.scale * SHRINKAGE, SMALLEST) if self.best == parent else min(self.scale * GROWTH, 1.0)
        return True

    def _combined(self, better: Sequence[Point]) -> Point:
        """Returns the best rates after the moves of all points that are ``better``, as far as bounds allow."""
        found = self.best
        for point in better:
            parts = tuple(sum(change) for change in zip(found, point, (-own for own in self.best), strict=True))
            found = parts if self.space.allows(parts) else found
        return found

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
        point = self.best
        if not self.families:
            return point
        for _ in range(self.draw.randint(1, self.moves)):
            family = self.draw.choice(self.families)
            costly = max(self._drawn(family), key=self._cost)
            cheap = min(self._drawn([group for group in family if group != costly]), key=self._cost)
            point = self.space.moved(point, self._shuffled(costly), self._shuffled(cheap), self.scale)
        return point

    def _drawn(self, groups: Family) -> list[Group]:
        return self.draw.sample(groups, max(min(CONTENDERS, (len(groups) + 1) // 2), 1))

    def _shuffled(self, group: Group) -> Group:
        """Returns the blocks in random order, in which units that are too large to be shared reach all of them."""
        return tuple(self.draw.sample(group, len(group)))

    def _cost(self, group: Group) -> float:
        """Returns the expected rise of the loss for every step of budget that ``group`` gets."""
        sizes = [self.space.sizes[block] for block in group]
        return sum(self._costs[block] * size for block, size in zip(group, sizes, strict=True)) / sum(sizes)

    def _learn(self, child: Point, rise: float) -> None:
        """Corrects the costs by the rise of the loss from a parent to its child."""
        if not math.isfinite(rise):
            return
        unit = self.space.step * sum(self.space.sizes) / len(self.space.sizes)
        steps = [(part - before) / unit for part, before in zip(child, self.best, strict=True)]
        by_group = {group: sum(steps[block] for block in group) for group in self.costs}
        expected = sum(self.costs[group] * step for group, step in by_group.items())
        correction = LEARNING_RATE * (rise - expected) / sum(step * step for step in by_group.values())
        for group, step in by_group.items():
            self.costs[group] += correction * step
            for block in group:
                self._costs[block] += correction * step
