"""Slicing: SliceGPT (ICLR 2024, arXiv 2401.15024) with a width of its own for every block.

With LayerRedundancy as the allocation it is *Change Is the Only Constant* (EMNLP Findings 2024, arXiv 2411.03513),
with Uniform it is SliceGPT.
Suffixes: B batch, T tokens, D full width of the stream, K dimensions kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, Allocation, Search
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream, on_device
from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.models.families import Block, CustomClass, find_blocks
from lit_prune.models.remote_code.modeling_sliced import (
    SlicedLayer,
    Step,
    convert_to_sliced,
    replace_norm,
    sliced_class,
    untied_head,
)
from lit_prune.models.structure import add_structure
from lit_prune.progress import log, track
from lit_prune.pruning.base import Method, Propagate
from lit_prune.reconstruct.reconstruction import Reconstruction
from lit_prune.search.divergence import kl_of_sliced_head
from lit_prune.search.trial import Trial, model_on_device
from lit_prune.slice.rotate import Covariance, centred, embed_along, project, read_along, write_along
from lit_prune.slice.sizes import check_multiple, rates_from_sizes, sizes_from_rates
from lit_prune.slice.sliceable import check_sliceable
from lit_prune.slice.slices import Slices
from lit_prune.slice.trial import SlicedTrial


@final
@dataclass(frozen=True)
class Slicing(Method):
    """Rotates the residual stream onto its principal axes, block by block, and drops the least of them.

    The rate of a block is the share of the stream's dimensions that it does not read. A rate of 0.25 is a share of
    dimensions, not of parameters: every block gains one or two shortcut matrices, and a tied head becomes untied.
    Calibration runs every block once: the output of each half of a block is computed in full width, and its projection
    onto its own principal axes is the input of the next half.

    Args:
        multiple: Number of which every width is a multiple; 8 and more are fast on GPUs.
        slice_head: Also slice the input of the head, by the mean rate.

    Raises:
        InputError: for a multiple below 1.
    """

    multiple: int = 8
    slice_head: bool = False

    chooses_linears: ClassVar[bool] = False
    needs_text: ClassVar[bool] = True
    changes_shapes: ClassVar[bool] = True
    supports_search: ClassVar[bool] = True
    propagate: ClassVar[Propagate] = "pruned"  # type: ignore[misc]

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise InputError(f"`Slicing.multiple` must be at least 1, got {self.multiple}.")

    @classmethod
    def default_allocation(cls) -> type[Allocation]:
        """Returns DLP, which ranks the blocks of a sliced model nearly as well as LayerRedundancy does."""
        return DLP

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises InputError for a model that cannot be sliced."""
        check_sliceable(model)

    def check(self, model: PreTrainedModel, blocks: Sequence[Block], sparsity: float) -> None:
        """Raises InputError if the model cannot be sliced by ``sparsity``, or in multiples of ``multiple``."""
        width = model.config.hidden_size
        check_multiple(self.multiple, width)
        if sparsity > (most := self.max_rate(model, blocks)):
            raise InputError(
                f"`pruning.sparsity` must be at most {most:.4g} for Slicing, got {sparsity:g}: every block "
                f"keeps one `multiple` ({self.multiple}) of {width} dimensions."
            )

    def check_rates(
        self, model: PreTrainedModel, blocks: Sequence[Block], allocation: Allocation, sparsity: float
    ) -> None:
        """Raises InputError for a search by the divergence, if the head is sliced."""
        if self.slice_head and isinstance(allocation, Search) and allocation.loss == "kl":
            raise kl_of_sliced_head()

    def custom_class(self, allocation: Allocation) -> CustomClass:
        """Returns `sliced`."""
        return "sliced"

    def repeats(self) -> bool:
        """Returns False: a model can be sliced only once."""
        return False

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the width of the stream for each block."""
        return [model.config.hidden_size] * len(blocks)

    def size_multiple(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int:
        """Returns the number of which every width is a multiple."""
        return self.multiple

    def max_rate(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns the rate that leaves one multiple."""
        return 1 - self.multiple / model.config.hidden_size

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns the rates rounded so that every width is a multiple."""
        return rates_from_sizes(sizes_from_rates(rates, sizes[0], self.multiple), sizes[0])

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
        """Slices the blocks in order and returns their rates; see :meth:`Method.apply`."""
        full, before, tied = model.config.hidden_size, parameters(model), model.config.tie_word_embeddings
        widths = self._widths(rates, full)
        self._slice(model, blocks, stream(), widths, device, "Slicing blocks")
        add_structure(model, Slices(widths, untied_head=tied))
        _log_changes(model, before, tied)
        return rates_from_sizes(widths[:-1], full)

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
        """Yields a trial on a copy of ``model``, rotated at full width, which doubles its memory; see SlicedTrial."""
        full, rotated = model.config.hidden_size, copy.deepcopy(model)
        copied = find_blocks(rotated)
        stream = Stream(rotated, copied, batches, device)
        self._slice(rotated, copied, stream, [full] * (len(copied) + 1), device, "Rotating blocks")
        with model_on_device(rotated, device):
            yield SlicedTrial(rotated, batches, [self.multiple] * len(blocks), lambda rates: self._widths(rates, full))

    def _widths(self, rates: Sequence[float], full: int) -> list[int]:
        """The width that each block reads, then the width that the head reads."""
        head = sizes_from_rates([sum(rates) / len(rates)], full, self.multiple)[0] if self.slice_head else full
        return [*sizes_from_rates(rates, full, self.multiple), head]

    @torch.no_grad()
    def _slice(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        stream: Stream,
        widths: Sequence[int],
        device: torch.device,
        label: str,
    ) -> None:
        """Rotates and slices the blocks in order, in place."""
        slicing_pass = _SlicingPass(model, stream)
        slicing_pass.slice_embeddings(widths[0])
        for block, width, following in zip(track(blocks, label), widths[:-1], widths[1:], strict=True):
            with on_device(block, device, changes=True):
                keeps_width = block is blocks[-1] and not self.slice_head
                slicing_pass.slice_block(block, width, None if keeps_width else following)
        slicing_pass.fuse_final_norm()
        convert_to_sliced(model, widths)


class _SlicingPass:
    """One pass through a model that is being sliced, with the calibration stream and the axes that it keeps."""

    def __init__(self, model: PreTrainedModel, stream: Stream) -> None:
        self.model, self.stream = model, stream
        self.layer_class = sliced_class(model).layer_class
        self.layout = self.layer_class.layout
        self.full: int = model.config.hidden_size
        self.centre = isinstance(model.get_submodule(self.layout.final_norm), nn.LayerNorm)
        self.axes_DK: Tensor | None = None

    def slice_embeddings(self, width: int) -> None:
        """Rotates and slices the embeddings and their output."""
        covariance = Covariance()

        def add_to_covariance(index: int, x_BTD: Tensor) -> Tensor:
            x_BTD = centred(x_BTD) if self.centre else x_BTD
            covariance.update(self.stream.unmasked(index, x_BTD))
            return x_BTD

        self.stream.map(add_to_covariance)
        axes_DK = covariance.principal_axes()[:, :width]
        for name in self.layout.embeddings:
            embed_along(self.model.get_submodule(name), axes_DK, centre=self.centre)
        self._project(axes_DK)

    def slice_block(self, block: Block, width: int, following: int | None) -> None:
        """Turns ``block`` into a sliced layer, and advances the stream by it.

        Args:
            block: The block that the stream is in front of, on the stream's device.
            width: Width that the block reads.
            following: Width that it writes; None is the full width, along the original axes.
        """
        block.module.__class__ = self.layer_class
        for step in self.layout.steps:
            self._slice_step(block, step, following if step is self.layout.steps[-1] else width)

    def _slice_step(self, block: Block, step: Step, width: int | None) -> None:
        """Makes a step read along the axes of the stream and write along the principal axes of its own output."""
        layer, axes_DK = block.module, self.axes_DK
        assert isinstance(layer, SlicedLayer)
        assert axes_DK is not None
        norm = replace_norm(layer, step.norm, self.full)
        for name in step.readers:
            read_along(layer.get_submodule(name), norm, axes_DK)
        layer.set_shortcut(step, axes_DK.T)  # to the full width, as the axes are those of the whole output
        covariance = Covariance()

        def run_step(index: int, x_BTK: Tensor, **kwargs: Any) -> Tensor:
            y_BTD = layer.take(step, x_BTK, **kwargs)
            y_BTD = centred(y_BTD) if self.centre else y_BTD
            if width is not None:
                covariance.update(self.stream.unmasked(index, y_BTD))
            return y_BTD

        self.stream.map(run_step, block)
        out_DK = None if width is None else covariance.principal_axes()[:, :width]
        for name in step.writers:
            write_along(layer.get_submodule(name), out_DK, centre=self.centre)
        if out_DK is not None:
            layer.set_shortcut(step, axes_DK.T @ out_DK)
        self._project(out_DK)

    def _project(self, axes_DK: Tensor | None) -> None:
        """Projects the stream onto ``axes_DK``; None leaves it unchanged."""
        self.axes_DK = axes_DK
        if axes_DK is not None:
            self.stream.map(lambda _index, x_BTD: project(x_BTD, axes_DK))

    def fuse_final_norm(self) -> None:
        """Fuses the final norm into the head, whose weight is untied from the embedding."""
        head = untied_head(self.model)
        read_along(head, replace_norm(self.model, self.layout.final_norm, self.full), self.axes_DK)


def _log_changes(model: PreTrainedModel, before: int, tied: bool) -> None:
    """Logs that the head was untied, and warns if the model has grown."""
    after, head = parameters(model), model.get_output_embeddings().weight.numel()
    if tied:
        log(f"The head was tied to the embedding; a sliced model has a head of its own, {head:,} parameters more.")
    if after > before:
        log(
            f"Warning: slicing made the model bigger, from {before:,} to {after:,} parameters "
            f"({after / before - 1:+.1%}): its shortcuts and its head weigh more than what was cut. Slice more, or "
            "use masks."
        )
