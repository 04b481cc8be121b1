"""Trials of rates: the weights of blocks in which units are zero instead of removed, and several parts at once.

Suffixes: I inputs and O outputs of the writer of a part, U units, S inputs that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.windows import Batch
from lit_prune.models.families import Block
from lit_prune.search.trial import NamedTrial, Trial
from lit_prune.shrink.share import PartRates, split
from lit_prune.shrink.units.obs import Removal
from lit_prune.shrink.units.parts import Part
from lit_prune.shrink.units.sizes import units_from_rates

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
        parts: The part of each block.
    """

    def __init__(
        self, blocks: Sequence[Block], parts: Sequence[Part], full: Sequence[int], multiple: int, remove: Remove
    ) -> None:
        self.parts, self._full, self._multiple, self._remove = parts, full, multiple, remove
        self.blocks = [
            replace(block, linears={part.writer: block.linears[part.writer]})
            for block, part in zip(blocks, parts, strict=True)
        ]

    def split(self, index: int, rate: float) -> dict[str, float]:
        """Returns the rate of the writer of a block, by its name."""
        return {self.parts[index].writer: rate}

    def weights(self, block: Block, statistics: BlockStatistics, rates: Mapping[str, float]) -> dict[str, Tensor]:
        """Returns the weight of the writer of ``block`` at its rate, by its name."""
        part = self.parts[block.index]
        dense_OI = block.linears[part.writer].weight_OI
        kept = min(part.units, units_from_rates([rates[part.writer]], [self._full[block.index]], self._multiple)[0])
        if kept == part.units:
            return {part.writer: dense_OI}
        weight_OI = statistics.corrected.get(part.writer, dense_OI).to(dense_OI.device)
        gram_II = statistics.grams[part.writer].to(weight_OI.device)
        removal = self._remove(weight_OI.T, gram_II, part, kept)
        columns_S = part.columns_UK.to(weight_OI.device)[removal.kept_U].flatten().sort().values
        zeroed_OI = torch.zeros_like(weight_OI)
        zeroed_OI[:, columns_S] = removal.weight_SO.T.to(weight_OI.dtype)
        return {part.writer: zeroed_OI}


class JointTrial(Trial):
    """A trial with one rate per block, which is split into the rates of trials of its parts.

    Args:
        model: The causal LM.
        batches: The calibration batches.
        trials: The trials of the parts, which change different weights of ``model``.
        parts: What the parts can remove.
        names: Their names.

    Attributes:
        by_part: For each part, the granularity of its changes in every block, in parameters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        trials: Sequence[Trial],
        parts: Sequence[PartRates],
        names: Sequence[str],
    ) -> None:
        super().__init__(model, trials[0].path, batches)
        self.batches, self.trials, self.parts, self.part_names = batches, trials, parts, names
        self.by_part = [_granularity(*pair) for pair in zip(trials, parts, strict=True)]
        self.granularity = min(self.by_part, key=sum)

    def take(self, rates: Sequence[float]) -> None:
        """Gives every part the weights of its own rates."""
        for trial, own_rates in zip(self.trials, split(rates, self.parts), strict=True):
            trial.take(own_rates)

    def take_unpruned(self) -> None:
        """Gives every part the weights of before."""
        for trial in self.trials:
            trial.take_unpruned()

    def settings(self, rates: Sequence[float]) -> Sequence[Hashable]:
        """Returns, for each block, the rates of its parts, which depend on those of other blocks."""
        return list(zip(*split(rates, self.parts), strict=True))

    def by_name(self) -> NamedTrial:
        """Returns a trial of the same model with one rate per part of every block."""
        return PartTrial(self)


class PartTrial(NamedTrial):
    """A trial with one rate per part of every block; see :class:`JointTrial`.

    Parts exchange whole multiples of their units, so that the sum may be off by half the finest of them.
    """

    def __init__(self, joint: JointTrial) -> None:
        super().__init__(joint.model, joint.path, joint.batches)
        self.trials, self.parts = joint.trials, joint.parts
        parts, names = joint.parts, joint.part_names
        blocks = range(len(parts[0].removable))
        self._places = [(block, part) for block in blocks for part in range(len(parts)) if parts[part].removable[block]]
        self.names = [[names[part] for own, part in self._places if own == block] for block in blocks]
        self.sizes = [parts[part].removable[block] for block, part in self._places]
        self.granularity = [joint.by_part[part][block] for block, part in self._places]
        self.tolerance = min(self.granularity) / 2

    def take(self, rates: Sequence[float]) -> None:
        """Gives every part the weights of its own rates."""
        by_part = [list(part.current) for part in self.parts]
        for (block, part), rate in zip(self._places, rates, strict=True):
            by_part[part][block] = rate
        for trial, own_rates in zip(self.trials, by_part, strict=True):
            trial.take(own_rates)

    def take_unpruned(self) -> None:
        """Gives every part the weights of before."""
        for trial in self.trials:
            trial.take_unpruned()

    def split(self, rates: Sequence[float]) -> list[float]:
        """Returns the rates of the parts at which the blocks lose ``rates`` of all parts together."""
        found = split(rates, self.parts)
        return [found[part][block] for block, part in self._places]

    def bounds(self, least: float, most: float) -> tuple[list[float], list[float]]:
        """Returns the same bounds for all parts, as far as each can lose as much and has not lost more."""
        bounded = [part.within(least, most) for part in self.parts]
        low, high = zip(*(bounded[part].bounds(block) for block, part in self._places), strict=True)
        return list(low), list(high)


def _granularity(trial: Trial, part: PartRates) -> list[int]:
    """Returns the number of parameters of which every change of a part is a multiple, for every block."""
    numbers = zip(trial.granularity, part.removable, part.sizes, strict=True)
    return [max(multiple * parameters // max(units, 1), 1) for multiple, parameters, units in numbers]
