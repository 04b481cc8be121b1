"""What is removed from a model, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.allocate import DLP, Allocation, Uniform, allocate
from lit_prune.allocate.base import TOLERANCE, weighted_mean
from lit_prune.allocate.budget import Budget, Limits, sparsity_of_linears
from lit_prune.errors import InputError
from lit_prune.models.families import Block, find_blocks
from lit_prune.models.on_disk import on_disk
from lit_prune.prune import Method, Wanda


@dataclass(frozen=True)
class Recipe:
    """What is to be removed, and how.

    Args:
        method: What makes the blocks smaller, such as masks or slices.
        sparsity: Share to remove, mean over the blocks, in [0, 1): of the linears' weights, of the dimensions, or of
            whatever else the method removes.
        allocation: How blocks are scored, and how the sparsity is spread over them.
        min_rate: Least share that any block gives.
        max_rate: Greatest share that any block gives.
        targets: Name suffixes or regular expressions of the linears to prune; None takes all in the blocks.
        ignore: Suffixes or regular expressions of linears to leave alone.
        blocks: Dotted path of the decoder layers, for a family that is not known.
        budget: What `sparsity` is a share of: `linears`, the weights that are pruned, or `parameters`, all parameters
            of the model, tied weights counted once. Embeddings are parameters that no mask is put on, so that the
            linears give more than that share.

    Raises:
        InputError: for a number out of its range, linears chosen for a method that takes from all, a search by a
            method that cannot try rates, or a budget that the method does not know.
    """

    method: Method = field(default_factory=Wanda)
    sparsity: float = 0.5
    allocation: Allocation = field(default_factory=DLP)
    min_rate: float = 0.0
    max_rate: float = 0.99
    targets: Sequence[str] | None = None
    ignore: Sequence[str] = ()
    blocks: str | None = None
    budget: Budget = "linears"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(f"`pruning.sparsity` must be in [0, 1), the share to remove, got {self.sparsity}.")
        if not 0 <= self.min_rate <= self.max_rate <= 1:
            raise InputError(
                "`pruning.min_rate` and `pruning.max_rate` must be in [0, 1], the first at most the second, got "
                f"{self.min_rate} and {self.max_rate}."
            )
        if not self.method.chooses_linears and (self.targets is not None or self.ignore):
            raise InputError(
                f"`pruning.targets` and `pruning.ignore` must be left out for {type(self.method).__name__}: it takes "
                "from all linears of a block together."
            )
        if self.allocation.searches and not self.method.supports_search:
            raise InputError(
                f"`pruning.allocation` must not be {type(self.allocation).__name__} for {type(self.method).__name__}, "
                "which offers no trial of rates."
            )
        if self.budget not in get_args(Budget):
            raise InputError(f"`pruning.budget` must be one of {', '.join(get_args(Budget))}, got {self.budget!r}.")
        if self.budget != "linears" and not self.method.makes_zeros:
            raise InputError(
                f"`pruning.budget` must be linears for {type(self.method).__name__}, which sets no weights to zero, "
                f"got {self.budget}."
            )

    @property
    def needs_text(self) -> bool:
        """Whether a cut needs calibration text."""
        return bool(self.allocation.needs | self.method.needs) or self.method.needs_text

    def find(self, model: PreTrainedModel, *, quantised: bool = False) -> list[Block]:
        """Returns the blocks of ``model`` with the linears that are to be pruned; see ``families.find_blocks``."""
        chosen: dict[str, Any] = {"targets": self.targets, "ignore": self.ignore, "blocks": self.blocks}
        return find_blocks(model, **chosen, quantised=quantised)

    def check(self, model: PreTrainedModel) -> list[Block]:
        """Returns the blocks of ``model`` once all is checked that can be checked without running it.

        Raises:
            InputError: for an unknown family, targets that match nothing, a plan that does not fit, a sparsity that
                the bounds do not allow or that is below the current one, a search on a model that stays on disk.
        """
        return self.bounded(model)[0]

    def bounded(self, model: PreTrainedModel) -> tuple[list[Block], Limits]:
        """Returns the blocks as :meth:`check` does, and what bounds their rates; errors as there."""
        self.method.check(model, self.sparsity)
        if self.allocation.searches and distributed.world_size() > 1:
            raise InputError(
                f"`pruning.allocation` must not be {type(self.allocation).__name__} in several processes: search in "
                "one, and use the plan that `lit-prune score` writes."
            )
        if self.allocation.searches and on_disk(model) is not None:
            raise InputError(
                f"`pruning.allocation` must not be {type(self.allocation).__name__} with `model.on_disk`, every try "
                "runs the whole model: search in memory, and use the plan that `lit-prune score` writes."
            )
        blocks = self.find(model)
        limits = self.limits(model, blocks)
        if limits.effective_target < limits.current_sparsity - TOLERANCE:
            raise InputError(
                f"`pruning.sparsity` must be at least the current sparsity, {limits.current_sparsity:.4g} of the "
                f"linears: weights that are pruned stay pruned; got {limits.target:.4g}."
            )
        self.method.check_rates(blocks, self.allocation, limits.effective_target)
        self.allocation.check(limits.sizes, limits.effective_target, limits.lower, limits.upper)
        self.spread(limits, [1.0] * len(blocks), equal=True)
        return blocks, limits

    def limits(self, model: PreTrainedModel, blocks: Sequence[Block]) -> Limits:
        """Returns the bounds of the blocks' rates, and the mean that makes the sparsity.

        Raises:
            InputError: if the budget is that of all parameters, and the linears cannot give it.
        """
        least, upper = self.method.bounds(self.min_rate, min(self.max_rate, self.method.max_rate(model)))
        current, sizes = [self.method.current_rate(block) for block in blocks], self.method.sizes(model, blocks)
        lower, target = [max(least, rate) for rate in current], self.sparsity
        slack = self.method.rounding(blocks)  # an earlier cut may have exceeded its sparsity by so much
        if self.budget == "parameters":
            target = sparsity_of_linears(self.sparsity, model, blocks, lower=lower, upper=upper, slack=slack)
        return Limits(sizes, lower, upper, target, weighted_mean(current, sizes), slack)

    def spread(self, limits: Limits, scores: Sequence[float], *, equal: bool = False) -> list[float]:
        """Returns the rate of every block; with ``equal`` one rate for all, to check that any are allowed."""
        rates = allocate(
            Uniform() if equal else self.allocation,
            scores,
            limits.effective_target,
            sizes=limits.sizes,
            present=limits.lower,
            max_rate=limits.upper,
        )
        return self.method.rates(rates, limits.sizes)


def recipe_record(recipe: Recipe) -> dict[str, object]:
    """Returns ``recipe`` as JSON can hold it; method and allocation by their ``repr``."""
    return {
        "method": repr(recipe.method),
        "allocation": repr(recipe.allocation),
        "sparsity": recipe.sparsity,
        "min_rate": recipe.min_rate,
        "max_rate": recipe.max_rate,
        "targets": None if recipe.targets is None else list(recipe.targets),
        "ignore": list(recipe.ignore),
        "blocks": recipe.blocks,
        "budget": recipe.budget,
    }
