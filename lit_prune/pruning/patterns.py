"""Sparsity patterns: from a matrix of scores to the mask of the weights that stay."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from lit_prune.allocate.base import Allocation


class Pattern(ABC):
    """The positions at which a weight may be zero, and the rates that are possible with them.

    Attributes:
        repeats: Whether a weight with this pattern can be pruned further in the same pattern.
    """

    repeats: ClassVar[bool] = True

    def check(self, allocation: Allocation, sparsity: float, columns: Mapping[str, int]) -> None:  # noqa: B027
        """Raises InputError if the pattern does not allow these rates or does not fit a linear.

        Args:
            allocation: The allocation of the sparsity to the blocks.
            sparsity: The mean rate.
            columns: Input columns of every linear to prune, by the name to use in an error.
        """

    def bounds(self, least: float, most: float) -> tuple[float, float]:
        """Returns the smallest and the largest rate between ``least`` and ``most`` that the pattern allows."""
        return least, most

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns the allowed rates closest to ``rates``.

        Args:
            rates: Rate of each block, as allocated.
            sizes: Number of prunable weights of each block.
        """
        return list(rates)

    def granularity(self, size: int) -> int:
        """Returns the granularity of a block of ``size`` weights: its removals are multiples of this number."""
        return 1

    @property
    def columns(self) -> int | None:
        """Width of the column groups that are masked independently of each other; None if there are no groups."""
        return None

    @abstractmethod
    def keep(self, score_OI: Tensor, rate: float, *, by_row: bool) -> Tensor:
        """Returns the mask keep_OI, bool, True where the weight stays.

        Args:
            score_OI: Scores, the larger ones are kept; -1 marks weights that are pruned already, which are removed
                first and count toward the rate.
            rate: Share to remove, in [0, 1].
            by_row: Whether scores are compared within each output row, not over the whole matrix.
        """


@final
@dataclass(frozen=True)
class Unstructured(Pattern):
    """Removes any entries, exactly round(numel * rate) of a weight.

    By row, floor(k / rows) are removed in each row, and the remainder one each in the rows whose next score is
    smallest: k = 3 of [[1, 2, 3], [4, 5, 6]] removes 1 and 4, and then 2, which is smaller than 5.
    """

    def keep(self, score_OI: Tensor, rate: float, *, by_row: bool) -> Tensor:
        """Returns the mask, see :class:`Unstructured`."""
        pruned = int(torch.count_nonzero(score_OI < 0))
        remove = max(round(score_OI.numel() * rate), pruned)
        rows = len(score_OI)
        if by_row and pruned and int((score_OI < 0).sum(1).max()) > remove // rows:
            return self._keep_in_uneven_rows(score_OI, remove)
        # a threshold is much faster than the indices of the smallest scores, and exact unless scores tie at it
        keep_OI = score_OI > (_row_thresholds(score_OI, remove) if by_row else _threshold(score_OI, remove))
        if score_OI.numel() - int(torch.count_nonzero(keep_OI)) == remove:
            return keep_OI
        return self._keep_with_ties(score_OI, remove, by_row)

    def _keep_with_ties(self, score_OI: Tensor, remove: int, by_row: bool) -> Tensor:
        """Returns the mask by sorting indices, for when only some of several equal scores are to be removed."""
        keep_OI = torch.ones_like(score_OI, dtype=torch.bool)
        if not by_row:
            removed = score_OI.flatten().topk(remove, largest=False, sorted=False).indices
            keep_OI.view(-1)[removed] = False
            return keep_OI
        per_row, remainder = divmod(remove, len(score_OI))
        smallest = score_OI.topk(per_row + (remainder > 0), largest=False)
        keep_OI.scatter_(1, smallest.indices[:, :per_row], False)
        if remainder:
            one_more = smallest.values[:, per_row].topk(remainder, largest=False, sorted=False).indices
            keep_OI[one_more, smallest.indices[one_more, per_row]] = False
        return keep_OI

    def _keep_in_uneven_rows(self, score_OI: Tensor, remove: int) -> Tensor:
        """Returns the mask if a row has lost more than an equal share before; the others share the rest evenly."""
        pruned_O = (score_OI < 0).sum(1)
        low, high = 0, score_OI.shape[1]
        while low < high:  # bisects for the largest number per row with which the total is not exceeded
            middle = (low + high + 1) // 2
            low, high = (middle, high) if int(pruned_O.clamp(min=middle).sum()) <= remove else (low, middle - 1)
        count_O = pruned_O.clamp(min=low)
        order_OI = score_OI.argsort(1)
        open_rows = ((pruned_O <= low) & (count_O < score_OI.shape[1])).nonzero().squeeze(1)
        next_scores = score_OI[open_rows, order_OI[open_rows, count_O[open_rows]]]
        one_more = open_rows[next_scores.topk(remove - int(count_O.sum()), largest=False).indices]
        count_O[one_more] += 1
        rank_OI = order_OI.argsort(1)  # the inverse permutation
        return rank_OI >= count_O[:, None]


def _threshold(score_OI: Tensor, remove: int) -> Tensor | float:
    """Returns the largest of the ``remove`` smallest scores; minus infinity if nothing is removed."""
    if remove == 0:
        return -math.inf
    flat = score_OI.flatten()
    if flat.device.type != "cpu":
        return flat.kthvalue(remove).values
    return float(np.partition(flat.numpy(), remove - 1)[remove - 1])  # several times as fast as kthvalue on a CPU


def _row_thresholds(score_OI: Tensor, remove: int) -> Tensor:
    """Returns the largest score that is removed from each row, (O, 1), if all rows lose the same number.

    The remainder of ``remove`` / rows is removed from the rows whose next score is smallest.
    """
    per_row, remainder = divmod(remove, len(score_OI))
    ranked_OI = _sorted_rows(score_OI)
    last_O = ranked_OI[:, per_row - 1].clone() if per_row else torch.full_like(ranked_OI[:, 0], -math.inf)
    if remainder:
        next_O = ranked_OI[:, per_row]
        one_more = next_O.topk(remainder, largest=False, sorted=False).indices
        last_O[one_more] = next_O[one_more]
    return last_O[:, None]


def _sorted_rows(score_OI: Tensor) -> Tensor:
    if score_OI.device.type != "cpu":
        return score_OI.sort(dim=1).values
    return torch.from_numpy(np.sort(score_OI.numpy(), axis=1))  # more than ten times as fast as torch's
