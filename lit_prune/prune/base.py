"""What a method is: how the blocks of a model become smaller, by masks or otherwise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.allocate.base import Allocation, meet_budget
from lit_prune.calibration.statistics import BlockStatistics, InputStatistics
from lit_prune.calibration.stream import Stream, observe, on_device
from lit_prune.calibration.windows import Batch
from lit_prune.masks.zeros import zeros
from lit_prune.models import structure
from lit_prune.models.families import Block
from lit_prune.progress import track
from lit_prune.prune.patterns import Pattern, Unstructured
from lit_prune.search.mask_cache import MaskedTrial, mask_cache
from lit_prune.search.trial import Trial, model_on_device

Propagate = Literal["dense", "pruned"]


class Method(ABC):
    """How every block of a model gives the share that its rate says.

    Attributes:
        needs: The statistics that the method reads, of those in ``lit_prune.calibration.statistics``.
        needs_text: Whether it reads calibration text in other ways, by the stream that :meth:`apply` is given.
        propagate: `dense`: the statistics of the one pass over the unpruned model serve for scoring and pruning alike.
            `pruned`: each block sees what the pruned blocks before it give, which takes more passes.
        chooses_linears: Whether `targets` and `ignore` mean anything to the method.
        makes_zeros: Whether the method sets weights to zero, so that rates are shares of weights.
        changes_shapes: Whether weights become smaller, so that the model's parameters and its speed change; such a
            method records a ``Structure``, which reports and checkpoints read.
        keeps_values: Whether weights that are not removed stay what they were, to the bit.
        supports_search: Whether there is a :meth:`trial`, which an allocation that searches needs.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    needs_text: ClassVar[bool] = False
    chooses_linears: ClassVar[bool] = True
    makes_zeros: ClassVar[bool] = False
    changes_shapes: ClassVar[bool] = False
    keeps_values: ClassVar[bool] = False
    supports_search: ClassVar[bool] = False
    propagate: Propagate = "dense"

    def check(self, model: PreTrainedModel, sparsity: float) -> None:  # noqa: B027 (most have nothing to check)
        """Raises InputError where the method cannot take ``sparsity`` from ``model``, before anything is done to it."""

    def check_rates(  # noqa: B027 (most can have any rates)
        self, blocks: Sequence[Block], allocation: Allocation, sparsity: float
    ) -> None:
        """Raises InputError where the method cannot have the rates that ``allocation`` spreads."""

    def repeats(self) -> bool:
        """Returns whether a model that the method has cut can be cut again, to a higher sparsity."""
        return True

    @abstractmethod
    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the size of each block in the unit that rates are a share of: weights, dimensions, channels, blocks.

        `sparsity` is the mean of the rates, weighted by these sizes.
        """

    def current_rate(self, block: Block) -> float:
        """Returns the share that an earlier cut has removed from ``block`` already, which counts toward its rate."""
        return 0.0

    def max_rate(self, model: PreTrainedModel) -> float:
        """Returns the greatest rate that a block of ``model`` can have."""
        return 1.0

    def bounds(self, least: float, most: float) -> tuple[float, float]:
        """Returns the least and the greatest rate that a block can have, of those from ``least`` to ``most``."""
        return least, most

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns the rates that will be given, where the method cannot give just those that were allocated."""
        return list(rates)

    def rounding(self, blocks: Sequence[Block]) -> float:
        """Returns the share by which a cut may exceed the sparsity, because only some rates are possible."""
        return 0.0

    @abstractmethod
    def apply(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        rates: Sequence[float],
        statistics: Sequence[BlockStatistics],
        device: torch.device,
        stream: Callable[[], Stream],
    ) -> list[float]:
        """Cuts every block of ``model``, in place; returns the share that each has given.

        Args:
            model: The causal LM, in eval mode.
            blocks: Its blocks.
            rates: The share that each block is to give.
            statistics: Those of each block of the unpruned model that ``needs`` names, where ``propagate`` is dense.
            device: Where a block computes.
            stream: Returns the calibration batches as they enter the first block.
        """

    def trial(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        statistics: Sequence[BlockStatistics],
        device: torch.device,
        batches: Sequence[Batch],
    ) -> AbstractContextManager[Trial]:
        """Gives the trial by which an allocation measures rates, the whole model on ``device``; it changes nothing.

        Args:
            model: The causal LM, in eval mode.
            blocks: Its blocks.
            statistics: Those of each block of the unpruned model that ``needs`` names, whatever ``propagate`` is.
            device: Where the trial runs.
            batches: The calibration batches.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no trial, and `supports_search` is {self.supports_search}"
        )


class MaskMethod(Method):
    """A method that sets weights to zero, in all linears of one input at a time.

    A leaf declares `pattern` and `propagate` as fields that may be null, and null becomes the default here:
    jsonargparse takes no instance of a leaf as the default of an argument, and carries a default that is not null over
    to another method with an argument of that name.

    Attributes:
        pattern: Which entries of a weight may be zero together.
        default_propagate: What a null ``propagate`` means.
    """

    makes_zeros: ClassVar[bool] = True
    supports_search: ClassVar[bool] = True
    pattern: Pattern = Unstructured()
    default_propagate: ClassVar[Propagate] = "dense"

    def __post_init__(self) -> None:
        if self.pattern is None:
            object.__setattr__(self, "pattern", Unstructured())
        if self.propagate is None:
            object.__setattr__(self, "propagate", self.default_propagate)

    @abstractmethod
    def prune(self, weights: Sequence[Tensor], statistics: InputStatistics, rate: float) -> list[Tensor]:
        """Returns pruned copies of the weights, removed entries exactly 0.

        Each weight loses round(numel * rate) entries, or as many of each group as the pattern says.

        Args:
            weights: Of linears that share one input (q, k, v; gate, up), each (out, in), contiguous.
            statistics: Of that input, those that ``needs`` names, on the weights' device.
            rate: Share to remove, in [0, 1].
        """

    def check_rates(self, blocks: Sequence[Block], allocation: Allocation, sparsity: float) -> None:
        """Raises InputError where the pattern cannot have such rates, or does not fit a linear."""
        columns = {
            f"{name} of block {block.index}": linear.weight_OI.shape[1]
            for block in blocks
            for name, linear in block.linears.items()
        }
        self.pattern.check(allocation, sparsity, columns)

    def repeats(self) -> bool:
        """Returns whether the pattern allows several rates."""
        return self.pattern.repeats

    def bounds(self, least: float, most: float) -> tuple[float, float]:
        """Returns the bounds that the pattern can have."""
        return self.pattern.bounds(least, most)

    def rounding(self, blocks: Sequence[Block]) -> float:
        """Returns half a step of the largest block, and half a weight of every linear, as a share of all weights."""
        sizes = [block.size for block in blocks]
        step = max(self.pattern.grain(size) for size in sizes)
        return (step + sum(len(block.linears) for block in blocks)) / 2 / sum(sizes)

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns the rates that the pattern can have."""
        return self.pattern.rates(rates, sizes)

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the number of prunable weights of each block."""
        return [block.size for block in blocks]

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
    ) -> list[float]:
        """Prunes block after block; see :meth:`Method.apply`."""
        walk = stream() if self.needs and self.propagate == "pruned" else None
        for block, rate in zip(track(blocks, "Pruning blocks"), rates, strict=True):
            with on_device(block, device, changes=True):
                taken = observe(walk, block, self.needs, advance=False) if walk else statistics[block.index]
                for group in groups_of(block, taken, self._rates_of_linears(block, rate)):
                    group.write(self.prune(group.weights, group.statistics, group.rate))
                del taken, group  # a block's Gram matrices go before those of the next are taken
                if walk is not None and block is not blocks[-1]:
                    walk.run(block)
        structure.write(model, masked=True)
        return [self.current_rate(block) for block in blocks]

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
        """Gives ``model`` itself, weights of its blocks swapped in and out; see :meth:`Method.trial`.

        They are made from the statistics of the unpruned model, also where the cut will take those behind pruned
        blocks: SparseGPT then needs the Gram matrices of all blocks at once (see its `propagate`).
        """

        def pruned(block: Block, rate: float) -> dict[str, Tensor]:
            weights: dict[str, Tensor] = {}
            for group in groups_of(block, statistics[block.index], self._rates_of_linears(block, rate)):
                weights |= zip(group.names, self.prune(group.weights, group.statistics, group.rate), strict=True)
            return weights

        granularity = [self.pattern.grain(block.size) for block in blocks]
        with model_on_device(model, device), mask_cache(blocks, pruned) as cache:
            yield MaskedTrial(model, batches, cache, granularity)

    def _rates_of_linears(self, block: Block, rate: float) -> dict[str, float]:
        """Returns the rate of each linear, with mean ``rate``: linears that are sparser already keep their zeros."""
        sizes = {name: linear.size for name, linear in block.linears.items()}
        current = {name: linear.pruned / linear.size for name, linear in block.linears.items()}
        # within a weight's rounding of one another they keep the same rate; groups of columns have rates of their own
        if self.pattern.columns is not None or all(current[name] <= rate + 1 / sizes[name] for name in sizes):
            return dict.fromkeys(sizes, rate)
        lower = list(current.values())
        rates = meet_budget(
            lambda amount: [amount] * len(sizes), rate, sizes=list(sizes.values()), lower=lower, upper=1.0
        )
        return dict(zip(sizes, rates, strict=True))


@dataclass(frozen=True)
class LinearGroup:
    """The linears of a block that share one input and one rate.

    Attributes:
        block: The block.
        names: Of the linears.
        weights: Their matrices, each (out, in), contiguous.
        statistics: Of their input.
        rate: Share to remove from each.
    """

    block: Block
    names: Sequence[str]
    weights: Sequence[Tensor]
    statistics: InputStatistics
    rate: float

    def write(self, weights: Iterable[Tensor]) -> None:
        """Puts ``weights`` in the place of the matrices."""
        for name, weight_OI in zip(self.names, weights, strict=True):
            self.block.linears[name].write(weight_OI)


def groups_of(block: Block, statistics: BlockStatistics, rates: Mapping[str, float]) -> Iterator[LinearGroup]:
    """Yields the linears of ``block`` by the input that they share, and by their rate."""
    for shared in statistics.groups(block.linears):
        inputs = statistics.input_of(shared[0])
        for rate in sorted({rates[name] for name in shared}):
            names = [name for name in shared if rates[name] == rate]
            weights = [block.linears[name].weight_OI.contiguous() for name in names]
            yield LinearGroup(block, names, weights, inputs.to(weights[0].device), rate)


class ScoredMethod(MaskMethod):
    """A mask method that gives every weight a score by itself, and removes where scores are smallest.

    Attributes:
        by_row: Compare scores within each output row, not over the whole matrix.
    """

    keeps_values: ClassVar[bool] = True
    by_row: ClassVar[bool]

    @abstractmethod
    def score(self, weight_OI: Tensor, statistics: InputStatistics) -> Tensor:
        """Returns the score of every entry, at least 0, fp32; larger is kept."""

    def prune(self, weights: Sequence[Tensor], statistics: InputStatistics, rate: float) -> list[Tensor]:
        """Returns each weight with its smallest scores set to 0; what is gone already goes first."""
        pruned = []
        for weight_OI in weights:
            score_OI = self.score(weight_OI, statistics).masked_fill(weight_OI == 0, -1)
            pruned.append(torch.where(self.pattern.keep(score_OI, rate, by_row=self.by_row), weight_OI, 0))
        return pruned
