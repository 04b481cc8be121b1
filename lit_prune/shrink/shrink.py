"""Shrink: several parts of a model made smaller under one budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from transformers import PreTrainedModel

from lit_prune.allocate.base import TOLERANCE, Allocation, weighted_mean
from lit_prune.allocate.budget import MAX_RATE
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream
from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError, described
from lit_prune.evaluation.sizes import parameters
from lit_prune.models.families import Block, CustomClass
from lit_prune.models.on_disk import on_disk
from lit_prune.pruning.base import Method, Propagate
from lit_prune.reconstruct.reconstruction import Reconstruction
from lit_prune.search.behind_pruned import statistics_behind_pruned
from lit_prune.search.trial import Trial
from lit_prune.shrink.base import UnitMethod
from lit_prune.shrink.part_method import PartMethod, cut_blocks
from lit_prune.shrink.share import PartRates, split, split_first
from lit_prune.shrink.stages import PartsMethod, PartsStage, Stages, WholeStage, tell_it_stays
from lit_prune.shrink.trial import JointTrial
from lit_prune.shrink.units.narrow import config_error

EQUAL = "equal shares"


@final
@dataclass(frozen=True)
class Shrink(PartsMethod):
    """Shrinks several parts of a model, such as the attention and the MLP of every block.

    The rate of a block is the share that it loses of the parameters of all parts together. Every part loses that share
    of its units, or shares in the proportion of `weights`. Parts with large units are rounded first, and the
    others make up for it: of 3 key/value groups none or one goes at a rate of 0.25, and the channels of the MLP then
    lose more or less. A search with `level: parts`, or a plan, gives every part of every block a rate of its own
    instead. In every block the attention is cut first, and the MLP, or the mixture, is calibrated behind what that
    leaves; with `MLPWidth.correct_errors` it also makes up for the error of the attention.

    Depth and HiddenWidth can be parts too. The sparsity is then the share of all parameters of the model as it is:
    blocks go first, then dimensions of the residual stream, then units of the blocks that remain, each calibrated on
    what the cuts before have left. The share of the blocks, of the dimensions and of the units is the same, or in the
    proportion of `weights`. Blocks and dimensions are rounded so that the units can make up for it. Such a cut is made
    once in a fit, with rates that are neither searched nor bounded, and without reconstruction.

    Args:
        parts: The methods: MLPWidth, HeadGroups or Experts, which remove units of the blocks, Depth and HiddenWidth.
        weights: Rate of each part relative to the others; null gives all the same.

    Raises:
        InputError: for no parts, methods that cannot be parts, the same method twice, or weights that do not fit.
    """

    parts: Sequence[Method] | None = None
    weights: Sequence[float] | None = None

    chooses_linears: ClassVar[bool] = False
    needs_text: ClassVar[bool] = True
    changes_shapes: ClassVar[bool] = True
    supports_parameters: ClassVar[bool] = True
    propagate: ClassVar[Propagate] = "pruned"  # type: ignore[misc]

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError("`Shrink.parts` must be a list of methods, such as [MLPWidth, HeadGroups], got none.")
        for part in self.parts:
            if not isinstance(part, Method):
                raise InputError(f"`Shrink.parts` must be objects such as MLPWidth(), got {described(part)}.")
            if not part.can_be_part:
                raise InputError(
                    "`Shrink.parts` must be methods that make a model smaller: MLPWidth, HeadGroups, Experts, Depth or "
                    f"HiddenWidth, got {type(part).__name__}: make that cut in another run."
                )
        names = self._names
        if len(set(names)) < len(names):
            raise InputError(f"`Shrink.parts` must be different methods, got {', '.join(names)}.")
        weights = self.weights
        if weights is not None and (len(weights) != len(names) or not all(0 < weight < math.inf for weight in weights)):
            raise InputError(
                f"`Shrink.weights` must be {len(names)} positive numbers, one a part, got {list(weights)}."
            )

    @property
    def _every(self) -> Sequence[Method]:
        return self.parts or ()

    @property
    def _parts(self) -> Sequence[PartMethod]:
        """The parts of the blocks."""
        return [part for part in self._every if isinstance(part, PartMethod)]

    @cached_property
    def _stages(self) -> Stages | None:
        """The cuts of the whole model and of the parts of its blocks; None if there are only the latter."""
        pairs = sorted(self._weighted, key=lambda pair: pair[0].place)
        whole = [WholeStage(part, weight) for part, weight in pairs if not isinstance(part, PartMethod)]
        if not whole:
            return None
        parts = PartsStage(Shrink(self._parts, self._weights)) if self._parts else None
        return Stages(whole, parts)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The statistics that the parts read."""
        return frozenset().union(*(part.needs for part in self._every))

    @property
    def supports_search(self) -> bool:  # type: ignore[override]
        """Whether all parts have trials."""
        return all(part.supports_search for part in self._every)

    @property
    def supports_reconstruction(self) -> bool:  # type: ignore[override]
        """Whether all parts leave the blocks comparable with those of before."""
        return all(part.supports_reconstruction for part in self._every)

    @property
    def of_all_parameters(self) -> bool:  # type: ignore[override]
        """Whether the model is cut as a whole too."""
        return self._stages is not None

    @property
    def finest_level(self) -> str:  # type: ignore[override]
        """`parts`, unless the model is cut as a whole too."""
        return "parts" if self._stages is None else "blocks"

    @property
    def for_fewer(self) -> str:  # type: ignore[override]
        """What removes more than these parts, as far as they are not all there are."""
        others = {"Depth": "which removes blocks", "HiddenWidth": "which narrows the embeddings too"}
        missing = [f"{name}, {does}" for name, does in others.items() if name not in self._names]
        return f"add to `Shrink.parts` {', or '.join(missing)}" if missing else ""

    @property
    def fewer(self) -> frozenset[str]:  # type: ignore[override]
        """What the parts leave fewer of."""
        return frozenset().union(*(part.fewer for part in self._every))

    @property
    def described(self) -> str:
        """The method for an error that says what it cannot do."""
        return "Shrink" if self._stages is None else "Shrink with Depth or HiddenWidth"

    @property
    def structures(self) -> int:  # type: ignore[override]
        """Number of parts, each of which records a structure."""
        return len(self._every)

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises InputError for a model that one of the parts does not support."""
        for part in self._every:
            part.check_model(model)

    def check(self, model: PreTrainedModel, blocks: Sequence[Block], sparsity: float) -> None:
        """Raises InputError if ``model`` does not have one of the parts, or ``sparsity`` would leave none of one."""
        if self._stages is not None and on_disk(model) is not None:
            raise InputError(
                "`model.on_disk` must be false for Shrink with Depth or HiddenWidth, which cuts the model several "
                "times: make these cuts in runs of their own."
            )
        for part in self._every:
            part.check(model, blocks, 0.0)
        most = min(self.max_rate(model, blocks), self.max_sparsity(model, blocks))
        if sparsity > most + 1e-9:
            and_blocks = ", and Depth one block" if "Depth" in self._names else ""
            raise InputError(
                f"`pruning.sparsity` must be at most {most:.4g} for Shrink, got {sparsity:g}: every part keeps one "
                f"`multiple`{and_blocks}."
            )

    def check_rates(
        self, model: PreTrainedModel, blocks: Sequence[Block], allocation: Allocation, sparsity: float
    ) -> None:
        """Raises InputError if one of the parts does not support the rates that ``allocation`` gives."""
        for part in self._every:
            part.check_rates(model, blocks, allocation, sparsity)

    def check_sizes(self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]) -> None:
        """Raises InputError if the config does not accept the sizes that one of the parts leaves."""
        if (stages := self._stages) is not None:
            fields = stages.sizes_in_config(model, blocks, rates)
            if fields and (reason := config_error(model.config.get_text_config(), fields)):
                sizes = ", ".join(f"{name} {value}" for name, value in fields.items())
                raise InputError(
                    f"`pruning.sparsity` must leave sizes that the config accepts together, got {sizes}: {reason} "
                    "Choose another sparsity, or a larger `multiple` of a part."
                )
            return
        for part, own_rates in zip(self._parts, split(rates, self._rates(model, blocks)), strict=True):
            part.check_sizes(model, blocks, own_rates)

    def sizes_in_config(
        self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]
    ) -> dict[str, int]:
        """Returns the fields of the config that the parts of the blocks change at equal ``rates``."""
        fields: dict[str, int] = {}
        for part, own_rates in zip(self._parts, split(rates, self._rates(model, blocks)), strict=True):
            fields |= part.sizes_in_config(model, blocks, own_rates)
        return fields

    def custom_class(self, allocation: Allocation) -> CustomClass | None:
        """Returns the kind of class that one of the parts makes of a model."""
        return next((kind for part in self._every if (kind := part.custom_class(allocation)) is not None), None)

    def repeats(self) -> bool:
        """Returns whether all parts can be cut again towards one sparsity."""
        return self._stages is None and all(part.repeats() for part in self._parts)

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the number of parameters that all parts of each block of the dense model have."""
        return self.removable(model, blocks)

    def removable(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the number of parameters that all parts of each block of the dense model have.

        With cuts of the whole model, its size as it is; see :class:`Stages`.
        """
        if (stages := self._stages) is not None:
            return stages.sizes(model, blocks)
        return [sum(numbers) for numbers in zip(*(part.removable(model, blocks) for part in self._parts), strict=True)]

    def named_sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[dict[str, int]]:
        """Returns the number of parameters of each part, without parts that a block does not have."""
        if self._stages is not None:
            return super().named_sizes(model, blocks)
        numbers = zip(*(part.removable(model, blocks) for part in self._parts), strict=True)
        return [{name: number for name, number in zip(self._names, own, strict=True) if number} for own in numbers]

    def mixtures(
        self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float], *, least: float, most: float
    ) -> dict[str, list[dict[str, float]]]:
        """Returns equal shares and, for each part, all from it first; none if there are `weights`."""
        if self.weights is not None:
            return {}
        parts, sizes = self._rates(model, blocks), self.named_sizes(model, blocks)
        bounded = [part.within(least, most) for part in parts]
        found = {EQUAL: split(rates, parts)}
        # the largest comes last, as it is the likeliest to be the best, whose statistics are then there
        for index in sorted(range(len(parts)), key=lambda index: sum(parts[index].removable)):
            if (by_part := split_first(index, rates, bounded)) is not None:
                found[f"{self._names[index]} first"] = by_part
        named: dict[str, list[dict[str, float]]] = {}
        for mixture, by_part in found.items():
            by_name = dict(zip(self._names, by_part, strict=True))
            by_block = [{name: by_name[name][block] for name in own} for block, own in enumerate(sizes)]
            if by_block not in named.values():
                named[mixture] = by_block
        return named

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
        if self._stages is not None:
            return [0.0] * len(blocks)
        parts = self._rates(model, blocks)
        return [
            weighted_mean([part.current[block] for part in parts], sizes) if any(sizes) else 0.0
            for block, sizes in enumerate(zip(*(part.removable for part in parts), strict=True))
        ]

    def max_rate(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns the rate at which every part has lost all that it can, in the block where that is least.

        With cuts of the whole model, of which blocks may go, it is 1; see :meth:`max_sparsity`.
        """
        if self._stages is not None:
            return 1.0
        parts = self._rates(model, blocks)
        return min(
            weighted_mean([part.most for part in parts], sizes)
            for sizes in zip(*(part.removable for part in parts), strict=True)
            if any(sizes)  # a block may have none of the parts, such as experts
        )

    def max_sparsity(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns the share of all parameters that goes with all that the cuts can remove, if one is of the whole."""
        return 1.0 if (stages := self._stages) is None else stages.max_share(model, blocks)

    def bounds(self, least: float, most: float) -> tuple[float, float]:
        """Returns the bounds; raises InputError for any that the user changed, with cuts of the whole model."""
        if self._stages is not None and (least > 0 or most < MAX_RATE):
            raise InputError(
                f"`pruning.min_rate` must be 0 and `pruning.max_rate` at least {MAX_RATE} for {self.described}, which "
                f"cuts the model as a whole, got {least:g} and {most:g}: give `weights` instead."
            )
        return least, most if self._stages is None else 1.0

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
        """Returns the mean rate at which ``share`` goes of all parameters; see the base class."""
        if (stages := self._stages) is not None:
            upper = min(upper, self.max_sparsity(model, blocks))
            was_cut = any(any(part.current_rates(model, blocks)) for part in self._every)
            slack = stages.half_step(model, blocks) if was_cut else 0.0
        return super().rate_of_parameters(share, model, blocks, lower=lower, upper=upper, slack=slack)

    def size_multiple(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int:
        """Returns the greatest number of which all sizes that the parts change are multiples."""
        return math.gcd(*(part.size_multiple(model, blocks) for part in self._every))

    @property
    def limits_of_share(self) -> str:
        """What bounds the share of all parameters that can go, and of which part of the model, for an error."""
        return "`pruning.min_rate`, `pruning.max_rate`, their multiples and earlier cuts allow for the parts of Shrink"

    def full_parameters(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int:
        """Returns the number of parameters before all cuts by the parts, or as it is with cuts of the whole model."""
        left = parameters(model)
        if self._stages is not None:
            return left
        return left + sum(part.full_parameters(model, blocks) - left for part in self._parts)

    def removes(self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]) -> bool:
        """Returns whether a part removes something, which is taken for granted with cuts of the whole model."""
        if self._stages is not None:
            return True
        parts = self._rates(model, blocks)
        return any(part.loses(own) for part, own in zip(parts, split(rates, parts), strict=True))

    def rounding(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns the largest rounding of a part, as a share of all: the others make up for all but their own."""
        if self._stages is not None:
            return 0.0
        parts = self._rates(model, blocks)
        return max(part.step * sum(part.removable) for part in parts) / sum(self.removable(model, blocks))

    def rounding_of_mean(self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]) -> float:
        """Returns half of the smallest multiple of a part, as a share of all: the parts make up for each other.

        With cuts of the whole model no rate is rounded before it is planned.
        """
        if self._stages is not None:
            return 0.0
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
        if (stages := self._stages) is not None:
            return stages.apply(model, blocks, rates=rates, device=device, stream=stream)
        residual = stream() if reconstruction is None else reconstruction.stream
        own_rates = self._rates_of_parts(model, blocks, rates)
        if blocks[0].rates is None:
            self._tell_what_stays(own_rates, self._rates(model, blocks))
        cuts = {
            index: part.begin(model, blocks, rates=own_rates[index], stream=residual)
            for index, part in enumerate(self._parts)
            if sum(part.removable(model, blocks))
        }
        cut_blocks(
            model,
            blocks,
            [cuts[index] for index in self._order if index in cuts],
            stream=residual,
            device=device,
            reconstruction=reconstruction,
        )
        for cut in cuts.values():
            cut.finish()
        return self.current_rates(model, blocks)

    def share_at(self, model: PreTrainedModel, blocks: Sequence[Block]) -> Callable[[float], float]:
        """Returns how much goes at an amount; see :meth:`PartsMethod.share_at`."""
        parts, in_blocks = self._rates(model, blocks), sum(parameters(block.module) for block in blocks)

        def share(amount: float) -> float:
            return sum(part.removed(amount) for part in parts) / in_blocks

        return share

    def _tell_what_stays(self, rates: Sequence[Sequence[float]], parts: Sequence[PartRates]) -> None:
        """Logs which parts lose nothing although others do and they could."""
        lose = [part.loses(own) for part, own in zip(parts, rates, strict=True)]
        for name, part, loses in zip(self._names, parts, lose, strict=True):
            if any(lose) and not loses and part.can_lose:
                tell_it_stays(name)

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
        residual, own_rates = stream(), self._rates_of_parts(model, blocks, rates)
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
        return [type(part).__name__ for part in self._every]

    @property
    def _weights(self) -> list[float]:
        """The weights of the parts of the blocks."""
        return [weight for part, weight in self._weighted if isinstance(part, PartMethod)]

    @property
    def _weighted(self) -> list[tuple[Method, float]]:
        """All parts with their weights."""
        return list(zip(self._every, self.weights or [1.0] * len(self._every), strict=True))

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
        return [
            PartRates(
                removable=part.removable(model, blocks),
                current=part.current_rates(model, blocks),
                most=part.max_rate(model, blocks),
                weight=weight,
                step=part.rounding(model, blocks),
                sizes=part.sizes(model, blocks),
                rounded=part.further_rates,
            )
            for part, weight in zip(self._parts, self._weights, strict=True)
        ]
