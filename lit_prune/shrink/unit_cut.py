"""The cut of the units of one part: what is observed for it, and the blocks that are left.

Suffixes: I inputs and O outputs of the writer of a part, S inputs that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.calibration.errors import observe_errors
from lit_prune.calibration.statistics import GRAM, BlockStatistics
from lit_prune.calibration.stream import Stream, observe
from lit_prune.models import structure
from lit_prune.models.families import Block
from lit_prune.models.remote_code.modeling_shrunk import LayerConfig
from lit_prune.shrink.part_method import PartCut, in_attention
from lit_prune.shrink.units.narrow import adopt_sizes, narrow, set_sizes, set_weight
from lit_prune.shrink.units.obs import Removal, corrected, drop_units, remove_units
from lit_prune.shrink.units.parts import Part
from lit_prune.shrink.units.sizes import PartSizes, rates_from_units


@dataclass(frozen=True)
class UnitRemoval:
    """How the units of a part are removed.

    Attributes:
        rounds: Number of rounds in which the units of a block are removed.
        damping: Share of the mean of the Gram matrix's diagonal that is added to it.
        compensate: Whether weights are updated to make up for what is removed.
    """

    rounds: int
    damping: float
    compensate: bool

    def observed(
        self, stream: Stream, block: Block, part: Part, targets: Sequence[Tensor] | None, *, constant: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns the weight that the removal starts from, (I, O), and the Gram matrix of its inputs, (I, I).

        Args:
            stream: The stream in front of ``block``.
            block: The block.
            part: Its part.
            targets: The outputs that the block should have, if it makes up for the errors of the blocks before.
            constant: Whether the bias is a row of the weight, whose input is 1.
        """
        writer = block.linears[part.writer]
        bias_O: Any = writer.module.bias
        weight_IO = writer.weight_OI.T
        if constant:
            weight_IO = torch.cat([weight_IO, bias_O.detach()[None]])
        if targets is None:
            watched = replace(block, linears={part.writer: writer})
            statistics = observe(stream, watched, frozenset({GRAM}), advance=False, constant=constant)
            return weight_IO, statistics.grams[part.writer]
        halves = observe_errors(stream, block, writer, targets, constant=constant)
        corrected_IO = corrected(weight_IO, halves, part.columns_UK.to(weight_IO.device), damping=self.damping)
        moments = halves[0] + halves[1]
        return corrected_IO, moments.gram_II / max(moments.tokens, 1)

    def statistics(self, stream: Stream, block: Block, part: Part, targets: Sequence[Tensor] | None) -> BlockStatistics:
        """Returns what :meth:`observed` gives, for trials, in which biases are not refitted."""
        weight_IO, gram_II = self.observed(stream, block, part, targets)
        found = {} if targets is None else {part.writer: weight_IO.T.to(block.linears[part.writer].weight_OI)}
        return BlockStatistics(grams={part.writer: gram_II}, corrected=found)

    def removal(self, weight_IO: Tensor, gram_II: Tensor, part: Part, kept: int) -> Removal:
        """Removes units until ``kept`` are left."""
        columns_UK, count = part.columns_UK.to(weight_IO.device), part.units - kept
        if not self.compensate:
            return drop_units(weight_IO.float(), gram_II, columns_UK, count)
        return remove_units(weight_IO, gram_II, columns_UK, count, rounds=self.rounds, damping=self.damping)


class UnitCut(PartCut):
    """The cut that leaves each block some units of one part.

    Args:
        model: The causal LM.
        blocks: Its blocks.
        parts: The part of each block.
        units: Number of units that each block keeps.
        removal: How the others are removed.
        sizes_class: The structure that records the cut.
        full: Number of units of each block of the dense model.
        compares: Whether the blocks make up for the errors of the blocks before.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        parts: Sequence[Part],
        units: Sequence[int],
        *,
        removal: UnitRemoval,
        sizes_class: type[PartSizes],
        full: Sequence[int],
        compares: bool,
    ) -> None:
        self.model, self.blocks, self.parts, self.units = model, blocks, parts, units
        self.removal, self.sizes_class, self.full, self.compares = removal, sizes_class, full, compares
        self.behind_attention = not in_attention(parts[0].writer)

    def cut(self, block: Block, config: Any, stream: Stream, targets: Sequence[Tensor] | None) -> LayerConfig | None:
        """Removes units of one block, in place; see :meth:`PartCut.cut`."""
        part, kept = self.parts[block.index], self.units[block.index]
        if kept == part.units:
            return None
        writer = block.linears[part.writer]
        bias_O: Any = writer.module.bias
        constant = self.removal.compensate and bias_O is not None
        weight_IO, gram_II = self.removal.observed(stream, block, part, targets, constant=constant)
        removal = self.removal.removal(weight_IO, gram_II, part, kept)
        narrow(block.module, part, removal.kept_U)
        weight_SO = removal.weight_SO
        if constant:
            weight_SO, bias_O = weight_SO[:-1], weight_SO[-1]
        set_weight(writer, weight_SO.T, bias_O)
        smaller = LayerConfig(config, part.sizes(kept))
        adopt_sizes(block.module, smaller, block.index)
        return smaller

    def finish(self) -> list[float]:
        """Records the numbers of units in the model, and returns the share of units that each block has lost."""
        part, path = self.parts[0], self.blocks[0].path_of_list
        sizes = self.sizes_class(self.units, self.full, dict(part.fields), dict(part.fixed), path)
        set_sizes(self.model, [block.module for block in self.blocks], sizes.sizes)
        structure.add_structure(self.model, sizes)
        return rates_from_units(self.units, self.full)
