"""The base classes of methods that set weights to zero."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.allocate import DLP
from lit_prune.allocate.base import Allocation, meet_budget
from lit_prune.allocate.budget import sparsity_of_linears
from lit_prune.calibration.statistics import BlockStatistics, InputStatistics
from lit_prune.calibration.stream import Stream, observe, on_device
from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError
from lit_prune.masks.zeros import zeros
from lit_prune.models import structure
from lit_prune.models.families import Block
from lit_prune.progress import track
from lit_prune.pruning.base import Method, Propagate
from lit_prune.pruning.patterns import Pattern, Unstructured
from lit_prune.reconstruct.reconstruction import Reconstruction, reconstructing
from lit_prune.search.behind_pruned import Observation, statistics_behind_pruned
from lit_prune.search.mask_cache import MaskedTrial, mask_cache
from lit_prune.search.trial import Trial, model_on_device


class MaskMethod(Method):
    """A method that sets weights to zero; linears that share an input are pruned together.

    A subclass declares `pattern` and `propagate` as fields whose default is None, which is replaced here: jsonargparse
    accepts no instance of a subclass as a default, and when a user switches to another method that has an argument of
    the same name, it carries over every default but None.

    Attributes:
        pattern: The sparsity pattern: which entries of a weight may be zero together.
        default_propagate: The value that replaces a ``propagate`` of None.
    """

    makes_zeros: ClassVar[bool] = True
    finest_level: ClassVar[str] = "linears"
    supports_search: ClassVar[bool] = True
    supports_reconstruction: ClassVar[bool] = True
    supports_parameters: ClassVar[bool] = True
    pattern: Pattern = Unstructured()
    default_propagate: ClassVar[Propagate] = "dense"

    def __post_init__(self) -> None:
        if self.pattern is None:
            object.__setattr__(self, "pattern", Unstructured())
        if self.propagate is None:
            object.__setattr__(self, "propagate", self.default_propagate)

    @classmethod
    def default_allocation(cls) -> type[Allocation]:
        """Returns DLP, which scores weights."""
        return DLP

    @abstractmethod
    def prune(self, weights: Sequence[Tensor], statistics: InputStatistics, rate: float) -> list[Tensor]:
        """Returns copies of the weights in which the removed entries are exactly 0.

        round(numel * rate) entries of each weight are removed, or as many of each group as the pattern prescribes.

        Args:
            weights: Weights of linears that share an input (q, k, v; gate, up), each (out, in), contiguous.
            statistics: Statistics of that input, all that ``needs`` names, on the weights' device.
            rate: Share to remove, in [0, 1].
        """

    def check_rates(
        self, model: PreTrainedModel, blocks: Sequence[Block], allocation: Allocation, sparsity: float
    ) -> None:
        """Raises InputError if the pattern does not support such rates or does not fit a linear."""
        columns = {
            f"{name} of block {block.index}": linear.weight_OI.shape[1]
            for block in blocks
            for name, linear in block.linears.items()
        }
        self.pattern.check(allocation, sparsity, columns)
        if "blocks" not in allocation.levels and self.pattern.columns is not None:
            raise InputError(
                f"`pruning.allocation` must have one rate per block for the pattern {self.pattern}, whose N is the "
                "same in all linears of a block; `level: linears` and plans with linears need Unstructured."
            )

    def repeats(self) -> bool:
        """Returns whether weights with the pattern can be pruned further in it."""
        return self.pattern.repeats

    def bounds(self, least: float, most: float) -> tuple[float, float]:
        """Returns the smallest and the largest rate between ``least`` and ``most`` that the pattern supports."""
        return self.pattern.bounds(least, most)

    def rate_of_parameters(
        self,
        share: float,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        lower: Sequence[float],
        upper: float,
        slack: float = 0.0,
    ) -> float:
        """Returns the sparsity of the linears at which ``share`` of all parameters is zero."""
        return sparsity_of_linears(share, model, blocks, lower=lower, upper=upper, slack=slack)

    def rounding(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns half the largest granularity plus half a weight per linear, as a share of all weights."""
        sizes = [block.size for block in blocks]
        granularity = max(self.pattern.granularity(size) for size in sizes)
        return (granularity + sum(len(block.linears) for block in blocks)) / 2 / sum(sizes)

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns the rates closest to ``rates`` that the pattern supports."""
        return self.pattern.rates(rates, sizes)

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the number of prunable weights of each block."""
        return [block.size for block in blocks]

    def named_sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[dict[str, int]]:
        """Returns the number of weights of each linear."""
        return [{name: linear.size for name, linear in block.linears.items()} for block in blocks]

    def current_rate(self, block: Block) -> float:
        """Returns the share of the block's prunable weights that is exactly zero."""
        zero, total = zeros(linear.weight_OI for linear in block.linears.values())
        return zero / total

    @torch.no_grad()
    def apply(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        rates: Sequence[float],
        statistics: Sequence[BlockStatistics],
        device: torch.device,
        stream: Callable[[], Stream],
        reconstruction: Reconstruction | None = None,
    ) -> list[float]:
        """Prunes one block after the other; see :meth:`Method.apply`."""
        pruned_stream = None
        if self.needs and self.propagate == "pruned":
            pruned_stream = stream() if reconstruction is None else reconstruction.stream
        note = None if reconstruction is None else reconstruction.note
        for block, rate in zip(track(blocks, "Pruning blocks", note), rates, strict=True):
            with on_device(block, device, changes=True), reconstructing(reconstruction, block):
                if pruned_stream is None:
                    block_statistics = statistics[block.index]
                else:
                    block_statistics = observe(pruned_stream, block, self.needs, advance=False)
                for group in groups_of(block, block_statistics, self._rates_of_linears(block, rate)):
                    group.write(self.prune(group.weights, group.statistics, group.rate))
                del block_statistics, group  # frees the Gram matrices before those of the next block are allocated
                if pruned_stream is not None and reconstruction is None and block is not blocks[-1]:
                    pruned_stream.run(block)
        structure.write(model, masked=True)
        return [self.current_rate(block) for block in blocks]

    def trial_statistics(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        rates: Sequence[float],
        statistics: Sequence[BlockStatistics],
        device: torch.device,
        stream: Callable[[], Stream],
    ) -> Sequence[BlockStatistics]:
        """Returns statistics behind blocks pruned at ``rates`` if the cut uses such; see the base class."""
        if not self.needs or self.propagate != "pruned":
            return statistics

        def cut(block: Block, observed: BlockStatistics) -> dict[str, Tensor]:
            return self._pruned(block, observed, self._rates_of_linears(block, rates[block.index]))

        def observed(stream: Stream, block: Block, targets: object) -> BlockStatistics:
            return observe(stream, block, self.needs, advance=False)

        return statistics_behind_pruned(blocks, [Observation(observed, cut)], stream=stream(), device=device)

    @contextmanager
    def trial(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        statistics: Sequence[BlockStatistics],
        device: torch.device,
        batches: Sequence[Batch],
    ) -> Iterator[Trial]:
        """Runs ``model`` itself, with pruned weights swapped into its blocks; see :meth:`Method.trial`.

        The statistics of all blocks are held at once, for SparseGPT their Gram matrices (see its `propagate`).
        """
        current = [_current(block) for block in blocks]

        def split(index: int, rate: float) -> dict[str, float]:
            return self._split(blocks[index], rate, current[index])

        def pruned(block: Block, rates: Mapping[str, float]) -> dict[str, Tensor]:
            return self._pruned(block, statistics[block.index], rates)

        granularity = [self.pattern.granularity(block.size) for block in blocks]
        with model_on_device(model, device), mask_cache(blocks, pruned) as cache:
            yield MaskedTrial(model, batches, cache, granularity, split)

    def _pruned(self, block: Block, statistics: BlockStatistics, rates: Mapping[str, float]) -> dict[str, Tensor]:
        """Returns the pruned weights of the linears of ``block`` by name."""
        weights: dict[str, Tensor] = {}
        for group in groups_of(block, statistics, rates):
            weights |= zip(group.names, self.prune(group.weights, group.statistics, group.rate), strict=True)
        return weights

    def _rates_of_linears(self, block: Block, rate: float) -> dict[str, float]:
        """Returns the rate of each linear, as planned one by one, or with mean ``rate``."""
        return dict(block.rates) if block.rates is not None else self._split(block, rate, _current(block))

    def _split(self, block: Block, rate: float, current: Mapping[str, float]) -> dict[str, float]:
        """Returns the rate of each linear, with mean ``rate``: if one is sparser already, the others lose less.

        A pattern with groups of columns gives every linear ``rate``: of an N per linear no mean could be met exactly.
        A linear that is sparser already keeps its zeros, and the block then exceeds ``rate``.
        """
        sizes = {name: linear.size for name, linear in block.linears.items()}
        # a linear that exceeds the rate by the rounding of one weight is not sparser: all keep the same rate
        if self.pattern.columns is not None or all(current[name] <= rate + 1 / sizes[name] for name in sizes):
            return dict.fromkeys(sizes, rate)
        lower = list(current.values())
        rates = meet_budget(
            lambda amount: [amount] * len(sizes), rate, sizes=list(sizes.values()), lower=lower, upper=1.0
        )
        return dict(zip(sizes, rates, strict=True))


