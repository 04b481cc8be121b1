"""The interface of pruning methods, and the base classes of those that set weights to zero."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, Uniform
from lit_prune.allocate.base import Allocation, meet_budget
from lit_prune.allocate.budget import rate_of_share, sparsity_of_linears
from lit_prune.calibration.statistics import BlockStatistics, InputStatistics
from lit_prune.calibration.stream import Stream, observe, on_device
from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.masks.zeros import zeros
from lit_prune.models import structure
from lit_prune.models.families import Block, CustomClass
from lit_prune.progress import track
from lit_prune.pruning.patterns import Pattern, Unstructured
from lit_prune.reconstruct.reconstruction import Reconstruction, reconstructing
from lit_prune.search.behind_pruned import statistics_behind_pruned
from lit_prune.search.mask_cache import MaskedTrial, mask_cache
from lit_prune.search.trial import Trial, model_on_device

Propagate = Literal["dense", "pruned"]


class Method(ABC):
    """A way to remove from every block of a model the share that its rate says, by masks or otherwise.

    Attributes:
        needs: The kinds of statistics that the method reads, see ``lit_prune.calibration.statistics``.
        needs_text: Whether the method reads the calibration text beyond these, from the stream of :meth:`apply`.
        propagate: `dense`: scoring and pruning both use the statistics of one pass over the unpruned model. `pruned`:
            a block's statistics are collected behind the blocks that are already pruned, which takes more passes.
        chooses_linears: Whether `targets` and `ignore` apply to the method.
        makes_zeros: Whether the method sets weights to zero, so that rates are shares of weights.
        changes_shapes: Whether the method changes the shapes of weights, and with them the model's parameter count and
            speed. Such a method records a ``Structure``, which reports and checkpoints read.
        keeps_values: Whether weights that are not removed keep their values, bit for bit.
        supports_search: Whether the method implements :meth:`trial`, which an allocation that searches needs.
        supports_reconstruction: Whether blocks that the method has cut can be reconstructed, see :meth:`apply`.
        supports_parameters: Whether the method implements :meth:`removable` and ``limits_of_share``, or
            :meth:`rate_of_parameters` itself, for the budgets `parameters` and `bytes`, and for targets.
        finest_level: The finest that can have rates of their own: `blocks`, their `linears`, or their `parts`.
        can_be_part: Whether the method implements :meth:`removable`, so that it can be a part of ``Shrink``.
        structures: Number of structures that a cut adds to the record of the model, if the method changes shapes.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    needs_text: ClassVar[bool] = False
    chooses_linears: ClassVar[bool] = True
    makes_zeros: ClassVar[bool] = False
    changes_shapes: ClassVar[bool] = False
    keeps_values: ClassVar[bool] = False
    supports_search: ClassVar[bool] = False
    supports_reconstruction: ClassVar[bool] = False
    supports_parameters: ClassVar[bool] = False
    finest_level: ClassVar[str] = "blocks"
    can_be_part: ClassVar[bool] = False
    structures: int = 1
    propagate: Propagate = "dense"

    @classmethod
    def default_allocation(cls) -> type[Allocation]:
        """Returns the allocation that a recipe with this method has if none is given."""
        return Uniform

    def check(self, model: PreTrainedModel, sparsity: float) -> None:  # noqa: B027 (most have nothing to check)
        """Raises InputError if the method cannot prune ``model`` to ``sparsity``; ``model`` is not changed."""

    def check_rates(  # noqa: B027 (most support any rates)
        self, blocks: Sequence[Block], allocation: Allocation, sparsity: float
    ) -> None:
        """Raises InputError if the method does not support the rates that ``allocation`` gives."""

    def check_sizes(  # noqa: B027 (most leave sizes that any config accepts)
        self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]
    ) -> None:
        """Raises InputError if the config of ``model`` does not accept the sizes that equal ``rates`` leave."""

    def custom_class(self, allocation: Allocation) -> CustomClass | None:
        """Returns the kind of class that a model becomes with the rates of ``allocation``; None if it keeps its own."""
        return None

    def repeats(self) -> bool:
        """Returns whether a model that the method has cut can be cut again, to a higher sparsity."""
        return True

    @abstractmethod
    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the size of each block in the unit of its rate: weights, dimensions, channels or blocks.

        `sparsity` is the mean of the rates, weighted by these sizes.
        """

    def named_sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[dict[str, int]]:
        """Returns the sizes of those linears or parts of each block that can have rates of their own, by name."""
        return [{} for _ in blocks]

    def check_named(  # noqa: B027 (most support any rates)
        self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[Mapping[str, float]]
    ) -> None:
        """Raises InputError if linears or parts cannot have ``rates``, by block and name."""

    def current_rate(self, block: Block) -> float:
        """Returns the share that earlier cuts have removed from ``block``, which counts toward its rate."""
        return 0.0

    def current_rates(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[float]:
        """Returns the share that earlier cuts have removed from each block."""
        return [self.current_rate(block) for block in blocks]

    def max_rate(self, model: PreTrainedModel) -> float:
        """Returns the largest rate that a block of ``model`` can have."""
        return 1.0

    def max_sparsity(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns the largest mean of the rates, for methods that cannot give every block its largest rate at once."""
        return 1.0

    def size_multiple(self, model: PreTrainedModel) -> int:
        """Returns a number of which every size of a weight is a multiple that the method changes."""
        return 1

    @property
    def limits_of_share(self) -> str:
        """What bounds the share of all parameters that can go, and of which part of the model, for an error."""
        raise NotImplementedError(f"{type(self).__name__} does not remove a share of all parameters")

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
        """Returns the mean rate at which ``share`` goes of the parameters before all cuts by this method.

        If a channel has 3 parameters, and 80 of 120 channels with 1,000 parameters in all go, 0.24 of them go.

        Args:
            share: Share of all parameters, in [0, 1).
            model: The causal LM.
            blocks: Its blocks.
            lower: Lower bound of each block's rate.
            upper: Upper bound of every rate, except where a block's lower bound exceeds it.
            slack: Share by which an earlier cut may exceed the target.

        Raises:
            OutOfRange: if no rates within the bounds give that share.
        """
        removable, total = self.removable(model, blocks), self.full_parameters(model, blocks)
        limits = self.limits_of_share
        return rate_of_share(share, removable, total, lower=lower, upper=upper, slack=slack, bounds=limits)

    def full_parameters(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int:
        """Returns the number of parameters that the shares of :meth:`rate_of_parameters` refer to."""
        return parameters(model)

    def removable(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the number of parameters that each block of the dense model would lose at a rate of 1."""
        raise NotImplementedError(f"{type(self).__name__} does not count the parameters that it removes by block")

    def bounds(self, least: float, most: float) -> tuple[float, float]:
        """Returns the smallest and the largest rate between ``least`` and ``most`` that the method supports."""
        return least, most

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns the supported rates that are closest to the allocated ``rates``."""
        return list(rates)

    def rounding(self, blocks: Sequence[Block]) -> float:
        """Returns how far a cut may exceed the sparsity because the method supports only some rates."""
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
        reconstruction: Reconstruction | None = None,
    ) -> list[float]:
        """Prunes every block of ``model`` in place, and returns the share that has been removed from each.

        Args:
            model: The causal LM, in eval mode.
            blocks: Its blocks.
            rates: The share to remove from each block.
            statistics: Statistics of each block of the unpruned model; if ``propagate`` is dense, all that ``needs``
                names.
            device: Device on which a block computes.
            stream: Returns a stream of the calibration batches that begins at the first block's input.
            reconstruction: The reconstruction of the blocks; None without one, and if ``supports_reconstruction`` is
                False. Every block is cut ``with reconstructing(reconstruction, block)``.
        """

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
        """Returns the statistics for :meth:`trial`: ``statistics``, or those that a cut at ``rates`` would prune by.

        Args:
            model: The causal LM, in eval mode, which is left as it was.
            blocks: Its blocks.
            rates: The rates that the trials start from.
            statistics: Statistics of each block of the unpruned model.
            device: Device on which a block computes.
            stream: Returns a stream of the calibration batches that begins at the first block's input.
        """
        return statistics

    def trial(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        statistics: Sequence[BlockStatistics],
        device: torch.device,
        batches: Sequence[Batch],
    ) -> AbstractContextManager[Trial]:
        """Returns a context manager that gives a trial of rates, and restores ``model`` at its end.

        Args:
            model: The causal LM, in eval mode.
            blocks: Its blocks.
            statistics: Statistics of each block by which it is pruned, all that ``needs`` names; see
                :meth:`trial_statistics`.
            device: Device on which the whole model runs meanwhile.
            batches: The calibration batches.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no trial, and `supports_search` is {self.supports_search}"
        )


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

    def check_rates(self, blocks: Sequence[Block], allocation: Allocation, sparsity: float) -> None:
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

    def rounding(self, blocks: Sequence[Block]) -> float:
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

        observed = partial(observe, wanted=self.needs, advance=False)
        return statistics_behind_pruned(blocks, cut, observed, stream=stream(), device=device)

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
