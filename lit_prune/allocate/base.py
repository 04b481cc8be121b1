"""The interface of allocations, and the bisection that makes their rates meet the budget within bounds.

An allocation scores one block at a time (:meth:`Allocation.score`), then turns all scores into raw rates
(:meth:`Allocation.raw_rates`). The papers' rules do not keep their rates inside [0, 1]; :func:`meet_budget` does it
for all of them. An allocation that searches improves the rates afterwards (:meth:`Allocation.refine`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from lit_prune.allocate.budget import Limits
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.errors import InputError
from lit_prune.search.trial import Trials

TOLERANCE = 1e-6

Level = Literal["blocks", "linears", "parts"]


@dataclass(frozen=True)
class Refined:
    """The rates after a search, with details of it.

    Attributes:
        rates: The rate of each block.
        details: JSON-serialisable entries for the report; empty if the allocation does not search.
        linears: The rates of each block's linears by name; None if all linears of a block have the block's rate.
        parts: The rates of each block's parts by name, for `Shrink`; None if only the blocks have rates.
    """

    rates: list[float]
    details: dict[str, Any] = field(default_factory=dict)
    linears: list[dict[str, float]] | None = None
    parts: list[dict[str, float]] | None = None

    def with_named(self, level: str, rates: list[dict[str, float]] | None) -> Refined:
        """Returns the result with ``rates`` of the `linears` or the `parts` of each block."""
        if level == "parts":
            return replace(self, parts=rates)
        return replace(self, linears=rates if level == "linears" else None)


class Allocation(ABC):
    """A rule that spreads the sparsity over the blocks: a score per block, and rates from the scores.

    Attributes:
        needs: The kinds of statistics that :meth:`score` reads, from ``lit_prune.calibration.statistics``.
        searches: Whether :meth:`refine` measures other rates and returns better ones.
        levels: What the rates are of: the `blocks`, or, one by one, the `linears` or the `parts` of the blocks. A plan
            does not tell the last two apart.
        ranks_blocks: Whether the blocks with the highest rates are those that the model can spare as a whole, as Depth
            requires. False for rules that rate the weights of a block.
    """

    # without annotations: jsonargparse evaluates those of a base class with the names in the module of the subclass,
    # and where one is missing there, it checks the type of no option of the subclass
    needs = frozenset[str]()
    searches = False
    levels = frozenset[Level]({"blocks"})
    ranks_blocks = True

    @abstractmethod
    def score(self, weights: dict[str, Tensor], statistics: BlockStatistics) -> float:
        """Returns the score of one block.

        Args:
            weights: The prunable weights by linear, each (out, in).
            statistics: The block's statistics, those named in ``needs``.
        """

    @abstractmethod
    def raw_rates(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns the paper's rates for a mean of ``sparsity``, before bounds; equal scores get equal rates."""

    def shifted_rates(self, raw_rates: Sequence[float], amount: float) -> list[float]:
        """Returns ``raw_rates`` shifted toward the budget: 0 changes nothing, a larger ``amount`` raises the rates.

        The default adds a constant; a rule whose paper scales its rates multiplies instead.
        """
        return [rate + amount for rate in raw_rates]

    def check(  # noqa: B027 (most allocations have nothing to check)
        self, sizes: Sequence[int], sparsity: float, lower: Sequence[float], upper: float
    ) -> None:
        """Raises InputError if the settings do not fit the model.

        Args:
            sizes: Number of prunable weights of each block.
            sparsity: Target mean of the rates.
            lower: Lower bound of each block's rate.
            upper: Upper bound of every rate.
        """

    def is_uniform(self) -> bool:
        """Returns whether every block gets the same rate regardless of its score."""
        return False

    def floor(self, sparsity: float) -> float:
        """Returns the allocation's own lower bound of every rate."""
        return 0.0

    def check_key(self, key: Mapping[str, Any]) -> None:  # noqa: B027 (only a search keeps losses)
        """Raises InputError if losses that were measured before are not those of ``key``, see :meth:`refine`."""

    def check_windows(self, available: int) -> None:  # noqa: B027 (only a search measures on windows)
        """Raises InputError if the settings need more calibration windows than are ``available``."""

    def planned_rates(self, blocks: int) -> list[float] | None:
        """Returns the rates of so many blocks, if they are known before the blocks are scored."""
        return None

    def named_rates(self, sizes: Sequence[Mapping[str, int]]) -> list[dict[str, float]] | None:
        """Returns the rates of each block's linears or parts by name, if the allocation knows them before a search.

        Args:
            sizes: For each block, the sizes of those that can have rates of their own, by name.

        Raises:
            InputError: if the rates do not fit ``sizes``.
        """
        return None

    def refine(self, rates: Sequence[float], limits: Limits, *, trials: Trials, key: Mapping[str, Any]) -> Refined:
        """Returns better rates of the same mean, or ``rates`` if the allocation does not search (:attr:`searches`).

        Args:
            rates: Rates from the scores, already on the budget and rounded to what the method supports.
            limits: Bounds of the rates.
            trials: Measures the model's loss under given rates.
            key: Everything that measured losses depend on, JSON-serialisable.
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
    """Returns the rate of every block, with mean ``sparsity`` weighted by ``sizes``.

    Args:
        allocation: The rule.
        scores: One score per block.
        sparsity: Target mean, in [0, 1).
        sizes: Number of prunable weights of each block.
        present: Share of each block's weights that is already zero, a lower bound of its rate.
        min_rate: Lower bound of every rate.
        max_rate: Upper bound of every rate.

    Raises:
        InputError: if no rates within the bounds have that mean.
    """
    floor, raw_rates = max(min_rate, allocation.floor(sparsity)), allocation.raw_rates(scores, sparsity)
    lower = [max(floor, current_rate) for current_rate in present or [0.0] * len(scores)]
    return meet_budget(
        lambda amount: allocation.shifted_rates(raw_rates, amount), sparsity, sizes=sizes, lower=lower, upper=max_rate
    )


def meet_budget(
    shifted_rates: Callable[[float], Sequence[float]],
    target: float,
    *,
    sizes: Sequence[int],
    lower: Sequence[float],
    upper: float,
) -> list[float]:
    """Returns ``clip(shifted_rates(amount), lower, upper)`` for the amount, found by bisection, that meets ``target``.

    Adding to ``[0.2, 1.2]`` for a target of 0.7 and an upper bound of 0.9 gives ``[0.5, 0.9]``.

    Args:
        shifted_rates: Rates as a non-decreasing function of the amount that they are shifted by.
        target: Mean of the rates, weighted by ``sizes``.
        sizes: Number of prunable weights of each block.
        lower: Lower bound of each block's rate.
        upper: Upper bound of every rate, except where a block's lower bound exceeds it.

    Raises:
        InputError: if no rates within the bounds have that mean.
    """
    upper_by_block = [max(upper, low) for low in lower]
    least, most = weighted_mean(lower, sizes), weighted_mean(upper_by_block, sizes)
    if not least - TOLERANCE <= target <= most + TOLERANCE:
        raise InputError(
            f"`pruning.sparsity` must be between {least:.4g} and {most:.4g}, the range that `pruning.min_rate`, "
            "`pruning.max_rate`, the method, the allocation's floor and already pruned weights allow, "
            f"got {target:.4g}."
        )

    def clipped(amount: float) -> list[float]:
        rates = shifted_rates(amount)
        return [min(max(rate, low), up) for rate, low, up in zip(rates, lower, upper_by_block, strict=True)]

    def mean(amount: float) -> float:
        return weighted_mean(clipped(amount), sizes)

    # a target outside [least, most] by a rounding error would be reached by no amount
    return clipped(bisect(mean, min(max(target, least), most)))


def bisect(mean: Callable[[float], float], target: float) -> float:
    """Returns the amount at which the non-decreasing ``mean`` reaches ``target``."""
    bound = 1.0
    while mean(-bound) > target or mean(bound) < target:
        bound *= 2
    below, above = -bound, bound
    for _ in range(100):  # more than the 53 bits of a float64's mantissa
        middle = (below + above) / 2
        if mean(middle) < target:
            below = middle
        else:
            above = middle
    return above


def weighted_mean(values: Sequence[float], sizes: Sequence[float]) -> float:
    """Returns the mean of ``values`` weighted by ``sizes``."""
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def mean_rate(rates: Mapping[str, float], sizes: Mapping[str, float]) -> float:
    """Returns the mean rate of a block's linears, weighted by their sizes."""
    return weighted_mean(list(rates.values()), [sizes[name] for name in rates])


def min_max(values: Sequence[float]) -> list[float]:
    """Returns ``values`` mapped linearly to [0, 1], or all 0 if they are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def rates_from_densities(densities: Sequence[float], sparsity: float) -> list[float]:
    """Returns 1 - ``densities``, shifted so that the mean is ``sparsity``; [0.3, 0.1] at 0.5 gives [0.4, 0.6]."""
    return [sparsity + sum(densities) / len(densities) - density for density in densities]
