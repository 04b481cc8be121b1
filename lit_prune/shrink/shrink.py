"""Shrink: several parts of a model made smaller under one budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar, cast, final

import torch
from transformers import PreTrainedModel

from lit_prune.allocate.base import Allocation, weighted_mean
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream
from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.models.families import Block, CustomClass, find_blocks
from lit_prune.pruning.base import Method, Propagate
from lit_prune.reconstruct.reconstruction import Reconstruction
from lit_prune.search.behind_pruned import statistics_behind_pruned
from lit_prune.search.trial import Trial
from lit_prune.shrink.base import UnitMethod
from lit_prune.shrink.part_method import PartMethod, cut_blocks
from lit_prune.shrink.share import PartRates, split
from lit_prune.shrink.trial import JointTrial

TOLERANCE = 1e-6


@final
@dataclass(frozen=True)
class Shrink(Method):
    """Shrinks several parts of every block, such as the attention and the MLP.

    The rate of a block is the share that it loses of the parameters of all parts together. Every part loses that share
    of its units, or shares in the proportion of `weights`. Parts with large units are rounded first, and the
    others make up for it: of 3 key/value groups none or one goes at a rate of 0.25, and the channels of the MLP then
    lose more or less. A search with `level: parts`, or a plan, gives every part of every block a rate of its own
    instead. In every block the attention is cut first, and the MLP, or the mixture, is calibrated behind what that
    leaves; with `MLPWidth.correct_errors` it also makes up for the error of the attention.

    Args:
        parts: The methods: MLPWidth, HeadGroups, and others that remove units of the blocks.
        weights: Rate of each part relative to the others; null gives all the same.

    Raises:
        InputError: for no parts, methods that cannot be parts, the same method twice, or weights that do not fit.
    """

    parts: Sequence[Method] | None = None
    weights: Sequence[float] | None = None

    chooses_linears: ClassVar[bool] = False
    needs_text: ClassVar[bool] = True
    changes_shapes: ClassVar[bool] = True
    supports_reconstruction: ClassVar[bool] = True
    supports_parameters: ClassVar[bool] = True
    finest_level: ClassVar[str] = "parts"
    for_fewer: ClassVar[str] = (
        "cut the model that Shrink leaves in another run, by Depth, which removes blocks, or by HiddenWidth, which "
        "narrows the embeddings too"
    )
    propagate: ClassVar[Propagate] = "pruned"  # type: ignore[misc]

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError("`Shrink.parts` must be a list of methods, such as [MLPWidth, HeadGroups], got none.")
        for part in self.parts:
            if not isinstance(part, PartMethod):
                raise InputError(
                    f"`Shrink.parts` must be methods that remove units of the blocks, such as MLPWidth and HeadGroups, "
                    f"got {type(part).__name__}: make that cut in another run."
                )
        names = self._names
        if len(set(names)) < len(names):
            raise InputError(f"`Shrink.parts` must be different methods, got {', '.join(names)}.")
        weights = self.weights
        if weights is not None and (len(weights) != len(names) or not all(weight > 0 for weight in weights)):
            raise InputError(
                f"`Shrink.weights` must be {len(names)} positive numbers, one a part, got {list(weights)}."
            )

    @property
    def _parts(self) -> Sequence[PartMethod]:
        return cast("Sequence[PartMethod]", self.parts or ())

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The statistics that the parts read."""
        return frozenset().union(*(part.needs for part in self._parts))

    @property
    def supports_search(self) -> bool:  # type: ignore[override]
        """Whether all parts have trials."""
        return all(part.supports_search for part in self._parts)

    @property
    def structures(self) -> int:  # type: ignore[override]
        """Number of parts, each of which records a structure."""
        return len(self._parts)

    def check(self, model: PreTrainedModel, sparsity: float) -> None:
        """Raises InputError if ``model`` does not have one of the parts, or ``sparsity`` would leave none of one."""
        for part in self._parts:
            part.check(model, 0.0)
        if sparsity > (most := self.max_rate(model)) + 1e-9:
            raise InputError(
                f"`pruning.sparsity` must be at most {most:.4g} for Shrink, got {sparsity:g}: every part keeps one "
                "`multiple` of units in every block."
            )

    def check_rates(self, blocks: Sequence[Block], allocation: Allocation, sparsity: float) -> None:
        """Raises InputError if one of the parts does not support the rates that ``allocation`` gives."""
        for part in self._parts:
            part.check_rates(blocks, allocation, sparsity)

    def check_sizes(self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]) -> None:
        """Raises InputError if the config does not accept the sizes that one of the parts leaves."""
        for part, own_rates in zip(self._parts, split(rates, self._rates(model, blocks)), strict=True):
            part.check_sizes(model, blocks, own_rates)

    def custom_class(self, allocation: Allocation) -> CustomClass | None:
        """Returns the kind of class that one of the parts makes of a model."""
        return next((kind for part in self._parts if (kind := part.custom_class(allocation)) is not None), None)

    def repeats(self) -> bool:
        """Returns whether all parts can be cut again."""
        return all(part.repeats() for part in self._parts)

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the number of parameters that all parts of each block of the dense model have."""
        return self.removable(model, blocks)

    def removable(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the number of parameters that all parts of each block of the dense model have."""
        return [sum(numbers) for numbers in zip(*(part.removable(model, blocks) for part in self._parts), strict=True)]

    def named_sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[dict[str, int]]:
        """Returns the number of parameters of each part, without parts that a block does not have."""
        numbers = zip(*(part.removable(model, blocks) for part in self._parts), strict=True)
        return [{name: number for name, number in zip(self._names, own, strict=True) if number} for own in numbers]

    def check_named(
        self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[Mapping[str, float]]
    ) -> None:
        """Raises InputError if a part cannot lose as much, or has lost more."""
        for name, part in zip(self._names, self._rates(model, blocks), strict=True):
            for block, (own, low) in enumerate(zip(rates, part.current, strict=True)):
                most = max(part.most, low)
                if name in own and not low - TOLERANCE <= own[name] <= most + TOLERANCE:
                    raise InputError(
                        f"`Plan.path`: the rate of {name} of block {block} must be between {low:.4g}, which is gone "
                        f"already, and {most:.4g}, which leaves one `multiple`, got {own[name]:g}."
                    )

    def current_rates(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[float]:
        """Returns the share of these parameters that each block has lost in earlier cuts."""
        parts = self._rates(model, blocks)
        return [
            weighted_mean([part.current[block] for part in parts], sizes) if any(sizes) else 0.0
            for block, sizes in enumerate(zip(*(part.removable for part in parts), strict=True))
        ]

    def max_rate(self, model: PreTrainedModel) -> float:
        """Returns the rate at which every part has lost all that it can, in the block where that is least."""
        parts = self._rates(model, find_blocks(model))
        return min(
            weighted_mean([part.most for part in parts], sizes)
            for sizes in zip(*(part.removable for part in parts), strict=True)
            if any(sizes)  # a block may have none of the parts, such as experts
        )

    def size_multiple(self, model: PreTrainedModel) -> int:
        """Returns the greatest number of which all sizes that the parts change are multiples."""
        return math.gcd(*(part.size_multiple(model) for part in self._parts))

    @property
    def limits_of_share(self) -> str:
        """What bounds the share of all parameters that can go, and of which part of the model, for an error."""
        return "`pruning.min_rate`, `pruning.max_rate`, their multiples and earlier cuts allow for the parts of Shrink"

    def full_parameters(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int:
        """Returns the number of parameters before all cuts by the parts."""
        left = parameters(model)
        return left + sum(part.full_parameters(model, blocks) - left for part in self._parts)

    def rounding(self, blocks: Sequence[Block]) -> float:
        """Returns the largest rounding of a part: the others make up for all but their own."""
        return max(part.rounding(blocks) for part in self._parts)

    def rounding_of_mean(self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]) -> float:
        """Returns half of the smallest multiple of a part, as a share of all: the parts make up for each other."""
        parts = self._rates(model, blocks)
        smallest = min(part.step * size for part in parts for size in part.removable if size)
        return smallest / sum(self.removable(model, blocks))

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
        """Shrinks all parts of one block after the other; see :meth:`Method.apply`."""
        residual = stream() if reconstruction is None else reconstruction.stream
        cuts = [
            part.begin(model, blocks, rates=own_rates, stream=residual)
            for part, own_rates in zip(self._parts, self._rates_of_parts(model, blocks, rates), strict=True)
        ]
        cut_blocks(
            model,
            blocks,
            [cuts[index] for index in self._order],
            stream=residual,
            device=device,
            reconstruction=reconstruction,
        )
        for cut in cuts:
            cut.finish()
        return self.current_rates(model, blocks)

    @property
    def _order(self) -> list[int]:
        """The parts by their places in a block."""
        return sorted(range(len(self._parts)), key=lambda index: self._parts[index].place)

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
        """Returns the statistics of every part behind the parts and blocks that are cut before; see the base class."""
        residual, own_rates = stream(), split(rates, self._rates(model, blocks))
        observations = [
            part.observation(model, blocks, rates=own_rates[index], stream=residual)
            for index in self._order
            if isinstance(part := self._parts[index], UnitMethod)
        ]
        return statistics_behind_pruned(blocks, observations, stream=residual, device=device)

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
        """Runs ``model`` with the trials of all parts at once, which change different weights of it."""
        rates = self._rates(model, blocks)
        with ExitStack() as opened:
            trials = [
                opened.enter_context(part.trial(model, blocks, statistics=statistics, device=device, batches=batches))
                for part in self._parts
            ]
            yield JointTrial(model, batches, trials, rates, self._names)

    @property
    def _names(self) -> list[str]:
        return [type(part).__name__ for part in self._parts]

    def _rates_of_parts(
        self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]
    ) -> list[list[float]]:
        """Returns the rates of every part: those planned one by one, or what the rates of the blocks give it."""
        parts = self._rates(model, blocks)
        if blocks[0].rates is None:
            return split(rates, parts)
        return [
            [(block.rates or {}).get(name, low) for block, low in zip(blocks, part.current, strict=True)]
            for name, part in zip(self._names, parts, strict=True)
        ]

    def _rates(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[PartRates]:
        """Returns what every part can remove from the blocks."""
        weights = self.weights or [1.0] * len(self._parts)
        return [
            PartRates(
                removable=part.removable(model, blocks),
                current=part.current_rates(model, blocks),
                most=part.max_rate(model),
                weight=weight,
                step=part.rounding(blocks),
                sizes=part.sizes(model, blocks),
                rounded=part.rates,
            )
            for part, weight in zip(self._parts, weights, strict=True)
        ]
