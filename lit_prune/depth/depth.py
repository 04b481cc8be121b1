"""Depth: fewer blocks. ShortGPT, arXiv 2403.03853; ReplaceMe, arXiv 2505.02819."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from transformers import PreTrainedModel

from lit_prune.allocate.base import TOLERANCE, Allocation
from lit_prune.allocate.budget import MAX_RATE, rate_of_share
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream
from lit_prune.depth.distance import distances
from lit_prune.depth.refit import check_refit, refit
from lit_prune.depth.remaining import RemainingBlocks, runs_of, spans
from lit_prune.depth.renumber import check_renumbering, drop_blocks
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.models import structure
from lit_prune.models.families import Block
from lit_prune.models.on_disk import on_disk
from lit_prune.models.remote_code.modeling_sliced import SlicedCausalLM
from lit_prune.progress import log
from lit_prune.pruning.base import Method, Propagate
from lit_prune.reconstruct.reconstruction import Reconstruction


@final
@dataclass(frozen=True)
class Depth(Method):
    """Removes whole blocks, which leaves a plain model of the family with a smaller `num_hidden_layers`.

    The sparsity is the share of blocks, rounded to whole ones. With the allocation Uniform, those go whose output
    differs least from their input, by 1 - the mean over tokens of their cosine (ShortGPT). With any other allocation,
    those go to which it gives the highest rates: with LayerRedundancy the same, with a Plan those that it names. DLP,
    OWL, AlphaPruning and Arithmetic, whose rates are for weights, are refused. The other blocks do not change unless
    `refit` is true, so that a model with masks keeps its zeros.

    Args:
        contiguous: Remove neighbouring blocks, those over which the residual stream changes least.
        refit: Let the MLP in front of every gap make up for what was removed, by least squares (ReplaceMe). Blocks
            removed at the very beginning have no such MLP.
        damping: With `refit`, share of the mean of the diagonal of M^T M that is added to it, where M are the outputs
            of the MLP; the larger it is, the less the MLP changes.

    Raises:
        InputError: for a damping that is not positive.
    """

    contiguous: bool = False
    refit: bool = False
    damping: float = 0.01

    needs_text: ClassVar[bool] = True
    chooses_linears: ClassVar[bool] = False
    changes_shapes: ClassVar[bool] = True
    supports_parameters: ClassVar[bool] = True
    can_be_part: ClassVar[bool] = True
    place: ClassVar[int] = -2
    fewer: ClassVar[frozenset[str]] = frozenset({"blocks"})
    for_fewer: ClassVar[str] = "Shrink removes parts of blocks too: [Depth, MLPWidth, HiddenWidth] as its `parts`"
    propagate: ClassVar[Propagate] = "pruned"  # type: ignore[misc]

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise InputError(f"`Depth.damping` must be greater than 0, got {self.damping}.")

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises InputError for a sliced model, and with ``refit`` for a masked one."""
        if isinstance(model, SlicedCausalLM):
            raise InputError("`model` must not be sliced for Depth: remove blocks of the dense model, then slice that.")
        if self.refit and structure.masked(model):
            raise InputError("`Depth.refit` must be false for a model with masks, whose zeros it would fill.")

    def check(self, model: PreTrainedModel, blocks: Sequence[Block], sparsity: float) -> None:
        """Raises InputError if ``sparsity`` leaves no block, or if the model cannot lose blocks or be refitted."""
        every = _dense_blocks(model, blocks)
        if _rounded(every * sparsity) >= every:
            most = self.max_sparsity(model, blocks)
            raise InputError(
                f"`pruning.sparsity` must be at most {most:.4g} for Depth, got {sparsity:g}: one of {every} blocks "
                "remains."
            )
        if len(blocks) > 1:
            check_renumbering(model, blocks[0].path_of_list)
        if self.refit:
            check_refit(model, blocks)
        if (offload := on_disk(model)) is not None and offload.files:
            raise InputError(
                "`model.on_disk` must be false for Depth after another cut in the same process: save the model first, "
                "and open that."
            )

    def check_rates(
        self, model: PreTrainedModel, blocks: Sequence[Block], allocation: Allocation, sparsity: float
    ) -> None:
        """Raises InputError for rates that do not tell which blocks can go, or that choose where neighbours must go."""
        if self.contiguous and not allocation.is_uniform():
            raise InputError(
                "`pruning.allocation` must be Uniform for Depth with `contiguous`, which chooses the blocks by itself, "
                f"got {type(allocation).__name__}."
            )
        if not (allocation.ranks_blocks or allocation.is_uniform()):
            raise InputError(
                f"`pruning.allocation` must be Uniform, LayerRedundancy or Plan for Depth, got "
                f"{type(allocation).__name__}, whose rates are for weights and do not tell which whole blocks can go: "
                "pass `--pruning.allocation Uniform`."
            )

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the number of blocks of the dense model, for every block: all have the same size."""
        return [_dense_blocks(model, blocks)] * len(blocks)

    def current_rates(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[float]:
        """Returns the share of blocks that earlier cuts removed, for every block, whose mean it is."""
        return [_share(len(blocks), _dense_blocks(model, blocks))] * len(blocks)

    def max_sparsity(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns the share of blocks whose removal leaves one."""
        every = _dense_blocks(model, blocks)
        return (every - 1) / every

    def bounds(self, least: float, most: float) -> tuple[float, float]:
        """Returns 0 and 1; raises InputError for bounds that the user changed."""
        if least > 0 or most < MAX_RATE:
            raise InputError(
                f"`pruning.min_rate` must be 0 and `pruning.max_rate` at least {MAX_RATE} for Depth, by which a block "
                f"goes or stays, got {least:g} and {most:g}."
            )
        return 0.0, 1.0

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns 1 for the blocks with the highest rates, and for others the share that was removed before.

        Equal rates are rounded to whole blocks: :meth:`apply` then chooses. Rates of [0.5, 0.1, 0.4] become [1, 0, 0].
        """
        left, every = len(rates), sizes[0]
        count = min(left - 1, max(0, _rounded(left - every * (1 - sum(rates) / left))))
        if max(rates) - min(rates) < TOLERANCE:
            return [_share(left - count, every)] * left
        highest = sorted(range(left), key=lambda block: -rates[block])[:count]
        return [1.0 if block in highest else _share(left, every) for block in range(left)]

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
        """Returns the share of blocks that have ``share`` of the parameters before all cuts by this method.

        If 10 blocks have 80 of 100 parameters, 0.16 of all parameters are 2 blocks, a share of 0.2. Which go is not
        known yet, so that of blocks that differ each counts with the mean of their parameters.
        """
        sizes = [parameters(block.module) for block in blocks]
        if len(set(sizes)) > 1:
            log(
                f"Depth counts blocks of {min(sizes):,} to {max(sizes):,} parameters as equal: what remains depends on "
                "which go. With `Shrink` and MLPWidth as another part, the size is met.",
                once=True,
            )
        return rate_of_share(
            share,
            [sum(sizes) + _gone(model, blocks)],
            self.full_parameters(model, blocks),
            lower=[sum(lower) / len(lower)],
            upper=min(upper, self.max_sparsity(model, blocks)),
            slack=slack,
            bounds="earlier cuts and the block that remains at least allow for the blocks",
        )

    def coverage(self, model: PreTrainedModel, blocks: Sequence[Block]) -> tuple[float, float]:
        """Returns 1 and 0: the blocks alone go."""
        return 1.0, 0.0

    def full_parameters(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int:
        """Returns the number of parameters before all cuts by this method, if blocks had what those left have now."""
        return parameters(model) + _gone(model, blocks)

    def rounding(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns half a block as a share of the blocks of the dense model."""
        return 0.5 / _dense_blocks(model, blocks)

    def size_multiple(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int:
        """Returns 0, a multiple of every number: no weight changes its size."""
        return 0

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
        """Removes the blocks with a rate of 1, or as many as equal rates amount to; see :meth:`Method.apply`."""
        every = _dense_blocks(model, blocks)
        removed = self._chosen(rates, every, blocks, stream)
        if removed:
            log(f"Removing {len(removed)} of {len(blocks)} blocks: {spans(removed)} (the first is 0).")
        if removed and self.refit:
            self._refit(model, blocks, removed, stream)
        _remove(model, blocks, removed)
        return [1.0 if block.index in removed else _share(len(blocks), every) for block in blocks]

    def _chosen(
        self, rates: Sequence[float], every: int, blocks: Sequence[Block], stream: Callable[[], Stream]
    ) -> list[int]:
        """Returns the numbers of the blocks to remove, in order."""
        if max(rates) - min(rates) >= TOLERANCE:
            return [block for block, rate in enumerate(rates) if rate == 1]
        count = len(blocks) - _rounded(every * (1 - rates[0]))
        if not count:
            return []
        if self.contiguous:
            by_gap = distances(stream(), blocks, count)
            begin = by_gap.index(min(by_gap))
            return list(range(begin, begin + count))
        by_block = distances(stream(), blocks, 1)
        return sorted(sorted(range(len(blocks)), key=lambda block: by_block[block])[:count])

    def _refit(
        self, model: PreTrainedModel, blocks: Sequence[Block], removed: Sequence[int], stream: Callable[[], Stream]
    ) -> None:
        gaps = [gap for gap in runs_of(removed) if gap[0] > 0]
        if removed[0] == 0:
            log(
                f"Nothing makes up for {_nouns(runs_of(removed)[0])} {spans(runs_of(removed)[0])}: no MLP comes before."
            )
        kept = [block.index for block in blocks if block.index not in removed]
        path = blocks[0].path_of_list
        # a block on disk that changes is saved under its new number
        numbered = [
            replace(block, path=f"{path}.{kept.index(block.index)}") if block.index in kept else block
            for block in blocks
        ]
        refit(model, numbered, gaps, stream(), self.damping)


def _remove(model: PreTrainedModel, blocks: Sequence[Block], removed: Sequence[int]) -> None:
    """Removes blocks from ``model`` and adds this to its record."""
    earlier, path = structure.find_structure(model, RemainingBlocks), blocks[0].path_of_list
    kept = [block.index for block in blocks if block.index not in removed]
    numbers = range(len(blocks)) if earlier is None else earlier.remaining
    remaining = RemainingBlocks([numbers[block] for block in kept], _dense_blocks(model, blocks), path)
    drop_blocks(model, path, kept)
    structure.keep_blocks(model, remaining, kept)


def _gone(model: PreTrainedModel, blocks: Sequence[Block]) -> int:
    """Returns the number of parameters that the blocks which earlier cuts removed would have, as those left have them.

    Other cuts in between have made these smaller: by their own sizes, those removed would count as more blocks.
    """
    in_blocks = sum(parameters(block.module) for block in blocks)
    return round((_dense_blocks(model, blocks) - len(blocks)) * in_blocks / len(blocks))


def _dense_blocks(model: PreTrainedModel, blocks: Sequence[Block]) -> int:
    earlier = structure.find_structure(model, RemainingBlocks)
    return len(blocks) if earlier is None else earlier.blocks


def _share(left: int, every: int) -> float:
    """Returns the share of blocks that are gone."""
    return (every - left) / every


def _rounded(number: float) -> int:
    return math.floor(number + 0.5 + TOLERANCE)


def _nouns(numbers: Sequence[int]) -> str:
    return "block" if len(numbers) == 1 else "blocks"
