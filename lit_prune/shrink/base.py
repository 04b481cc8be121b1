"""The base class of methods that remove units of one part from every block."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.allocate.base import TOLERANCE, Allocation
from lit_prune.calibration.statistics import GRAM, BlockStatistics
from lit_prune.calibration.stream import Stream, on_device
from lit_prune.calibration.windows import Batch
from lit_prune.calibration.written import is_added
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.models import structure
from lit_prune.models.families import Block, CustomClass, dense_family
from lit_prune.models.linears import PrunableLinear
from lit_prune.models.remote_code.modeling_shrunk import SHRUNK, layer_config
from lit_prune.models.remote_code.modeling_sliced import SlicedCausalLM
from lit_prune.progress import log
from lit_prune.search.behind_pruned import Observation, statistics_behind_pruned
from lit_prune.search.mask_cache import MaskedTrial, mask_cache
from lit_prune.search.trial import Trial, model_on_device
from lit_prune.shrink.part_method import PartMethod, attention_of, cannot_shrink, in_attention
from lit_prune.shrink.trial import ZeroedUnits
from lit_prune.shrink.unit_cut import UnitCut, UnitRemoval
from lit_prune.shrink.units.narrow import check_part, config_error
from lit_prune.shrink.units.parts import NoPart, Part
from lit_prune.shrink.units.sizes import PartSizes, check_multiple, rates_from_units, units_from_rates, units_left

FEW_TOKENS = 4  # for an input of the writer; with fewer a small cut is better without compensation


@dataclass(frozen=True)
class UnitMethod(PartMethod):
    """A method that removes the least units of one part from every block, and refits the weights that read the others.

    A rate is the share of the dense model's units that a block has lost, by earlier cuts too.

    Attributes:
        multiple: Number of which the number of units is a multiple, unless a block keeps all.
        rounds: Number of rounds in which the units of a block are removed.
        damping: Share of the mean of the Gram matrix's diagonal that is added to it.
        compensate: Whether weights are updated to make up for what is removed.
    """

    multiple: int
    rounds: int
    damping: float
    compensate: bool

    needs: ClassVar[frozenset[str]] = frozenset({GRAM})
    supports_search: ClassVar[bool] = True

    @property
    def corrects(self) -> bool:
        """Whether the weights of a block make up for the error that the blocks before have left."""
        return False

    @property
    @abstractmethod
    def sizes_class(self) -> type[PartSizes]:
        """The structure that records the cut, and finds the part."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("multiple", "rounds"):
            if getattr(self, field) < 1:
                raise InputError(f"`{name}.{field}` must be at least 1, got {getattr(self, field)}.")
        if not self.damping > 0:
            raise InputError(f"`{name}.damping` must be greater than 0, got {self.damping}.")

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises InputError for a sliced or masked model."""
        name = type(self).__name__
        if isinstance(model, SlicedCausalLM):
            raise InputError(f"`model` must not be sliced for {name}: shrink the dense model, then slice that.")
        if structure.masked(model):
            raise InputError(
                f"`model` must not have masks for {name}, which would fill their zeros: shrink the dense model, then "
                "mask the shrunk one."
            )

    def check(self, model: PreTrainedModel, blocks: Sequence[Block], sparsity: float) -> None:
        """Raises InputError if ``model`` has no such part, or ``multiple`` or ``sparsity`` would leave none of it."""
        for block in blocks:
            config = layer_config(model.config.get_text_config(), block.index)
            try:
                check_part(block.module, self._part(model, block), config, block.index)
            except NoPart as reason:
                raise cannot_shrink(model, type(self).__name__, str(reason)) from reason
        fewest = min(self.sizes(model, blocks))
        check_multiple(type(self).__name__, self.multiple, fewest, f"{self._noun} of a block")
        if sparsity > (most := self.max_rate(model, blocks)) + 1e-9:
            raise InputError(
                f"`pruning.sparsity` must be at most {most:.4g} for {type(self).__name__}, got {sparsity:g}: every "
                f"block keeps {self.multiple} (`multiple`) of {fewest} {self._noun}."
            )

    def check_rates(
        self, model: PreTrainedModel, blocks: Sequence[Block], allocation: Allocation, sparsity: float
    ) -> None:
        """Raises InputError if blocks may get different sizes, and there is no class for such models of the family."""
        family = dense_family(model.config)
        if not allocation.is_uniform() and family not in SHRUNK:
            raise InputError(
                f"`pruning.allocation` must be Uniform for {type(self).__name__} and the family {family!r}: blocks of "
                f"different sizes are supported for {', '.join(SHRUNK)}."
            )

    def check_sizes(self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]) -> None:
        """Raises InputError if the config does not accept the number of units that equal ``rates`` leave."""
        counts = self._units(model, blocks, rates)
        if len(set(counts)) > 1:  # of a model whose blocks differ already, and which has a list of its own for them
            return
        full, part, config = self.sizes(model, blocks), self._part(model, blocks[0]), model.config.get_text_config()
        units = counts[0]
        if reason := config_error(config, part.sizes(units)):
            accepted = {count for count in range(1, full[0] + 1) if config_error(config, part.sizes(count)) is None}
            end = full[0] + 1
            every = (each for each in range(self.multiple, end) if accepted.issuperset(range(each, end, each)))
            multiple = next(every, full[0])
            raise InputError(
                f"`pruning.sparsity` must leave a number of {self._noun} that the config accepts, got {units} of "
                f"{full[0]}: {reason} It accepts every multiple of {multiple}: set `multiple` of "
                f"{type(self).__name__} to that."
            )

    def sizes_in_config(
        self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]
    ) -> dict[str, int]:
        """Returns the fields that the number of units changes which equal ``rates`` leave."""
        return dict(self._part(model, blocks[0]).sizes(self._units(model, blocks, rates)[0]))

    def _units(self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]) -> list[int]:
        """Returns the number of units that ``rates`` leave each block."""
        present = [self._part(model, block).units for block in blocks]
        return units_from_rates(rates, self.sizes(model, blocks), self.multiple, present)

    def custom_class(self, allocation: Allocation) -> CustomClass | None:
        """Returns `shrunk` if the blocks may get different sizes."""
        return None if allocation.is_uniform() else "shrunk"

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the number of units of each block of the dense model."""
        recorded = structure.find_structure(model, self.sizes_class)
        return [self._part(model, block).units for block in blocks] if recorded is None else list(recorded.full)

    def current_rates(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[float]:
        """Returns the share of units that each block has lost in earlier cuts."""
        return rates_from_units([self._part(model, block).units for block in blocks], self.sizes(model, blocks))

    def max_rate(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns the rate that leaves one multiple of units in the smallest block."""
        return max(0.0, 1 - self.multiple / min(self.sizes(model, blocks)))

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns the rates rounded so that the number of units of every block is a multiple."""
        return rates_from_units(units_from_rates(rates, sizes, self.multiple), sizes)

    def further_rates(self, rates: Sequence[float], sizes: Sequence[int], current: Sequence[float]) -> list[float]:
        """Returns the rates rounded so that every block has a multiple of units, or all that are left to it."""
        return rates_from_units(units_from_rates(rates, sizes, self.multiple, units_left(current, sizes)), sizes)

    def size_multiple(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int:
        """Returns the number of columns of the writer, or rows of a reader, that all sizes are multiples of."""
        part = self._part(model, blocks[0])
        rows = [rows_UR.shape[1] for rows_UR in part.rows.values()]
        return self.multiple * math.gcd(part.columns_UK.shape[1], *rows)

    @property
    def limits_of_share(self) -> str:
        """What bounds the share of all parameters that can go, and of which part of the model, for an error."""
        return f"`pruning.min_rate`, `pruning.max_rate`, `multiple` and earlier cuts allow for the {self._noun}"

    def removable(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the number of parameters that all units of each block of the dense model have."""
        units = zip(self.sizes(model, blocks), self._parameters_of_units(model, blocks), strict=True)
        return [full * each for full, each in units]

    def full_parameters(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int:
        """Returns the number of parameters before all cuts by this method."""
        left = [self._part(model, block).units for block in blocks]
        counts = zip(self.sizes(model, blocks), left, self._parameters_of_units(model, blocks), strict=True)
        return parameters(model) + sum((full - units) * each for full, units, each in counts)

    def _parameters_of_units(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        return [_parameters_of_a_unit(block, self._part(model, block)) for block in blocks]

    def rounding(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns half a multiple as a share of the units of the smallest block of the dense model."""
        return self.multiple / 2 / min(self.sizes(model, blocks))

    def rounding_of_mean(self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]) -> float:
        """Returns half a multiple as a share of a block for equal rates, and a multiple as one of all for others."""
        equal = max(rates) - min(rates) < TOLERANCE
        return self.rounding(model, blocks) if equal else self.multiple / sum(self.sizes(model, blocks))

    def begin(
        self, model: PreTrainedModel, blocks: Sequence[Block], *, rates: Sequence[float], stream: Stream
    ) -> UnitCut:
        """Returns the cut that leaves each block the units of its rate; see :meth:`PartMethod.begin`."""
        full, parts = self.sizes(model, blocks), [self._part(model, block) for block in blocks]
        wanted = units_from_rates(rates, full, self.multiple, [part.units for part in parts])
        if self.compensate and any(units < part.units for units, part in zip(wanted, parts, strict=True)):
            self._tell_of_few_tokens(stream, blocks[0].linears[parts[0].writer])
        return UnitCut(
            model,
            blocks,
            parts,
            wanted,
            removal=self._removal,
            sizes_class=self.sizes_class,
            full=full,
            compares=self._compares(blocks[0], parts[0], stream),
        )

    def _tell_of_few_tokens(self, stream: Stream, writer: PrunableLinear) -> None:
        """Tells of a calibration text that is too short to compensate by."""
        tokens, inputs = stream.tokens(), writer.weight_OI.shape[1]
        if tokens < FEW_TOKENS * inputs:
            log(
                f"{type(self).__name__} compensates by {tokens:,} calibration tokens for the {inputs:,} inputs of "
                f"{writer.name}, fewer than {FEW_TOKENS} for each: raise `pruning.calibration.num_samples`.",
                once=True,
            )

    def _compares(self, first: Block, part: Part, stream: Stream) -> bool:
        """Returns whether blocks make up for the errors of those before, as far as all processes can."""
        if not self.corrects:
            return False
        if distributed.all_reduce_count(len(stream.hidden)) < 2:
            reason = "that takes at least two calibration batches, lower `pruning.calibration.batch_size`"
        elif not self._writes_as_it_is(first, part, stream):
            reason = "what an MLP writes is not added to the residual stream as it is"
        else:
            return True
        log(f"{type(self).__name__} does not make up for the errors of the blocks before: {reason}.")
        return False

    def _writes_as_it_is(self, first: Block, part: Part, stream: Stream) -> bool:
        """Returns whether the output of the part is simply added to the residual stream, in all processes."""
        with on_device(first, stream.device):
            added = is_added(stream, first, first.linears[part.writer])
        return distributed.all_reduce_count(int(added)) == distributed.world_size()

    def observation(
        self, model: PreTrainedModel, blocks: Sequence[Block], *, rates: Sequence[float], stream: Stream
    ) -> Observation:
        """Returns how a search observes the part of every block behind blocks that are shrunk at ``rates``."""
        zeroed, removal = self._zeroed(model, blocks), self._removal

        def observe(stream: Stream, block: Block, targets: Sequence[Tensor] | None) -> BlockStatistics:
            return removal.statistics(stream, block, zeroed.parts[block.index], targets)

        def cut(block: Block, observed: BlockStatistics) -> dict[str, Tensor]:
            return zeroed.weights(block, observed, zeroed.split(block.index, rates[block.index]))

        first = zeroed.parts[0]
        compares = self._compares(blocks[0], first, stream)
        return Observation(observe, cut, compares, None if in_attention(first.writer) else attention_of)

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
        """Returns statistics behind blocks shrunk at ``rates``; see :meth:`Method.trial_statistics`."""
        residual = stream()
        observation = self.observation(model, blocks, rates=rates, stream=residual)
        return statistics_behind_pruned(blocks, [observation], stream=residual, device=device)

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
        """Runs ``model`` itself, with zeros for the columns of removed units, which computes the same as without them.

        Biases are not refitted; see :meth:`Method.trial`.
        """
        zeroed = self._zeroed(model, blocks)

        def pruned(block: Block, rates: Mapping[str, float]) -> dict[str, Tensor]:
            return zeroed.weights(block, statistics[block.index], rates)

        with model_on_device(model, device), mask_cache(zeroed.blocks, pruned) as cache:
            yield MaskedTrial(model, batches, cache, [self.multiple] * len(blocks), zeroed.split)

    def _zeroed(self, model: PreTrainedModel, blocks: Sequence[Block]) -> ZeroedUnits:
        parts = [self._part(model, block) for block in blocks]
        return ZeroedUnits(blocks, parts, self.sizes(model, blocks), self.multiple, self._removal.removal)

    @property
    def _removal(self) -> UnitRemoval:
        return UnitRemoval(self.rounds, self.damping, self.compensate)

    def _part(self, model: PreTrainedModel, block: Block) -> Part:
        config = layer_config(model.config.get_text_config(), block.index)
        try:
            return self._find(block.linears, config)
        except NoPart as reason:
            raise cannot_shrink(model, type(self).__name__, str(reason)) from reason

    def _find(self, linears: Mapping[str, PrunableLinear], config: Any) -> Part:
        find: Callable[[Mapping[str, PrunableLinear], Any], Part] = self.sizes_class.find
        return find(linears, config)

    @property
    def _noun(self) -> str:
        return self.sizes_class.noun


def _parameters_of_a_unit(block: Block, part: Part) -> int:
    """The number of parameters that go with one unit of a block, biases of its rows included."""
    rows = 0
    for name, rows_UR in part.rows.items():
        module: Any = block.linears[name].module
        rows += rows_UR.shape[1] * (block.linears[name].weight_OI.shape[1] + (module.bias is not None))
    return rows + part.columns_UK.shape[1] * block.linears[part.writer].weight_OI.shape[0]
