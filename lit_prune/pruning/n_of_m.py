"""N:M patterns: of every M consecutive input columns N stay, the same N everywhere or one for each block.

2 of 4 is what NVIDIA's sparse tensor cores compute (arXiv 2104.08378); N of 8 by block is the mixed N:M of OWL (arXiv
2310.05175) and DLP (arXiv 2505.23807).
Suffixes: O out, I in, G groups of a row, M columns of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lit_prune.allocate.base import Allocation
from lit_prune.errors import InputError
from lit_prune.pruning.patterns import Pattern

TOLERANCE = 1e-6
SPARSITY_TOLERANCE = 1e-4  # for a sparsity that a user rounded, such as 0.3333 where 2 of 3 stay


@final
@dataclass(frozen=True)
class NofM(Pattern):
    """Keeps the ``n`` largest scores of every ``m`` consecutive input columns.

    2 of 4 of [[1, 2, 3, 4, 8, 7, 6, 5]] leaves [[0, 0, 3, 4, 8, 7, 0, 0]]; the sparsity is 1 - n / m everywhere.
    A group that has fewer than ``n`` unpruned weights keeps all of them, so a weight that was pruned before in another
    pattern can end up sparser than 1 - n / m.

    Args:
        n: Columns of each group that stay.
        m: Columns of a group.

    Raises:
        InputError: if `m` is below 2, or `n` is not in 1 to m; before the cut, for a sparsity other than 1 - n / m, for
            an allocation that is not uniform, and for a linear whose number of columns is not a multiple of `m`.
    """

    n: int = 2
    m: int = 4

    repeats: ClassVar[bool] = False  # its rate is fixed

    def __post_init__(self) -> None:
        _check_group("NofM", self.m)
        if not 1 <= self.n <= self.m:
            raise InputError(
                f"`NofM.n` must be between 1 and m, {self.m}, the columns of a group that stay, got {self.n}."
            )

    @property
    def columns(self) -> int:
        """Columns of a group."""
        return self.m

    @property
    def rate(self) -> float:
        """Share of weights that is removed."""
        return 1 - self.n / self.m

    def check(self, allocation: Allocation, sparsity: float, columns: Mapping[str, int]) -> None:
        """Raises InputError for rates other than 1 - n / m, or if ``m`` does not divide a linear's columns."""
        if not allocation.is_uniform():
            name = type(allocation).__name__
            raise InputError(
                f"`pruning.allocation` must be Uniform for the pattern NofM, which keeps {self.n} of {self.m} in every "
                f"block, got {name}: pass `--pruning.allocation Uniform`, or `--pruning.method.pattern MixedNofM`, "
                f"where {name} decides how many of every M each block keeps."
            )
        if abs(sparsity - self.rate) > SPARSITY_TOLERANCE:
            raise InputError(
                f"`pruning.sparsity` must be {self.rate:.6g} of the linears for the pattern NofM, which keeps "
                f"{self.n} of every {self.m}, got {sparsity:.6g}: pass `--pruning.sparsity {self.rate:.6g}`"
                f"{self._hint(sparsity)}."
            )
        _check_columns("NofM", self.m, columns)

    def _hint(self, sparsity: float) -> str:
        """Returns a hint at the n that gives ``sparsity``; empty if none does."""
        n = round(self.m * (1 - sparsity))
        fits = 1 <= n <= self.m and abs(1 - n / self.m - sparsity) <= SPARSITY_TOLERANCE
        return f", or `--pruning.method.pattern.n {n}`" if fits else ""

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns 1 - n / m for every block."""
        return [self.rate] * len(rates)

    def keep(self, score_OI: Tensor, rate: float, *, by_row: bool) -> Tensor:
        """Returns the mask, see :class:`NofM`; ``by_row`` is ignored, as scores are compared within a group."""
        if abs(rate - self.rate) > SPARSITY_TOLERANCE:
            raise InputError(f"`rate` must be {self.rate:.6g} for {self}, got {rate}.")
        return _largest_of_groups(score_OI, self.n, self.m)


@final
@dataclass(frozen=True)
class MixedNofM(Pattern):
    """Keeps N of every ``m`` consecutive input columns, N chosen for each block by its rate.

    Rates [0.3, 0.45, 0.75] with m = 8 remove 2.4, 3.6 and 6 of 8: rounded to [2, 4, 6] of 8, their sum is exact.
    All linears of a block have the same N. A group that has fewer than N unpruned weights keeps all of them: a model
    that was pruned before in another pattern ends up sparser than its rates, and the report shows by how much.

    Args:
        m: Columns of a group.

    Raises:
        InputError: if `m` is below 2; before the cut, if no N is within the bounds of the rates, and for a linear
            whose number of columns is not a multiple of `m`.
    """

    m: int = 8

    def __post_init__(self) -> None:
        _check_group("MixedNofM", self.m)

    @property
    def columns(self) -> int:
        """Columns of a group."""
        return self.m

    def check(self, allocation: Allocation, sparsity: float, columns: Mapping[str, int]) -> None:
        """Raises InputError if ``m`` does not divide a linear's columns."""
        _check_columns("MixedNofM", self.m, columns)

    def bounds(self, least: float, most: float) -> tuple[float, float]:
        """Returns the smallest and the largest multiple of 1 / m within the bounds.

        Raises:
            InputError: if there is none.
        """
        # 0.3 * 10 is 3.0000000000000004 in floating point: without the tolerance its ceiling would be 4
        low, high = math.ceil(least * self.m - TOLERANCE), math.floor(most * self.m + TOLERANCE)
        if low > high:
            raise InputError(
                f"`pruning.min_rate` and `pruning.max_rate` must have a multiple of 1/{self.m} between them for the "
                f"pattern {self}, got {least:g} and {most:g}."
            )
        return low / self.m, high / self.m

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns ``rates`` rounded to multiples of 1 / m, with a mean as close to theirs as possible.

        All are rounded down; then, largest remainder first, a block is rounded up instead if that brings the mean,
        weighted by ``sizes``, closer. The mean is missed by at most half a step of the largest block. No block is
        rounded up to a rate of 1.
        """
        removed = [math.floor(rate * self.m + TOLERANCE) for rate in rates]
        remainders = [rate * self.m - count for rate, count in zip(rates, removed, strict=True)]
        missing = sum(remainder * size for remainder, size in zip(remainders, sizes, strict=True))
        for block in sorted(range(len(rates)), key=lambda block: -remainders[block]):
            if remainders[block] > TOLERANCE and removed[block] + 1 < self.m and sizes[block] < 2 * missing:
                removed[block] += 1
                missing -= sizes[block]
        return [count / self.m for count in removed]

    def granularity(self, size: int) -> int:
        """Returns ``size`` / m, as N changes in all groups at once: a weight of 6 x 8 has 6 groups of m = 8."""
        return size // self.m

    def keep(self, score_OI: Tensor, rate: float, *, by_row: bool) -> Tensor:
        """Returns the mask, see :class:`MixedNofM`; ``by_row`` is ignored, as scores are compared within a group."""
        n = round(self.m * (1 - rate))
        if abs(1 - n / self.m - rate) > TOLERANCE:
            raise InputError(f"`rate` must be a multiple of 1/{self.m} for {self}, got {rate}.")
        return _largest_of_groups(score_OI, n, self.m)


def _largest_of_groups(score_OI: Tensor, n: int, m: int) -> Tensor:
    """Returns the mask of the ``n`` largest scores of every ``m``, without weights that are pruned already."""
    score_OGM = score_OI.unflatten(1, (-1, m))
    largest_OGN = score_OGM.topk(n, sorted=False).indices
    # by index, not by comparing with the n-th score: of equal scores exactly n must stay
    keep_OGM = torch.zeros_like(score_OGM, dtype=torch.bool).scatter_(-1, largest_OGN, True)
    return (keep_OGM & (score_OGM >= 0)).flatten(1)


def _check_group(name: str, m: int) -> None:
    if m < 2:
        raise InputError(f"`{name}.m` must be at least 2, the columns of a group, got {m}.")


def _check_columns(name: str, m: int, columns: Mapping[str, int]) -> None:
    for linear, count in columns.items():
        if count % m:
            raise InputError(
                f"`{name}.m` must divide the columns of every linear, got {m}: {linear} has {count}; choose another m, "
                "or leave such linears out by `pruning.ignore`."
            )
