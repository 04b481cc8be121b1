"""Comparison of two masks of one weight, which may differ only in ties."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

TIE = 1e-4  # relative difference up to which scores count as equal: float32 sums in another order differ by less


@dataclass(frozen=True)
class Difference:
    """The difference of two masks with equally many zeros.

    Attributes:
        weights: Number of weights.
        differing: Number of weights that only one of the masks removes.
        ties: Number of those whose scores are equal, within ``TIE``, to the scores of the weights removed instead.
    """

    weights: int = 0
    differing: int = 0
    ties: int = 0

    def __add__(self, other: Difference) -> Difference:
        return Difference(self.weights + other.weights, self.differing + other.differing, self.ties + other.ties)


def compare_masks(one_OI: Tensor, other_OI: Tensor, score_OI: Tensor, *, by_row: bool) -> Difference:
    """Returns the difference of two masks.

    Of the scores [[1, 2, 2.0001, 3]] one mask removes 1 and 2, the other 1 and 2.0001: two weights differ, both ties.

    Args:
        one_OI: A mask, True for weights that stay.
        other_OI: Another mask.
        score_OI: The scores of the weights.
        by_row: Whether the weights of a row are compared with each other. Rows in which the masks have different
            numbers of zeros, by one, are compared with each other. Otherwise the whole matrix is compared.
    """
    differ_OI = one_OI != other_OI
    if not by_row:
        return Difference(score_OI.numel(), int(differ_OI.sum()), _ties(score_OI[differ_OI]))
    exchanges_O = (differ_OI & one_OI).any(1) & (differ_OI & other_OI).any(1)
    ties = sum(_ties(score_OI[row][differ_OI[row]]) for row in exchanges_O.nonzero().flatten())
    ties += _ties(score_OI[~exchanges_O][differ_OI[~exchanges_O]])
    return Difference(score_OI.numel(), int(differ_OI.sum()), ties)


def _ties(scores: Tensor) -> int:
    """Returns the number of ``scores`` if all are equal, else 0."""
    if not len(scores) or scores.max() - scores.min() > TIE * scores.max():
        return 0
    return len(scores)
