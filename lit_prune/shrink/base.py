"""The base class of methods that remove units of one part from every block.

Suffixes: I inputs and O outputs of the writer of a part, U units, S inputs that stay.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.allocate.base import Allocation
from lit_prune.calibration.errors import observe_errors
from lit_prune.calibration.statistics import GRAM, BlockStatistics
from lit_prune.calibration.stream import Stream, observe, on_device
from lit_prune.calibration.windows import Batch
from lit_prune.calibration.written import is_added
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.models import structure
from lit_prune.models.families import Block, CustomClass, config_of, dense_family, find_blocks
from lit_prune.models.linears import PrunableLinear
from lit_prune.models.remote_code.modeling_shrunk import SHRUNK, LayerConfig, layer_config
from lit_prune.models.remote_code.modeling_sliced import SlicedCausalLM
from lit_prune.progress import log, track
from lit_prune.pruning.base import Method, Propagate
from lit_prune.reconstruct.reconstruction import Reconstruction, reconstructing
from lit_prune.search.behind_pruned import statistics_behind_pruned
from lit_prune.search.mask_cache import MaskedTrial, mask_cache
from lit_prune.search.trial import Trial, model_on_device
from lit_prune.shrink.narrow import adopt_sizes, check_part, config_error, narrow, set_sizes, set_weight
from lit_prune.shrink.obs import Removal, corrected, drop_units, remove_units
from lit_prune.shrink.parts import NoPart, Part
from lit_prune.shrink.sizes import PartSizes, rates_from_units, units_from_rates
from lit_prune.shrink.trial import ZeroedUnits

Targets = Callable[[Block], Sequence[Tensor] | None]


@dataclass(frozen=True)
class UnitMethod(Method):
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
    chooses_linears: ClassVar[bool] = False
    needs_text: ClassVar[bool] = True
    changes_shapes: ClassVar[bool] = True
    supports_search: ClassVar[bool] = True
    supports_reconstruction: ClassVar[bool] = True
    supports_parameters: ClassVar[bool] = True
    can_be_part: ClassVar[bool] = True
    propagate: ClassVar[Propagate] = "pruned"  # type: ignore[misc]

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

    def check(self, model: PreTrainedModel, sparsity: float) -> None:
        """Raises InputError if the blocks of ``model`` have no such part, or ``sparsity`` would leave none of it."""
        self._check_state(model)
        blocks = find_blocks(model)
        for block in blocks:
            config = layer_config(model.config.get_text_config(), block.index)
            try:
                check_part(block.module, self._part(model, block), config, block.index)
            except NoPart as reason:
                raise self._refused(model, str(reason)) from reason
        if sparsity > (most := self.max_rate(model)) + 1e-9:
            raise InputError(
                f"`pruning.sparsity` must be at most {most:.4g} for {type(self).__name__}, got {sparsity:g}: every "
                f"block keeps {self.multiple} (`multiple`) of {min(self.sizes(model, blocks))} {self._noun}."
            )

    def _check_state(self, model: PreTrainedModel) -> None:
        name = type(self).__name__
        if isinstance(model, SlicedCausalLM):
            raise InputError(f"`model` must not be sliced for {name}: shrink the dense model, then slice that.")
        if structure.masked(model):
            raise InputError(
                f"`model` must not have masks for {name}, which would fill their zeros: shrink the dense model, then "
                "mask the shrunk one."
            )

    def _refused(self, model: PreTrainedModel, reason: str) -> InputError:
        family = dense_family(model.config)
        return InputError(f"`pruning.method` {type(self).__name__} cannot shrink the family {family!r}: {reason}.")

    def check_rates(self, blocks: Sequence[Block], allocation: Allocation, sparsity: float) -> None:
        """Raises InputError if blocks may get different sizes, and there is no class for such models of the family."""
        family = dense_family(config_of(blocks[0]))
        if not allocation.is_uniform() and family not in SHRUNK:
            raise InputError(
                f"`pruning.allocation` must be Uniform for {type(self).__name__} and the family {family!r}: blocks of "
                f"different sizes are supported for {', '.join(SHRUNK)}."
            )

    def check_sizes(self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]) -> None:
        """Raises InputError if the config does not accept the number of units that equal ``rates`` leave."""
        full, part, config = self.sizes(model, blocks), self._part(model, blocks[0]), model.config.get_text_config()
        units = units_from_rates(rates, full, self.multiple)[0]
        if reason := config_error(config, part.sizes(units)):
            accepted = {count for count in range(1, full[0] + 1) if config_error(config, part.sizes(count)) is None}
            counts = range(self.multiple, full[0] + 1)
            multiple = next((each for each in counts if accepted.issuperset(range(each, full[0] + 1, each))), full[0])
            raise InputError(
                f"`pruning.sparsity` must leave a number of {self._noun} that the config accepts, got {units} of "
                f"{full[0]}: {reason} It accepts every multiple of {multiple}: set `multiple` of "
                f"{type(self).__name__} to that."
            )

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

    def max_rate(self, model: PreTrainedModel) -> float:
        """Returns the rate that leaves one multiple of units in the smallest block."""
        return max(0.0, 1 - self.multiple / min(self.sizes(model, find_blocks(model))))

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns the rates rounded so that the number of units of every block is a multiple."""
        return rates_from_units(units_from_rates(rates, sizes, self.multiple), sizes)

    def size_multiple(self, model: PreTrainedModel) -> int:
        """Returns the number of columns of the writer, or rows of a reader, that all sizes are multiples of."""
        part = self._part(model, find_blocks(model)[0])
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

    def rounding(self, blocks: Sequence[Block]) -> float:
        """Returns half a multiple as a share of the units of a block."""
        part = self._find(blocks[0].linears, config_of(blocks[0]))
        return self.multiple / 2 / part.units

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
        """Shrinks one block after the other, each behind those that are shrunk; see :meth:`Method.apply`."""
        residual = stream() if reconstruction is None else reconstruction.stream
        full = self.sizes(model, blocks)
        units = units_from_rates(rates, full, self.multiple)
        parts = [self._part(model, block) for block in blocks]
        units = [min(wanted, part.units) for wanted, part in zip(units, parts, strict=True)]
        note = None if reconstruction is None else reconstruction.note
        targets_of = self._targets(blocks[0], parts[0], residual, reconstruction)
        for block, part, kept in zip(track(blocks, "Shrinking blocks", note), parts, units, strict=True):
            with on_device(block, device, changes=True), reconstructing(reconstruction, block):
                targets = targets_of(block)
                if kept < part.units:
                    self._shrink(model, block, part, kept, residual, targets)
                if reconstruction is None and block is not blocks[-1]:
                    residual.run(block)
        path = blocks[0].path.rpartition(".")[0]
        sizes = self.sizes_class(units, full, dict(parts[0].fields), dict(parts[0].fixed), path)
        set_sizes(model, [block.module for block in blocks], sizes.sizes)
        structure.add_structure(model, sizes)
        return rates_from_units(units, full)

    def _targets(
        self, first: Block, part: Part, residual: Stream, reconstruction: Reconstruction | None = None
    ) -> Targets:
        """Returns a function of a block, which is still dense, that returns its output behind dense blocks, if needed.

        It must be called for every block, in their order, with the block on the stream's device.
        """
        if not self.corrects:
            return lambda block: None
        with on_device(first, residual.device):
            added = is_added(residual, first, first.linears[part.writer])
        if not added:
            log(
                f"{type(self).__name__} does not make up for the errors of the blocks before: what an MLP writes is "
                "not added to the residual stream as it is."
            )
            return lambda block: None
        shared = None if reconstruction is None else reconstruction.dense
        dense = shared or residual.copy()

        def targets(block: Block) -> Sequence[Tensor]:
            if dense is not shared:
                dense.run(block)
            return dense.hidden

        return targets

    def _shrink(
        self,
        model: PreTrainedModel,
        block: Block,
        part: Part,
        kept: int,
        residual: Stream,
        targets: Sequence[Tensor] | None,
    ) -> None:
        """Removes units of one block, in place, until ``kept`` are left."""
        writer = block.linears[part.writer]
        bias_O: Any = writer.module.bias
        constant = self.compensate and bias_O is not None
        weight_IO, gram_II = self._observed(residual, block, part, targets, constant=constant)
        removal = self._removal(weight_IO, gram_II, part, kept)
        narrow(block.module, part, removal.kept_U)
        config = LayerConfig(layer_config(model.config.get_text_config(), block.index), part.sizes(kept))
        adopt_sizes(block.module, config, block.index)
        weight_SO = removal.weight_SO
        if constant:
            weight_SO, bias_O = weight_SO[:-1], weight_SO[-1]
        set_weight(writer, weight_SO.T, bias_O)

    def _observed(
        self, residual: Stream, block: Block, part: Part, targets: Sequence[Tensor] | None, *, constant: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the weight that the removal starts from, (I, O), and the Gram matrix of its inputs, (I, I).

        Args:
            residual: The stream in front of ``block``.
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
            observed = observe(residual, watched, self.needs, advance=False, constant=constant)
            return weight_IO, observed.grams[part.writer]
        halves = observe_errors(residual, block, writer, targets, constant=constant)
        corrected_IO = corrected(weight_IO, halves, part.columns_UK.to(weight_IO.device), damping=self.damping)
        moments = halves[0] + halves[1]
        return corrected_IO, moments.gram_II / max(moments.tokens, 1)

    def _removal(self, weight_IO: Tensor, gram_II: Tensor, part: Part, kept: int) -> Removal:
        columns_UK, count = part.columns_UK.to(weight_IO.device), part.units - kept
        if not self.compensate:
            return drop_units(weight_IO.float(), gram_II, columns_UK, count)
        return remove_units(weight_IO, gram_II, columns_UK, count, rounds=self.rounds, damping=self.damping)

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
        zeroed, residual = self._zeroed(model, blocks), stream()
        targets_of = self._targets(blocks[0], zeroed.parts[0], residual)

        def observed(residual: Stream, block: Block) -> BlockStatistics:
            part, targets = zeroed.parts[block.index], targets_of(block)
            weight_IO, gram_II = self._observed(residual, block, part, targets, constant=False)
            found = {} if targets is None else {part.writer: weight_IO.T.to(block.linears[part.writer].weight_OI)}
            return BlockStatistics(grams={part.writer: gram_II}, corrected=found)

        def cut(block: Block, observed: BlockStatistics) -> dict[str, Tensor]:
            return zeroed.weights(block, observed, zeroed.split(block.index, rates[block.index]))

        return statistics_behind_pruned(zeroed.blocks, cut, observed, stream=residual, device=device)

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
        return ZeroedUnits(blocks, parts, self.sizes(model, blocks), self.multiple, self._removal)

    def _part(self, model: PreTrainedModel, block: Block) -> Part:
        config = layer_config(model.config.get_text_config(), block.index)
        try:
            return self._find(block.linears, config)
        except NoPart as reason:
            raise self._refused(model, str(reason)) from reason

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
