"""The interface of pruning methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedModel

from lit_prune.allocate import Uniform
from lit_prune.allocate.base import TOLERANCE, Allocation
from lit_prune.allocate.budget import rate_of_share
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream
from lit_prune.calibration.windows import Batch
from lit_prune.evaluation.sizes import parameters
from lit_prune.models.families import Block, CustomClass
from lit_prune.reconstruct.reconstruction import Reconstruction
from lit_prune.search.trial import Trial

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
        of_all_parameters: Whether its sparsity is a share of all parameters, whatever `budget` says.
        finest_level: The finest that can have rates of their own: `blocks`, their `linears`, or their `parts`.
        can_be_part: Whether the method can be a part of ``Shrink``: it makes a part of every block smaller and
            implements :meth:`removable`, or it cuts the model as a whole and implements :meth:`coverage`.
        place: Its place in the order in which ``Shrink`` cuts: where the part is in a block, 0 for the attention, 1 for
            the MLP or the mixture; below 0 for a method that cuts the model as a whole, which comes first.
        for_fewer: What removes more parameters than the method can, for the error of a target that it does not reach.
        fewer: What the model has fewer of after a cut, of `heads`, `dimensions` (of the residual stream) and `blocks`.
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
    of_all_parameters: ClassVar[bool] = False
    finest_level: ClassVar[str] = "blocks"
    can_be_part: ClassVar[bool] = False
    place: ClassVar[int] = 1
    for_fewer: ClassVar[str] = ""
    fewer: ClassVar[frozenset[str]] = frozenset()
    structures: int = 1
    propagate: Propagate = "dense"

    @classmethod
    def default_allocation(cls) -> type[Allocation]:
        """Returns the allocation that a recipe with this method has if none is given."""
        return Uniform

    def check_model(self, model: PreTrainedModel) -> None:  # noqa: B027 (most support any model)
        """Raises InputError for a family, or a state of the model, that the method does not support."""

    def check(  # noqa: B027 (most have nothing to check)
        self, model: PreTrainedModel, blocks: Sequence[Block], sparsity: float
    ) -> None:
        """Raises InputError if the method cannot prune ``model`` to ``sparsity``; ``model`` is not changed."""

    def check_rates(  # noqa: B027 (most support any rates)
        self, model: PreTrainedModel, blocks: Sequence[Block], allocation: Allocation, sparsity: float
    ) -> None:
        """Raises InputError if the method does not support the rates that ``allocation`` gives."""

    def check_sizes(  # noqa: B027 (most leave sizes that any config accepts)
        self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]
    ) -> None:
        """Raises InputError if the config of ``model`` does not accept the sizes that equal ``rates`` leave."""

    def sizes_in_config(
        self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]
    ) -> dict[str, int]:
        """Returns the fields of the config, with their values, that equal ``rates`` of a part of ``Shrink`` leave."""
        return {}

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

    def mixtures(
        self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float], *, least: float, most: float
    ) -> dict[str, list[dict[str, float]]]:
        """Returns rates of the parts of each block from which a search can start, by names such as `MLPWidth first`.

        Args:
            model: The causal LM.
            blocks: Its blocks.
            rates: The rates of the blocks, which are the means of those of their parts but for rounding.
            least: Lower bound of the rates of the parts.
            most: Upper bound of the rates of the parts.
        """
        return {}

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

    def max_rate(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns the largest rate that a block of ``model`` can have."""
        return 1.0

    def max_sparsity(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns the largest mean of the rates, for methods that cannot give every block its largest rate at once."""
        return 1.0

    def size_multiple(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int:
        """Returns a number of which every size of a weight is a multiple that the method changes."""
        return 1

    @property
    def described(self) -> str:
        """The method for an error that says what it cannot do."""
        return type(self).__name__

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

    def coverage(self, model: PreTrainedModel, blocks: Sequence[Block]) -> tuple[float, float]:
        """Returns the share of the blocks' parameters, and that of all others, that would go at a rate of 1.

        Shares of the model as it is, for a method that cuts it as a whole: (1, 0) if it removes blocks.
        """
        raise NotImplementedError(f"{type(self).__name__} does not cut a model as a whole")

    def bounds(self, least: float, most: float) -> tuple[float, float]:
        """Returns the smallest and the largest rate between ``least`` and ``most`` that the method supports."""
        return least, most

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns the supported rates that are closest to the allocated ``rates``."""
        return list(rates)

    def further_rates(self, rates: Sequence[float], sizes: Sequence[int], current: Sequence[float]) -> list[float]:
        """Returns the supported rates of blocks that have lost ``current`` already; by default those of any blocks."""
        return self.rates(rates, sizes)

    def removes(self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]) -> bool:
        """Returns whether a cut at ``rates``, which :meth:`rates` has returned, removes more than is gone."""
        current = self.current_rates(model, blocks)
        return any(rate > now + TOLERANCE for rate, now in zip(rates, current, strict=True))

    def rounding(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns how far a cut may exceed the sparsity because the method supports only some rates: half a step."""
        return 0.0

    def rounding_of_mean(self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]) -> float:
        """Returns how far the mean of ``rates`` may be from the sparsity that they were planned for, by rounding."""
        return self.rounding(model, blocks)

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
