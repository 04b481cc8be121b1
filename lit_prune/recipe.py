"""Recipe: the settings of a cut, and the limits that they give the rates of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.allocate import DLP, Allocation, Uniform, allocate
from lit_prune.allocate.base import TOLERANCE, weighted_mean
from lit_prune.allocate.budget import Budget, Limits
from lit_prune.errors import InputError
from lit_prune.models.families import Block, check_experts_of, find_blocks
from lit_prune.models.on_disk import on_disk
from lit_prune.pruning import Method, Wanda
from lit_prune.reconstruct import Reconstruct
from lit_prune.reconstruct.finished import check_folder


@dataclass(frozen=True)
class Recipe:
    """The settings of a cut.

    Args:
        method: The pruning method, which sets weights to zero, slices the model, or makes it smaller in another way.
        sparsity: Share to remove, mean over the blocks, in [0, 1): of the linears' weights, of the dimensions, or of
            whatever else the method removes.
        allocation: The rule that scores the blocks and spreads the sparsity over them.
        min_rate: Smallest share that is removed from any block.
        max_rate: Largest share that is removed from any block.
        targets: Name suffixes or regular expressions of the linears to prune; None selects all in the blocks.
        ignore: Name suffixes or regular expressions of linears to leave alone.
        blocks: Dotted path of the decoder layers, for an unknown family.
        budget: What `sparsity` is a share of: `linears`, what the method removes (weights of the linears, channels), or
            `parameters`, all parameters of the model, tied weights counted once. Embeddings are never pruned, so the
            linears then lose a larger share.
        reconstruction: The training of every block, right after it is cut, towards its former output; None leaves the
            blocks as the method cuts them.

    Raises:
        InputError: for a number out of its range, `targets` or `ignore` for a method that prunes whole blocks, a search
            for a method without a trial, or a budget or a reconstruction that the method does not support.
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
    reconstruction: Reconstruct | None = None

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
                f"`pruning.targets` and `pruning.ignore` must be left out for {type(self.method).__name__}: it "
                "prunes all linears of a block together."
            )
        if self.allocation.searches and not self.method.supports_search:
            raise InputError(
                f"`pruning.allocation` must not be {type(self.allocation).__name__} for {type(self.method).__name__}, "
                "which offers no trial of rates."
            )
        if self.allocation.by_linear and not self.method.makes_zeros:
            raise InputError(
                f"`pruning.allocation` must have one rate per block for {type(self.method).__name__}, which prunes all "
                "linears of a block together; `level: linears` and plans with linears are for masks."
            )
        if self.budget not in get_args(Budget):
            raise InputError(f"`pruning.budget` must be one of {', '.join(get_args(Budget))}, got {self.budget!r}.")
        if self.budget != "linears" and not self.method.supports_parameters:
            raise InputError(
                f"`pruning.budget` must be linears for {type(self.method).__name__}, whose rates do not tell how many "
                f"parameters it removes, got {self.budget}."
            )
        if self.reconstruction is not None and not self.method.supports_reconstruction:
            raise InputError(
                f"`pruning.reconstruction` must be null for {type(self.method).__name__}, which gives blocks outputs "
                "that cannot be compared with those of the dense blocks: leave it out, or choose another method."
            )

    @property
    def needs_text(self) -> bool:
        """Whether a cut needs calibration text."""
        needs = self.allocation.needs | self.method.needs
        return bool(needs) or self.method.needs_text or self.reconstruction is not None

    def find(self, model: PreTrainedModel, *, quantised: bool = False) -> list[Block]:
        """Returns the blocks of ``model`` with the linears to prune; see ``families.find_blocks``."""
        chosen: dict[str, Any] = {"targets": self.targets, "ignore": self.ignore, "blocks": self.blocks}
        blocks = find_blocks(model, **chosen, quantised=quantised)
        check_experts_of(blocks, self.ignore)
        return blocks

    def check(self, model: PreTrainedModel) -> list[Block]:
        """Returns the blocks of ``model``, after all checks that are possible without running it.

        Raises:
            InputError: for an unknown family, targets that match nothing, a plan that does not fit, a sparsity that
                the bounds do not allow or that is below the current one, and a search in several processes or on a
                model that stays on disk.
        """
        return self.bounded(model)[0]

    def bounded(self, model: PreTrainedModel) -> tuple[list[Block], Limits]:
        """Returns the blocks and the limits of their rates, with the checks and errors of :meth:`check`."""
        self.method.check(model, self.sparsity)
        if self.reconstruction is not None and self.reconstruction.state is not None:
            check_folder(self.reconstruction.state)
        if self.allocation.searches and distributed.world_size() > 1:
            raise InputError(
                f"`pruning.allocation` must not be {type(self.allocation).__name__} in several processes: search in "
                "one, and use the plan that `lit-prune score` writes."
            )
        if self.allocation.searches and on_disk(model) is not None:
            raise InputError(
                f"`pruning.allocation` must not be {type(self.allocation).__name__} with `model.on_disk`, as every "
                "trial runs the whole model: search in memory, and use the plan that `lit-prune score` writes."
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
        self.allocation.linears(blocks)
        self.spread(limits, [1.0] * len(blocks), equal=True)
        return blocks, limits

    def limits(self, model: PreTrainedModel, blocks: Sequence[Block]) -> Limits:
        """Returns the bounds of the blocks' rates, and the mean rate that gives the sparsity.

        Raises:
            InputError: if the budget is a share of all parameters that the linears cannot give.
        """
        least, upper = self.method.bounds(self.min_rate, min(self.max_rate, self.method.max_rate(model)))
        current, sizes = self.method.current_rates(model, blocks), self.method.sizes(model, blocks)
        lower, target = [max(least, rate) for rate in current], self.sparsity
        slack = self.method.rounding(blocks)  # by which an earlier cut may have exceeded its sparsity
        if self.budget == "parameters":
            target = self.method.rate_of_parameters(self.sparsity, model, blocks, lower=lower, upper=upper, slack=slack)
        return Limits(sizes, lower, upper, target, weighted_mean(current, sizes), slack)

    def spread(self, limits: Limits, scores: Sequence[float], *, equal: bool = False) -> list[float]:
        """Returns the rate of every block; with ``equal`` the same for all, which shows if any are possible."""
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
    """Returns ``recipe`` as a JSON-serialisable dict, with method and allocation as their ``repr``."""
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
        "reconstruction": None if recipe.reconstruction is None else repr(recipe.reconstruction),
    }
