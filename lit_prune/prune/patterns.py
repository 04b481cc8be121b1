"""Which entries of a score matrix go: the shapes that sparsity may have."""

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
    """How removals may lie within a weight, and which rates that allows.

    Attributes:
        repeats: Whether what lies so can be pruned further in the same pattern.
    """

    repeats: ClassVar[bool] = True

    def check(self, allocation: Allocation, sparsity: float, columns: Mapping[str, int]) -> None:  # noqa: B027
        """Raises InputError where what is asked for cannot lie so, before anything is done.

        Args:
            allocation: What spreads the sparsity over the blocks.
            sparsity: The mean rate.
            columns: Input columns of every linear that is to be pruned, by what an error should call it.
        """

    def bounds(self, least: float, most: float) -> tuple[float, float]:
        """Returns the least and the greatest rate between ``least`` and ``most`` that the pattern can have."""
        return least, most

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns the rates that will be cut: ``rates``, one a block, as nearly as the pattern allows.

        Args:
            rates: As allocated.
            sizes: Prunable weights of each block.
        """
        return list(rates)

    def grain(self, size: int) -> int:
        """Returns the number of weights that the removals from a block of ``size`` come in multiples of."""
        return 1

    @property
    def columns(self) -> int | None:
        """How many columns side by side are decided apart from all others; None where any may be decided together."""
        return None

    @abstractmethod
    def keep(self, score_OI: Tensor, rate: float, *, by_row: bool) -> Tensor:
        """Returns keep_OI, bool: True where the weight stays.

        Args:
            score_OI: Larger is kept; -1 marks what is gone already, and goes first.
            rate: Share to remove, in [0, 1].
            by_row: Compare scores within each output row, not over the whole matrix.
        """


@final
@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any entry may go; of a weight exactly round(numel * rate) do.

    By row, floor(k / rows) go in each row, and of the rest one more each in the rows whose next score is smallest:
    k = 3 of [[1, 2, 3], [4, 5, 6]] takes 1 and 4, and then 2, which is smaller than 5.
    """

    def keep(self, score_OI: Tensor, rate: float, *, by_row: bool) -> Tensor:
        """Returns the mask; see :class:`Unstructured`."""
        gone = int(torch.count_nonzero(score_OI < 0))
        remove = max(round(score_OI.numel() * rate), gone)
        rows = len(score_OI)
        if by_row and gone and int((score_OI < 0).sum(1).max()) > remove // rows:
            return self._keep_around(score_OI, remove)
        keep_OI = score_OI > (_last_of_rows(score_OI, remove) if by_row else _last_of_all(score_OI, remove))
        if score_OI.numel() - int(torch.count_nonzero(keep_OI)) == remove:
            return keep_OI
        return self._keep_of_ties(score_OI, remove, by_row)

    def _keep_of_ties(self, score_OI: Tensor, remove: int, by_row: bool) -> Tensor:
        """The same where equal scores straddle the threshold, so that only some of them may go."""
        keep_OI = torch.ones_like(score_OI, dtype=torch.bool)
        if not by_row:
            gone = score_OI.flatten().topk(remove, largest=False, sorted=False).indices
            keep_OI.view(-1)[gone] = False
            return keep_OI
        each, rest = divmod(remove, len(score_OI))
        smallest = score_OI.topk(each + (rest > 0), largest=False)
        keep_OI.scatter_(1, smallest.indices[:, :each], False)
        if rest:
            one_more = smallest.values[:, each].topk(rest, largest=False, sorted=False).indices
            keep_OI[one_more, smallest.indices[one_more, each]] = False
        return keep_OI

    def _keep_around(self, score_OI: Tensor, remove: int) -> Tensor:
        """The same where some row has lost more than its share already: the other rows give evenly what is missing."""
        gone_O = (score_OI < 0).sum(1)
        low, high = 0, score_OI.shape[1]
        while low < high:  # the largest share of a row that does not overshoot the total
            middle = (low + high + 1) // 2
            low, high = (middle, high) if int(gone_O.clamp(min=middle).sum()) <= remove else (low, middle - 1)
        count_O = gone_O.clamp(min=low)
        order_OI = score_OI.argsort(1)
        open_rows = ((gone_O <= low) & (count_O < score_OI.shape[1])).nonzero().squeeze(1)
        following = score_OI[open_rows, order_OI[open_rows, count_O[open_rows]]]
        one_more = open_rows[following.topk(remove - int(count_O.sum()), largest=False).indices]
        count_O[one_more] += 1
        rank_OI = order_OI.argsort(1)
        return rank_OI >= count_O[:, None]


def _last_of_all(score_OI: Tensor, remove: int) -> Tensor | float:
    """The largest score that goes when the ``remove`` smallest of all do; below all scores when none does."""
    if remove == 0:
        return -math.inf
    flat = score_OI.flatten()
    if flat.device.type != "cpu":
        return flat.kthvalue(remove).values
    return float(np.partition(flat.numpy(), remove - 1)[remove - 1])


def _last_of_rows(score_OI: Tensor, remove: int) -> Tensor:
    """The largest score that goes in each row, (O, 1): of the ``remove``, as many in each row, the rest where the next
    score is smallest."""
    each, rest = divmod(remove, len(score_OI))
    ranked_OI = _sorted_rows(score_OI)
    last_O = ranked_OI[:, each - 1].clone() if each else torch.full_like(ranked_OI[:, 0], -math.inf)
    if rest:
        next_O = ranked_OI[:, each]
        one_more = next_O.topk(rest, largest=False, sorted=False).indices
        last_O[one_more] = next_O[one_more]
    return last_O[:, None]


def _sorted_rows(score_OI: Tensor) -> Tensor:
    """Every row in rising order; on the CPU numpy sorts floats more than ten times as fast as torch."""
    if score_OI.device.type != "cpu":
        return score_OI.sort(dim=1).values
    return torch.from_numpy(np.sort(score_OI.numpy(), axis=1))
