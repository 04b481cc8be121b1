"""The weights of blocks in which units are zero instead of removed, for the trials of rates.

Suffixes: I inputs and O outputs of the writer of a part, U units, S inputs that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.models.families import Block
from lit_prune.shrink.obs import Removal
from lit_prune.shrink.parts import Part
from lit_prune.shrink.sizes import units_from_rates

Remove = Callable[[Tensor, Tensor, Part, int], Removal]


class ZeroedUnits:
    """The writers of all blocks with zeros for the columns of removed units, at any rates.

    A block with such a writer computes what it does without these units, and all weights keep their shapes.

    Args:
        blocks: The blocks.
        parts: The part of each block.
        full: Number of units of each block of the dense model.
        multiple: Number of which the number of units is a multiple, unless a block keeps all.
        remove: Function of the weight of a writer, (in, out), the Gram matrix of its input, the part and the number of
            units that stay, which removes the others.

    Attributes:
        blocks: The blocks, with the writer as their only linear.
    """

    def __init__(
        self, blocks: Sequence[Block], parts: Sequence[Part], full: Sequence[int], multiple: int, remove: Remove
    ) -> None:
        self._parts, self._full, self._multiple, self._remove = parts, full, multiple, remove
        self.blocks = [
            replace(block, linears={part.writer: block.linears[part.writer]})
            for block, part in zip(blocks, parts, strict=True)
        ]

    def split(self, index: int, rate: float) -> dict[str, float]:
        """Returns the rate of the writer of a block, by its name."""
        return {self._parts[index].writer: rate}

    def weights(self, block: Block, statistics: BlockStatistics, rates: Mapping[str, float]) -> dict[str, Tensor]:
        """Returns the weight of the writer of ``block`` at its rate, by its name."""
        part = self._parts[block.index]
        weight_OI = block.linears[part.writer].weight_OI
        kept = min(part.units, units_from_rates([rates[part.writer]], [self._full[block.index]], self._multiple)[0])
        gram_II = statistics.grams[part.writer].to(weight_OI.device)
        removal = self._remove(weight_OI.T, gram_II, part, kept)
        columns_S = part.columns_UK.to(weight_OI.device)[removal.kept_U].flatten().sort().values
        zeroed_OI = torch.zeros_like(weight_OI)
        zeroed_OI[:, columns_S] = removal.weight_SO.T.to(weight_OI.dtype)
        return {part.writer: zeroed_OI}