def _current(block: Block) -> dict[str, float]:
    """Returns the share of each linear that is pruned already."""
    return {name: linear.pruned / linear.size for name, linear in block.linears.items()}


@dataclass(frozen=True)
class LinearGroup:
    """The linears of a block that share an input and are pruned at the same rate.

    Attributes:
        block: The block.
        names: Names of the linears.
        weights: Their weights, each (out, in), contiguous.
        statistics: Statistics of their input.
        rate: Share to remove from each.
    """

    block: Block
    names: Sequence[str]
    weights: Sequence[Tensor]
    statistics: InputStatistics
    rate: float

    def write(self, weights: Iterable[Tensor]) -> None:
        """Replaces the weights of the linears by ``weights``."""
        for name, weight_OI in zip(self.names, weights, strict=True):
            self.block.linears[name].write(weight_OI)


def groups_of(block: Block, statistics: BlockStatistics, rates: Mapping[str, float]) -> Iterator[LinearGroup]:
    """Yields the linears of ``block`` in groups that share an input and a rate."""
    for shared in statistics.groups(block.linears):
        inputs = statistics.input_of(shared[0])
        for rate in sorted({rates[name] for name in shared}):
            names = [name for name in shared if rates[name] == rate]
            weights = [block.linears[name].weight_OI.contiguous() for name in names]
            yield LinearGroup(block, names, weights, inputs.to(weights[0].device), rate)


class ScoredMethod(MaskMethod):
    """A mask method that scores every weight on its own, and removes those with the smallest scores.

    Attributes:
        by_row: Whether scores are compared within each output row, not over the whole matrix.
    """

    keeps_values: ClassVar[bool] = True
    by_row: ClassVar[bool]

    @abstractmethod
    def score(self, weight_OI: Tensor, statistics: InputStatistics) -> Tensor:
        """Returns the score of every entry, float32, at least 0; larger scores are kept."""

    def prune(self, weights: Sequence[Tensor], statistics: InputStatistics, rate: float) -> list[Tensor]:
        """Returns each weight with the entries of the smallest scores set to 0; pruned entries stay 0 and count."""
        pruned = []
        for weight_OI in weights:
            score_OI = self.score(weight_OI, statistics).masked_fill(weight_OI == 0, -1)
            pruned.append(torch.where(self.pattern.keep(score_OI, rate, by_row=self.by_row), weight_OI, 0))
        return pruned
