"""What a sparsity is a share of: the linears that are pruned, or all parameters of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.masks.zeros import zeros
from lit_prune.models.families import Block

Budget = Literal["linears", "parameters"]
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Limits:
    """What bounds the rates of a model's blocks.

    Attributes:
        sizes: What each block has to give.
        lower: The rate that each block does not fall below.
        upper: The rate that no block exceeds, unless its lower bound does.
        target: The mean, weighted by ``sizes``.
        gone: The mean of what the blocks have given already.
        slack: How much more an earlier cut may have taken than it was asked for.
    """

    sizes: list[int]
    lower: list[float]
    upper: float
    target: float
    gone: float = 0.0
    slack: float = 0.0

    @property
    def aim(self) -> float:
        """What the rates are to have: the target, or what is gone where that is beyond it by no more than the slack."""
        return self.gone if self.gone - self.slack <= self.target < self.gone else self.target


def over_linears(
    share: float,
    model: PreTrainedModel,
    blocks: Sequence[Block],
    *,
    lower: Sequence[float],
    upper: float,
    slack: float = 0.0,
) -> float:
    """Returns the sparsity of the blocks' linears at which ``share`` of all parameters of ``model`` are zero.

    Tied weights count once, and zeros outside of the linears count. Of 100 parameters 80 are in linears, and none of
    the others is zero: 0.4 of all is 0.5 of the linears.

    Args:
        share: Share of all parameters, in [0, 1).
        model: The causal LM.
        blocks: Its blocks, with the linears that are to be pruned.
        lower: The rate that each block does not fall below.
        upper: The rate that no block exceeds, unless its lower bound does.
        slack: Share of the linears that may be gone beyond what is asked for.

    Raises:
        InputError: if no rates within the bounds give that share.
    """
    zero, total = zeros(model.parameters())
    zero_within, within = zeros(linear.weight_OI for block in blocks for linear in block.linears.values())
    outside = zero - zero_within
    least = (sum(low * block.size for low, block in zip(lower, blocks, strict=True)) + outside) / total
    most = (sum(max(low, upper) * block.size for low, block in zip(lower, blocks, strict=True)) + outside) / total
    if not least - slack * within / total - TOLERANCE <= share <= most + TOLERANCE:
        raise InputError(
            f"`pruning.sparsity` must be between {math.ceil(least * 1e4) / 1e4:g} and {math.floor(most * 1e4) / 1e4:g} "
            f"of all parameters with `pruning.budget: parameters`: the linears to prune are {within / total:.1%} of "
            f"them, and give what `pruning.min_rate`, `pruning.max_rate`, the method and what is gone already allow; "
            f"got {share:g}."
        )
    return min(max((share * total - outside) / within, 0.0), 1.0)
