"""Experts: fewer experts in every mixture, by REAP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.allocate.base import Allocation
from lit_prune.calibration.stream import Stream
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.experts.counts import ExpertCounts
from lit_prune.experts.mixture import (
    Mixture,
    NoMixture,
    count_experts,
    keep_experts,
    mixture_of,
    parameters_of_an_expert,
)
from lit_prune.experts.router import fewest_experts, groups_of_router, picked_experts
from lit_prune.experts.saliency import saliency, salient_experts
from lit_prune.models import structure
from lit_prune.models.families import Block, dense_family
from lit_prune.models.remote_code.modeling_shrunk import LayerConfig
from lit_prune.shrink.part_method import PartCut, PartMethod, cannot_shrink
from lit_prune.shrink.units.sizes import check_multiple, units_from_rates


@final
@dataclass(frozen=True)
class Experts(PartMethod):
    """Removes the experts that add least to the outputs of their mixture, everywhere as many.

    The saliency of expert j is the mean over the tokens that are routed to it of g_j * |f_j(x)|_2, with the router's
    weight g_j and the expert's output f_j(x) behind the blocks that are already shrunk (REAP, arXiv 2510.13999). An
    expert that is never chosen goes first. The router loses its rows and biases; the other weights stay as they are.
    What remains is a plain model of the family with a smaller `num_experts` (`num_local_experts`, `n_routed_experts`).

    Args:
        multiple: Number of which the number of experts is a multiple, unless all are kept.

    Raises:
        InputError: for a multiple below 1.
    """

    multiple: int = 1

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise InputError(f"`Experts.multiple` must be at least 1, got {self.multiple}.")

    def check(self, model: PreTrainedModel, blocks: Sequence[Block], sparsity: float) -> None:
        """Raises InputError if ``model`` has no mixtures, or ``sparsity`` leaves its router too few experts."""
        config = model.config.get_text_config()
        family, mixtures = dense_family(model.config), _mixtures(model, blocks)
        counts = {mixture.count for mixture in mixtures if mixture is not None}
        if not counts:
            raise InputError(
                f"`pruning.method` Experts needs a mixture of experts; the family {family!r} has none: use MLPWidth, "
                "which removes channels of its MLPs."
            )
        if len(counts) > 1:
            raise cannot_shrink(model, "Experts", f"its mixtures have different numbers of experts, {sorted(counts)}")
        if not (picked := _picked(blocks)):
            raise cannot_shrink(model, "Experts", "its routers do not say how many experts they pick")
        if self.multiple % (groups := groups_of_router(config)):
            raise InputError(
                f"`Experts.multiple` must be a multiple of {groups} for the family {family!r}, whose router "
                f"picks from {groups} groups of experts (`n_group`), got {self.multiple}."
            )
        full = max(self.sizes(model, blocks))
        check_multiple("Experts", self.multiple, full, "experts of a mixture")
        if sparsity > (most := self.max_rate(model, blocks)) + 1e-9:
            raise InputError(
                f"`pruning.sparsity` must be at most {most:.4g} for Experts, got {sparsity:g}: every mixture keeps "
                f"{fewest_experts(config, picked, self.multiple)} of {full} experts, since "
                f"the router picks {picked} for a token."
            )

    def check_rates(
        self, model: PreTrainedModel, blocks: Sequence[Block], allocation: Allocation, sparsity: float
    ) -> None:
        """Raises InputError unless every block with a mixture gets the same rate."""
        planned = allocation.planned_rates(len(blocks)) or []
        of_mixtures = {rate for rate, count in zip(planned, self.sizes(model, blocks), strict=False) if count}
        if not allocation.is_uniform() and len(of_mixtures) != 1:
            raise InputError(
                f"`pruning.allocation` must be Uniform for Experts, got {type(allocation).__name__}: the config "
                "has one number of experts for all blocks."
            )

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the number of experts of each block of the dense model, 0 for a block without a mixture."""
        recorded = structure.find_structure(model, ExpertCounts)
        counts = [count_experts(block.module) for block in blocks]
        return counts if recorded is None else [recorded.full if count else 0 for count in counts]

    def current_rates(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[float]:
        """Returns the share of experts that each block has lost in earlier cuts."""
        recorded = structure.find_structure(model, ExpertCounts)
        return [
            (recorded.full - recorded.experts) / recorded.full if recorded and full else 0.0
            for full in self.sizes(model, blocks)
        ]

    def max_rate(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns the rate that leaves as many experts as the router needs."""
        config = model.config.get_text_config()
        most = max(self.sizes(model, blocks))
        return max(0.0, 1 - fewest_experts(config, _picked(blocks), self.multiple) / most) if most else 0.0

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Returns the rates rounded so that the number of experts is a multiple; 0 for blocks without a mixture."""
        count = self._count(rates, sizes)
        return [(full - count) / full if full else 0.0 for full in sizes]

    def size_multiple(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int:
        """Returns the number of which the number of experts is a multiple."""
        return self.multiple

    @property
    def limits_of_share(self) -> str:
        """What bounds the share of all parameters that can go, and of which part of the model, for an error."""
        return "`pruning.min_rate`, `pruning.max_rate`, the router and earlier cuts allow for the experts"

    def removable(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the number of parameters that all experts of each block of the dense model have."""
        mixtures, full = _mixtures(model, blocks), self.sizes(model, blocks)
        return [
            0 if mixture is None else number * parameters_of_an_expert(block.module, mixture)
            for block, mixture, number in zip(blocks, mixtures, full, strict=True)
        ]

    def full_parameters(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int:
        """Returns the number of parameters before all cuts by this method."""
        current, in_experts = max(self.current_rates(model, blocks)), sum(self.removable(model, blocks))
        return parameters(model) + round(current * in_experts)

    def rounding(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns half a multiple as a share of the experts of a block of the dense model."""
        return self.multiple / 2 / max(1, *self.sizes(model, blocks))

    def begin(
        self, model: PreTrainedModel, blocks: Sequence[Block], *, rates: Sequence[float], stream: Stream
    ) -> ExpertCut:
        """Returns the cut that leaves every mixture the experts of its rate; see :meth:`PartMethod.begin`."""
        full = self.sizes(model, blocks)
        return ExpertCut(model, blocks, _mixtures(model, blocks), self._count(rates, full), full)

    def _count(self, rates: Sequence[float], sizes: Sequence[int]) -> int:
        """The number of experts that every mixture keeps."""
        rate, full = next((rate, full) for rate, full in zip(rates, sizes, strict=True) if full)
        return units_from_rates([rate], [full], self.multiple)[0]


class ExpertCut(PartCut):
    """The cut that leaves every mixture so many experts.

    Args:
        model: The causal LM.
        blocks: Its blocks.
        mixtures: Their mixtures; None for a block without one.
        count: Number of experts that every mixture keeps.
        full: Number of experts of each block of the dense model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        mixtures: Sequence[Mixture | None],
        count: int,
        full: Sequence[int],
    ) -> None:
        self.model, self.blocks, self.mixtures, self.count, self.full = model, blocks, mixtures, count, full

    def cut(self, block: Block, config: Any, stream: Stream, targets: Sequence[Tensor] | None) -> LayerConfig | None:
        """Removes experts of one block, in place; see :meth:`PartCut.cut`."""
        mixture = self.mixtures[block.index]
        if mixture is None or self.count >= mixture.count:
            return None
        kept_E = salient_experts(saliency(stream, block, mixture), self.count, groups_of_router(config))
        return keep_experts(block.module, mixture, kept_E, config, block.index)

    def finish(self) -> list[float]:
        """Records the number of experts in the model, and returns the share that each block has lost."""
        kept, path = max(mixture.count for mixture in self.mixtures if mixture), self.blocks[0].path_of_list
        counts = ExpertCounts(kept, max(self.full), path)
        counts.adopt(self.model)
        structure.add_structure(self.model, counts)
        return [counts.describe(self.model).achieved if number else 0.0 for number in self.full]


def _mixtures(model: PreTrainedModel, blocks: Sequence[Block]) -> list[Mixture | None]:
    config = model.config.get_text_config()
    try:
        return [mixture_of(block.module, config, block.index) for block in blocks]
    except NoMixture as reason:
        raise cannot_shrink(model, "Experts", str(reason)) from reason


def _picked(blocks: Sequence[Block]) -> int:
    """The number of experts that the routers pick for a token; 0 if they do not say."""
    return max(picked_experts(block.module) for block in blocks)
