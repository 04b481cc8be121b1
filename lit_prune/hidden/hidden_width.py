"""HiddenWidth: fewer dimensions of the residual stream, the same ones everywhere.

Suffixes: B batch, T tokens, O outputs, D full width of the stream, K dimensions that stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.allocate.base import Allocation
from lit_prune.allocate.budget import rate_of_share
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream, on_device
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.hidden.activation import last_outputs, mean_activation, most_active
from lit_prune.hidden.moments import Moments, compensation, scale_of_norm, scales_for_tied_head
from lit_prune.hidden.size import HiddenSize
from lit_prune.hidden.stream_width import (
    LAYOUTS,
    layout_of,
    narrow_ends,
    narrow_layer,
    parameters_of_a_dimension,
    set_width,
    stream_fields,
)
from lit_prune.models import structure
from lit_prune.models.families import Block, dense_family
from lit_prune.models.remote_code.modeling_sliced import Layout, SlicedCausalLM, Step
from lit_prune.progress import track
from lit_prune.pruning.base import Method, Propagate
from lit_prune.reconstruct.reconstruction import Reconstruction
from lit_prune.shrink.units.narrow import config_error
from lit_prune.shrink.units.sizes import check_multiple, units_from_rates


@final
@dataclass(frozen=True)
class HiddenWidth(Method):
    """Removes the dimensions of the residual stream that are least active, the same in the whole model.

    The activation of a dimension is the mean of |n(x)_d| over tokens and the norms n of all blocks (Minitron, arXiv
    2407.14679). Embedding, norms and head lose its entries, the linears that read the stream a column, those that write
    it a row. A plain model of the family remains, with a smaller `hidden_size` and an explicit `head_dim`.

    An RMS norm over fewer dimensions has another scale. The weight of each norm is multiplied by the factor that brings
    its outputs m, behind the blocks that are already narrow, closest to those of the same dimensions in the unpruned
    model. With ``compensate``, the linears behind the norm also make up for the outputs that are gone: their weight W
    becomes W M, with M the least squares solution of n(x) = M m. A head that is tied to the embedding cannot; there
    every entry of the last norm gets a factor of its own. Calibration runs every block about five times.

    Args:
        multiple: Number of which the width is a multiple.
        damping: Share of the mean of the Gram matrix's diagonal that is added to it.
        compensate: Whether the linears that read the stream make up for what is removed.

    Raises:
        InputError: for a multiple below 1, or a damping that is not positive.
    """

    multiple: int = 64
    damping: float = 0.01
    compensate: bool = True

    chooses_linears: ClassVar[bool] = False
    needs_text: ClassVar[bool] = True
    changes_shapes: ClassVar[bool] = True
    supports_parameters: ClassVar[bool] = True
    can_be_part: ClassVar[bool] = True
    place: ClassVar[int] = -1
    fewer: ClassVar[frozenset[str]] = frozenset({"dimensions"})
    for_fewer: ClassVar[str] = "Shrink removes blocks too: [Depth, MLPWidth, HiddenWidth] as its `parts`"
    propagate: ClassVar[Propagate] = "pruned"  # type: ignore[misc]

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise InputError(f"`HiddenWidth.multiple` must be at least 1, got {self.multiple}.")
        if not self.damping > 0:
            raise InputError(f"`HiddenWidth.damping` must be greater than 0, got {self.damping}.")

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises InputError for a sliced or masked model, and families whose stream cannot be made narrower."""
        family = dense_family(model.config)
        if isinstance(model, SlicedCausalLM):
            raise InputError("`model` must not be sliced for HiddenWidth: shrink the dense model, then slice that.")
        if family not in LAYOUTS:
            raise InputError(
                f"`pruning.method` HiddenWidth cannot shrink the family {family!r}: it supports families whose blocks "
                f"read the residual stream through RMS norms alone, {', '.join(LAYOUTS)}."
            )
        if structure.masked(model):
            raise InputError(
                "`model` must not have masks for HiddenWidth, which would fill their zeros: shrink the dense model, "
                "then mask the shrunk one."
            )

    def check(self, model: PreTrainedModel, blocks: Sequence[Block], sparsity: float) -> None:
        """Raises InputError if ``sparsity`` leaves no dimension, or the config accepts no multiple of ``multiple``."""
        width = model.config.get_text_config().hidden_size
        fields = stream_fields(model.config.get_text_config(), self.multiple)
        check_multiple("HiddenWidth", self.multiple, self._full(model), "dimensions of the residual stream")
        if self.multiple < width and (reason := config_error(model.config.get_text_config(), fields)):
            heads = model.config.get_text_config().num_attention_heads
            raise InputError(
                f"`HiddenWidth.multiple` must give widths that the config accepts, got {self.multiple}: {reason} "
                f"Choose a multiple of the number of attention heads, {heads}."
            )
        if sparsity > (most := self.max_rate(model, blocks)) + 1e-9:
            raise InputError(
                f"`pruning.sparsity` must be at most {most:.4g} for HiddenWidth, got {sparsity:g}: the stream keeps "
                f"{self.multiple} (`multiple`) of {self._full(model)} dimensions."
            )

    def check_rates(
        self, model: PreTrainedModel, blocks: Sequence[Block], allocation: Allocation, sparsity: float
    ) -> None:
        """Raises InputError unless every block gets the same rate."""
        if not allocation.is_uniform():
            raise InputError(
                f"`pruning.allocation` must be Uniform for HiddenWidth, got {type(allocation).__name__}: the residual "
                "stream has one width. Slicing gives every block its own."
            )

    def sizes_in_config(
        self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]
    ) -> dict[str, int]:
        """Returns the width that is left, and the size of a head."""
        return stream_fields(model.config.get_text_config(), self._width(rates, self._full(model)))

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the width of the stream of the dense model for each block."""
        return [self._full(model)] * len(blocks)

    def current_rates(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[float]:
        """Returns the share of dimensions that earlier cuts have removed."""
        full = self._full(model)
        return [(full - model.config.get_text_config().hidden_size) / full] * len(blocks)

    def max_rate(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns the rate that leaves one multiple."""
        return max(0.0, 1 - self.multiple / self._full(model))

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns the rates rounded so that the width is a multiple."""
        return [(full - self._width(rates, full)) / full for full in sizes]

    def size_multiple(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int:
        """Returns the number of which the width is a multiple."""
        return self.multiple

    def rounding(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns half a multiple as a share of the width of the dense model."""
        return self.multiple / 2 / self._full(model)

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
        """Returns the rate at which ``share`` goes of the parameters before all cuts by this method."""
        return rate_of_share(
            share,
            [self._full(model) * parameters_of_a_dimension(model)],
            self.full_parameters(model, blocks),
            lower=[max(lower)],
            upper=upper,
            slack=slack,
            bounds="`pruning.min_rate`, `pruning.max_rate`, `multiple` and earlier cuts allow for the residual stream",
        )

    def coverage(self, model: PreTrainedModel, blocks: Sequence[Block]) -> tuple[float, float]:
        """Returns the share of all parameters that have the width of the stream, which is almost 1, twice."""
        share = model.config.get_text_config().hidden_size * parameters_of_a_dimension(model) / parameters(model)
        return share, share

    def full_parameters(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int:
        """Returns the number of parameters before all cuts by this method."""
        gone = self._full(model) - model.config.get_text_config().hidden_size
        return parameters(model) + gone * parameters_of_a_dimension(model)

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
        """Makes the stream narrower; see :meth:`Method.apply`."""
        config, full = model.config.get_text_config(), self._full(model)
        width = min(self._width(rates, full), config.hidden_size)
        if width < config.hidden_size:
            layout, dense = layout_of(model), stream()
            kept_K = most_active(mean_activation(dense.copy(), blocks, layout, device), width)
            narrowing = _Narrowing(self, layout, dense, kept_K)
            for block in track(blocks, "Shrinking blocks"):
                with on_device(block, device, changes=True):
                    narrowing.narrow_block(block, config)
            narrowing.narrow_ends(model)
            set_width(model, width)
        structure.add_structure(model, HiddenSize(width, full, len(blocks)))
        return [(full - width) / full] * len(blocks)

    def _width(self, rates: Sequence[float], full: int) -> int:
        return units_from_rates(rates[:1], [full], self.multiple)[0]

    def _full(self, model: PreTrainedModel) -> int:
        """The width of the dense model."""
        recorded = structure.find_structure(model, HiddenSize)
        width: int = model.config.get_text_config().hidden_size
        return width if recorded is None else recorded.full


class _Narrowing:
    """One pass through a model whose stream becomes narrower, with the streams of the unpruned and the narrow model."""

    def __init__(self, method: HiddenWidth, layout: Layout, dense: Stream, kept_K: Tensor) -> None:
        self.method, self.layout, self.kept_K = method, layout, kept_K
        self.dense, self.narrow = dense, dense.copy()
        self.narrow.hidden = [x_BTD[..., kept_K.to(x_BTD.device)] for x_BTD in dense.hidden]

    def narrow_block(self, block: Block, config: Any) -> None:
        """Makes a block narrower, in place, and advances both streams by it."""
        dense = replace(block, module=copy.deepcopy(block.module))
        narrow_layer(block.module, self.layout, self.kept_K, config, block.index)
        for step in self.layout.steps:
            moments = self._moments(dense, block, step)
            matrix_DK = self._scale(block.module.get_submodule(step.norm), moments)
            for name in step.readers:
                dense_linear: Any = dense.module.get_submodule(name)
                _read(block.module.get_submodule(name), dense_linear.weight, matrix_DK)
        self.dense.run(dense)
        self.narrow.run(block)

    def narrow_ends(self, model: PreTrainedModel) -> None:
        """Makes embedding, last norm and head narrower, in place."""
        norm: Any = model.get_submodule(self.layout.final_norm)
        embedding: Any = model.get_submodule(self.layout.embeddings[0])
        head: Any = model.get_output_embeddings()
        embedding_ND, head_ND, dense_norm = embedding.weight, head.weight, copy.deepcopy(norm)
        narrow_ends(model, self.layout, self.kept_K)
        moments = self._new_moments()
        for index, (x_BTD, x_BTK) in enumerate(zip(self.dense.hidden, self.narrow.hidden, strict=True)):
            full_PD = self.dense.unmasked(index, dense_norm(x_BTD))
            moments.update(full_PD, self.narrow.unmasked(index, norm(x_BTK)))
        moments = moments.mean()
        matrix_DK = self._scale(norm, moments)
        if head_ND is not embedding_ND:
            _read(head, head_ND, matrix_DK)
        elif matrix_DK is not None:
            scaled = moments.scaled(scale_of_norm(moments, self.kept_K))
            scales_K = scales_for_tied_head(scaled, self.kept_K, embedding_ND, self.method.damping)
            norm.weight.mul_(scales_K.to(norm.weight))

    def _moments(self, dense: Block, narrow: Block, step: Step) -> Moments:
        """The moments of the outputs of a norm in the unpruned block and in the narrow one."""
        moments, first = self._new_moments(), step is self.layout.steps[0]
        norms = {"dense": dense.module.get_submodule(step.norm), "narrow": narrow.module.get_submodule(step.norm)}
        with last_outputs(norms) as outputs:
            for index in range(len(self.dense.hidden)):
                # the first norm reads the stream itself, so that the rest of the block need not run
                self.dense.output(index, dense, _only(norms["dense"]) if first else None)
                self.narrow.output(index, narrow, _only(norms["narrow"]) if first else None)
                full_PD = self.dense.unmasked(index, outputs["dense"])
                moments.update(full_PD, self.narrow.unmasked(index, outputs["narrow"]))
        return moments.mean()

    def _new_moments(self) -> Moments:
        return Moments(self.dense.hidden[0].shape[-1], len(self.kept_K))

    def _scale(self, norm: nn.Module, moments: Moments) -> Tensor | None:
        """Scales the weight of a norm, and returns the matrix by which the linears behind it make up for the rest."""
        scale = scale_of_norm(moments, self.kept_K)
        norm.weight.mul_(scale)  # type: ignore[operator]
        return compensation(moments.scaled(scale), self.kept_K, self.method.damping) if self.method.compensate else None


def _read(linear: Any, dense_OD: Tensor, matrix_DK: Tensor | None) -> None:
    """Gives a linear of the narrow model the weight W M, W being its weight in the unpruned one."""
    if matrix_DK is not None:
        device = torch.device("cpu") if dense_OD.device.type == "mps" else dense_OD.device
        parts = [part.to(device).double() @ matrix_DK.to(device) for part in dense_OD.split(8192)]
        linear.weight.copy_(torch.cat(parts))


def _only(norm: nn.Module) -> Callable[..., Tensor]:
    """Returns a function that calls a norm in the place of the block."""
    return lambda x_BTD, *_args, **_kwargs: norm(x_BTD)
