"""The budget of a cut: bounds of the rates, and conversion of a sparsity of all parameters to one of the linears."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.masks.zeros import zeros
from lit_prune.models.families import Block

Budget = Literal["linears", "parameters", "bytes"]
TOLERANCE = 1e-6
MAX_RATE = 0.99  # the default of `pruning.max_rate`


class OutOfRange(InputError):
    """A share of all parameters that no rates within their bounds remove.

    Args:
        share: The share that was asked for.
        least: Smallest possible share.
        most: Largest possible share.
        bounds: The end of `as ...`: what bounds the rates, and of which part of the model.
        part: What share of the parameters that part has: `which have 59.2%`.
    """

    def __init__(self, share: float, least: float, most: float, *, bounds: str, part: str) -> None:
        super().__init__(
            f"`pruning.sparsity` must be between {math.ceil(least * 1e4) / 1e4:g} and {math.floor(most * 1e4) / 1e4:g} "
            f"of all parameters with `pruning.budget: parameters`, as {bounds}, {part} of them, got {share:g}."
        )
        self.least, self.most, self.bounds, self.part = least, most, bounds, part


@dataclass(frozen=True)
class Limits:
    """The bounds of the rates of a model's blocks.

    Attributes:
        sizes: Number of prunable units of each block: weights, or dimensions for slices.
        lower: Lower bound of each block's rate.
        upper: Upper bound of every rate, except where a block's lower bound exceeds it.
        target: Mean of the rates, weighted by ``sizes``.
        current: Share of each block's units that is already pruned; of dense blocks, the default, 0.
        slack: Share by which an earlier cut may have exceeded its target because of rounding.
        least: Lower bound of the rate of a linear or a part, but for what earlier cuts have removed of it.
        most: Upper bound of the rate of a linear or a part; None is ``upper``.
    """

    sizes: list[int]
    lower: list[float]
    upper: float
    target: float
    current: Sequence[float] = ()
    slack: float = 0.0
    least: float = 0.0
    most: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "current", self.current or [0.0] * len(self.sizes))

    @property
    def named_bounds(self) -> tuple[float, float]:
        """The bounds of the rate of a linear or a part that earlier cuts have left alone."""
        return self.least, max(self.upper if self.most is None else self.most, self.least)

    @property
    def current_sparsity(self) -> float:
        """The share of all units that is already pruned."""
        return sum(rate * size for rate, size in zip(self.current, self.sizes, strict=True)) / sum(self.sizes)

    @property
    def effective_target(self) -> float:
        """The target, or the current sparsity if it exceeds the target by at most the slack."""
        exceeded = self.current_sparsity - self.slack <= self.target < self.current_sparsity
        return self.current_sparsity if exceeded else self.target


def rate_of_share(
    share: float,
    removable: Sequence[int],
    total: int,
    *,
    lower: Sequence[float],
    upper: float,
    slack: float = 0.0,
    bounds: str,
) -> float:
    """Returns the mean rate at which blocks lose ``share`` of all parameters.

    If the blocks can lose 300 of 1,000 parameters, 0.24 of all are a rate of 0.8.

    Args:
        share: Share of all parameters.
        removable: Number of parameters that each block would lose at a rate of 1.
        total: Number of all parameters.
        lower: Lower bound of each block's rate.
        upper: Upper bound of every rate, except where a block's lower bound exceeds it.
        slack: Share of ``removable`` by which an earlier cut may exceed the target.
        bounds: For the error: what bounds the rates, and of which part of the model.

    Raises:
        OutOfRange: if no rates within the bounds give that share.
    """
    most_of_all = sum(removable) / total
    least = sum(low * number for low, number in zip(lower, removable, strict=True)) / total
    most = sum(max(low, upper) * number for low, number in zip(lower, removable, strict=True)) / total
    if not least - slack * most_of_all - TOLERANCE <= share <= most + TOLERANCE:
        raise OutOfRange(share, least, most, bounds=bounds, part=f"which have {most_of_all:.1%}")
    return min(share / most_of_all, 1.0)


def sparsity_of_linears(
    share: float,
    model: PreTrainedModel,
    blocks: Sequence[Block],
    *,
    lower: Sequence[float],
    upper: float,
    slack: float = 0.0,
) -> float:
    """Returns the sparsity of the blocks' linears at which ``share`` of all parameters of ``model`` is zero.

    Tied weights count once, and zeros outside the linears count. If 80 of 100 parameters are in linears and none of
    the others is zero, 0.4 of all parameters is 0.5 of the linears.

    Args:
        share: Share of all parameters, in [0, 1).
        model: The causal LM.
        blocks: Its blocks, with the linears to prune.
        lower: Lower bound of each block's rate.
        upper: Upper bound of every rate, except where a block's lower bound exceeds it.
        slack: Share of the linears' weights by which existing zeros may exceed the target.

    Raises:
        OutOfRange: if no rates within the bounds give that share.
    """
    zero, total = zeros(model.parameters())
    linear_zeros, in_linears = zeros(linear.weight_OI for block in blocks for linear in block.linears.values())
    zeros_outside = zero - linear_zeros
    least = (sum(low * block.size for low, block in zip(lower, blocks, strict=True)) + zeros_outside) / total
    most = (sum(max(low, upper) * block.size for low, block in zip(lower, blocks, strict=True)) + zeros_outside) / total
    if not least - slack * in_linears / total - TOLERANCE <= share <= most + TOLERANCE:
        bounds = (
            "`pruning.min_rate`, `pruning.max_rate`, the method and already pruned weights allow for the linears to "
            "prune"
        )
        raise OutOfRange(share, least, most, bounds=bounds, part=f"which are {in_linears / total:.1%}")
    return min(max((share * total - zeros_outside) / in_linears, 0.0), 1.0)
