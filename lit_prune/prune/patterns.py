"""Which entries of a score matrix go: the shapes that sparsity may have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


class Pattern(ABC):
    """How removals may lie within a weight."""

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
        gone = int((score_OI < 0).sum())
        remove = max(round(score_OI.numel() * rate), gone)
        keep_OI = torch.ones_like(score_OI, dtype=torch.bool)
        if not by_row:
            gone_now = score_OI.flatten().topk(remove, largest=False, sorted=False).indices
            keep_OI.view(-1)[gone_now] = False
            return keep_OI
        rows, columns = score_OI.shape
        each, rest = divmod(remove, rows)
        if gone and int((score_OI < 0).sum(1).max()) > each:
            return self._keep_around(score_OI, remove)
        smallest = score_OI.topk(min(each + 1, columns), largest=False, sorted=False)
        keep_OI.scatter_(1, smallest.indices, False)
        if each < columns:  # of the each + 1 smallest in a row, the last one stays, but for the rows of the rest
            next_O, at_O = smallest.values.max(1)
            last_O1 = smallest.indices.gather(1, at_O[:, None])
            stays_O1 = torch.ones_like(last_O1, dtype=torch.bool)
            stays_O1[next_O.topk(rest, largest=False, sorted=False).indices] = False
            keep_OI.scatter_(1, last_O1, stays_O1)
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
