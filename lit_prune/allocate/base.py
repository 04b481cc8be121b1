"""What an allocation is, and how raw rates are brought to the budget within their bounds.

An allocation looks at one block at a time (:meth:`Allocation.score`), then turns all scores into raw rates
(:meth:`Allocation.raw`). None of the papers' rules keeps its rates inside [0, 1]; :func:`meet_budget` does it for all.
One that tries rates out gets to better ones after that (:meth:`Allocation.refine`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lit_prune.allocate.budget import Limits
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.errors import InputError
from lit_prune.search.trial import Trial

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Refined:
    """What came of trying rates out.

    Attributes:
        rates: The share that each block is to give.
        told: What a report says of it, as JSON can hold it; nothing where nothing was tried.
    """

    rates: list[float]
    told: dict[str, Any] = field(default_factory=dict)


class Allocation(ABC):
    """How much each block gives: a score per block, and rates from the scores.

    Attributes:
        needs: The statistics that :meth:`score` reads, of those in ``lit_prune.calibration.stream``.
        searches: Whether :meth:`refine` measures other rates and returns better ones.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    searches: ClassVar[bool] = False

    @abstractmethod
    def score(self, weights: dict[str, Tensor], observed: BlockStatistics) -> float:
        """Returns the score of one block.

        Args:
            weights: The prunable weights by linear, each (out, in).
            observed: What passed through the block, as far as ``needs`` asks.
        """

    @abstractmethod
    def raw(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns the paper's rates of removal for a mean of ``sparsity``, before bounds; equal for equal scores."""

    def moved(self, raw: Sequence[float], amount: float) -> list[float]:
        """Returns ``raw`` moved toward the budget: an ``amount`` of 0 changes nothing, a larger one raises the rates.

        A constant is added; a rule whose paper scales its rates multiplies.
        """
        return [rate + amount for rate in raw]

    def check(  # noqa: B027 (most have nothing to check)
        self, sizes: Sequence[int], sparsity: float, lower: Sequence[float], upper: float
    ) -> None:
        """Raises InputError where the settings do not fit the model.

        Args:
            sizes: Prunable weights of each block.
            sparsity: Target.
            lower: The rate that each block does not fall below.
            upper: The rate that no block exceeds.
        """

    def even(self) -> bool:
        """Returns whether every block gets the same rate, whatever its score."""
        return False

    def floor(self, sparsity: float) -> float:
        """Returns the rate that no block falls below."""
        return 0.0

    def refine(self, rates: Sequence[float], limits: Limits, *, trial: Trial, key: Mapping[str, Any]) -> Refined:
        """Returns better rates of the same mean, where the allocation tries some; see :attr:`searches`.

        Args:
            rates: The rates that the scores gave, within the budget and such as the method can have.
            limits: What bounds them.
            trial: Tells the loss of the model under any rates.
            key: What its losses hang on, as JSON can hold it.
        """
        return Refined(list(rates))


def allocate(
    allocation: Allocation,
    scores: Sequence[float],
    sparsity: float,
    *,
    sizes: Sequence[int],
    present: Sequence[float] | None = None,
    min_rate: float = 0.0,
    max_rate: float = 0.99,
) -> list[float]:
    """Returns the rate of removal of every block, with mean ``sparsity`` weighted by ``sizes``.

    Args:
        allocation: The rule.
        scores: One score a block.
        sparsity: Target, in [0, 1).
        sizes: Prunable weights of each block.
        present: Share of each block's weights that is zero already; a block never goes below it.
        min_rate: Least rate of any block.
        max_rate: Greatest rate of any block.

    Raises:
        InputError: if no rates within the bounds have that mean.
    """
    floor, raw = max(min_rate, allocation.floor(sparsity)), allocation.raw(scores, sparsity)
    lower = [max(floor, zero) for zero in present or [0.0] * len(scores)]
    return meet_budget(lambda by: allocation.moved(raw, by), sparsity, sizes=sizes, lower=lower, upper=max_rate)


def meet_budget(
    moved: Callable[[float], Sequence[float]],
    target: float,
    *,
    sizes: Sequence[int],
    lower: Sequence[float],
    upper: float,
) -> list[float]:
    """Returns ``clip(moved(amount), lower, upper)`` with the amount, found by bisection, whose mean is ``target``.

    Adding to ``[0.2, 1.2]`` for a target of 0.7 and an upper bound of 0.9 gives ``[0.5, 0.9]``.

    Args:
        moved: The rates moved by an amount; none falls when the amount rises.
        target: The mean, weighted by ``sizes``.
        sizes: Prunable weights of each block.
        lower: The rate that each block does not fall below.
        upper: The rate that no block exceeds, unless its lower bound does.

    Raises:
        InputError: if the bounds leave no such rates.
    """
    upper_by_block = [max(upper, low) for low in lower]
    least, most = weighted_mean(lower, sizes), weighted_mean(upper_by_block, sizes)
    if not least - TOLERANCE <= target <= most + TOLERANCE:
        raise InputError(
            f"`pruning.sparsity` must be between {least:.4g} and {most:.4g}, which is what `pruning.min_rate`, "
            f"`pruning.max_rate`, the method, the allocation's floor and what is gone already allow, got {target:.4g}."
        )

    def clipped(amount: float) -> list[float]:
        return [min(max(r, low), up) for r, low, up in zip(moved(amount), lower, upper_by_block, strict=True)]

    def mean(amount: float) -> float:
        return weighted_mean(clipped(amount), sizes)

    return clipped(_where(mean, min(max(target, least), most)))


def _where(mean: Callable[[float], float], target: float) -> float:
    """The amount at which ``mean``, which rises from below ``target`` to above it, is there."""
    reach = 1.0
    while mean(-reach) > target or mean(reach) < target:
        reach *= 2
    below, above = -reach, reach
    for _ in range(100):
        middle = (below + above) / 2
        if mean(middle) < target:
            below = middle
        else:
            above = middle
    return above


def weighted_mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """Returns the mean of ``values`` weighted by ``sizes``."""
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def min_max(values: Sequence[float]) -> list[float]:
    """Returns ``values`` mapped linearly to [0, 1]; equal values all give 0."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def rates_of(keep: Sequence[float], sparsity: float) -> list[float]:
    """Returns 1 - ``keep``, shifted so that the mean is ``sparsity``; [0.3, 0.1] at 0.5 gives [0.4, 0.6]."""
    return [sparsity + sum(keep) / len(keep) - share for share in keep]
