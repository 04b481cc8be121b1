"""Recipe: the settings of a cut, and the limits that they give the rates of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.allocate import Allocation, Uniform, allocate
from lit_prune.allocate.base import TOLERANCE, weighted_mean
from lit_prune.allocate.budget import MAX_RATE, Budget, Limits, OutOfRange
from lit_prune.errors import InputError, described
from lit_prune.evaluation.sizes import parameters
from lit_prune.models.families import Block, check_experts_of, find_blocks
from lit_prune.models.on_disk import on_disk
from lit_prune.pruning import Method, Wanda
from lit_prune.reconstruct import Reconstruct
from lit_prune.reconstruct.finished import check_folder
from lit_prune.target import StoredBytes, parse_bytes, parse_parameters


@dataclass(frozen=True)
class Recipe:
    """The settings of a cut.

    Args:
        method: The pruning method, which sets weights to zero, slices the model, or makes it smaller in another way.
        sparsity: Share to remove, mean over the blocks, in [0, 1): of the linears' weights, of the dimensions, or of
            whatever else the method removes. None is 0.5, or what the target asks for, see :meth:`resolved`.
        allocation: The rule that scores the blocks and spreads the sparsity over them. None is the default of the
            method: DLP for masks and slices, Uniform for methods that remove units or blocks.
        min_rate: Smallest share that is removed from any block.
        max_rate: Largest share that is removed from any block.
        targets: Name suffixes or regular expressions of the linears to prune; None selects all in the blocks.
        ignore: Name suffixes or regular expressions of linears to leave alone.
        blocks: Dotted path of the decoder layers, where several lists of layers could be meant.
        budget: What `sparsity` is a share of: `linears`, what the method removes (weights of the linears, channels);
            `parameters`, all parameters of the model, tied weights counted once; or `bytes`, those of the exported
            weights. Embeddings are never pruned, so the linears then lose a larger share.
        target_parameters: Number of parameters that are to be left, such as 100M, instead of a sparsity.
        target_bytes: Bytes that the exported weights are to take, such as 200MB, instead of a sparsity.
        reconstruction: The training of every block, right after it is cut, towards its former output; None leaves the
            blocks as the method cuts them.

    Raises:
        InputError: for a number out of its range, `targets` or `ignore` for a method that prunes whole blocks, a search
            for a method without a trial, more than one of sparsity and targets, or a budget, a target or a
            reconstruction that the method does not support.
    """

    method: Method = field(default_factory=Wanda)
    sparsity: float = None  # type: ignore[assignment]  # a float, until the recipe has a target
    allocation: Allocation = None  # type: ignore[assignment]  # of the method, if it is not given
    min_rate: float = 0.0
    max_rate: float = MAX_RATE
    targets: Sequence[str] | None = None
    ignore: Sequence[str] = ()
    blocks: str | None = None
    budget: Budget = "linears"
    reconstruction: Reconstruct | None = None
    target_parameters: int | str | None = None
    target_bytes: int | str | None = None

    def __post_init__(self) -> None:
        self._read_targets()
        _check_type("method", self.method, Method, "Wanda()")
        if self.allocation is None:
            object.__setattr__(self, "allocation", self.method.default_allocation()())
        _check_type("allocation", self.allocation, Allocation, "DLP()")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise InputError(f"`pruning.sparsity` must be in [0, 1), the share to remove, got {self.sparsity}.")
        if not 0 <= self.min_rate <= self.max_rate <= 1:
            raise InputError(
                "`pruning.min_rate` and `pruning.max_rate` must be in [0, 1], the first at most the second, got "
                f"{self.min_rate} and {self.max_rate}."
            )
        if not self.method.chooses_linears and (self.targets is not None or self.ignore):
            raise InputError(
                f"`pruning.targets` and `pruning.ignore` must be left out for {type(self.method).__name__}: it "
                "says itself which linears of a block it changes."
            )
        if self.allocation.searches and not self.method.supports_search:
            raise InputError(
                f"`pruning.allocation` must not be {type(self.allocation).__name__} for {self.method.described}, "
                "which offers no trial of rates: leave it out, or choose another."
            )
        self._check_level()
        if self.budget not in get_args(Budget):
            raise InputError(f"`pruning.budget` must be one of {', '.join(get_args(Budget))}, got {self.budget!r}.")
        self._check_budget()
        if self.budget == "linears" and self.target is None and self.method.of_all_parameters:
            object.__setattr__(self, "budget", "parameters")
        if self.reconstruction is not None:
            _check_type("reconstruction", self.reconstruction, Reconstruct, "Reconstruct()")
            if not self.method.supports_reconstruction:
                raise InputError(
                    f"`pruning.reconstruction` must be null for {self.method.described}: leave it out, or choose a "
                    "mask method, MLPWidth, HeadGroups, Experts, or Shrink with these alone."
                )

    def _check_level(self) -> None:
        """Raises InputError if the allocation gives rates to linears or parts, and the method does not support them."""
        finest, levels = self.method.finest_level, self.allocation.levels
        if levels & {"blocks", finest}:
            return
        name = type(self.method).__name__
        supported = "one rate per block" if finest == "blocks" else f"rates of blocks or {finest}"
        raise InputError(
            f"`pruning.allocation` must have {supported} for {name}, got rates of {' or '.join(sorted(levels))}: "
            "`level: linears` and plans with linears are for masks, `level: parts` and plans with parts for Shrink."
        )

    def _read_targets(self) -> None:
        """Replaces the texts of the targets by numbers, and a sparsity that is not given by its default."""
        parsers = {"target_parameters": parse_parameters, "target_bytes": parse_bytes}
        texts = {name: getattr(self, name) for name in parsers if getattr(self, name) is not None}
        check_one_target(self.sparsity, **texts)
        for name, text in texts.items():
            object.__setattr__(self, name, parsers[name](text))
        if self.sparsity is None and not texts:
            object.__setattr__(self, "sparsity", 0.5)

    def _check_budget(self) -> None:
        """Raises InputError for a budget or a target that the method does not support."""
        method, target = type(self.method).__name__, self.target
        if target is not None and self.budget != "linears":
            raise InputError(
                f"`pruning.budget` must be left out with `pruning.{target}`, which says what is counted, got "
                f"{self.budget}."
            )
        field = f"`pruning.{target}` must be left out" if target is not None else "`pruning.budget` must be linears"
        asked = f"got {self.budget if target is None else f'{getattr(self, target):,}'}"
        if (target is not None or self.budget == "bytes") and self.method.makes_zeros:
            raise InputError(
                f"{field} for {method}, {asked}: it sets weights to zero, which are stored like others. Give "
                "`pruning.sparsity`, with `--pruning.budget parameters` for a share of all parameters, or choose a "
                "method that removes parameters, such as MLPWidth."
            )
        if (target is not None or self.budget != "linears") and not self.method.supports_parameters:
            raise InputError(
                f"{field} for {method}, whose rates do not tell how many parameters it removes, {asked}: give "
                "`pruning.sparsity` alone."
            )

    @property
    def target(self) -> Literal["target_parameters", "target_bytes"] | None:
        """Name of the target that the recipe has; None if it has a sparsity."""
        if self.target_parameters is not None:
            return "target_parameters"
        return None if self.target_bytes is None else "target_bytes"

    @property
    def counts_bytes(self) -> bool:
        """Whether the cut depends on the bytes of the exported weights."""
        return self.target_bytes is not None or self.budget == "bytes"

    @property
    def is_resolved(self) -> bool:
        """Whether the recipe has a sparsity of what the method removes, or of all parameters."""
        return self.target is None and self.budget != "bytes"

    def resolved(self, model: PreTrainedModel, stored: StoredBytes | None = None) -> Recipe:
        """Returns the recipe with a share of all parameters instead of a target or a share of bytes.

        If 134.5 M parameters are to become 100 M, the share is 0.2565.

        Args:
            model: The model before the cut; it may be on the meta device.
            stored: Bytes of its weights in the exported folder; None counts them in the model's data type.

        Raises:
            InputError: if no rates within the bounds reach it, with the sizes that can be reached.
        """
        if self.is_resolved:
            return self
        self.check_method(model, 0.0)
        blocks, stored = self.find(model), stored or StoredBytes.of(model)
        if self.counts_bytes:
            self._check_rows(model, blocks, stored.row_multiple)
        total = self.method.full_parameters(model, blocks)
        full_bytes = stored.total + (total - parameters(model)) * stored.per_weight
        full, per_weight = full_bytes, stored.per_weight
        if self.target_parameters is not None:
            full, per_weight = float(total), 1.0
        asked = self.sparsity if self.target is None else 1 - int(getattr(self, self.target)) / full
        share = asked * full / (total * per_weight)
        fields: dict[str, Any] = {"target_parameters": None, "target_bytes": None, "budget": "parameters"}
        resolved = replace(self, **fields, sparsity=min(max(share, 0.0), 1 - 1e-9))
        try:
            resolved.limits(model, blocks, share=share)
        except OutOfRange as error:
            raise self._unreachable(error, model, blocks, full, total * per_weight / full) from error
        return resolved

    def _check_rows(self, model: PreTrainedModel, blocks: Sequence[Block], multiple: int) -> None:
        """Raises InputError if rows of the weights, before or after the cut, are not multiples of ``multiple``."""
        field, method = self.target or "budget", type(self.method).__name__
        remedy = "give `pruning.target_parameters`, or another type of weights"
        if others := {row for each in model.parameters() if each.ndim > 1 and (row := each.shape[-1]) % multiple}:
            raise InputError(
                f"`pruning.{field}` must not count bytes for a model with rows of {min(others)} weights, which the "
                f"format stores in more bits, as {multiple} does not divide them: {remedy}."
            )
        if self.method.size_multiple(model, blocks) % multiple:
            raise InputError(
                f"`multiple` of {method} must leave sizes that {multiple} divides, with `pruning.{field}`, since the "
                f"format stores other rows in more bits: set it to {multiple}, or {remedy}."
            )

    def _unreachable(
        self, error: OutOfRange, model: PreTrainedModel, blocks: Sequence[Block], full: float, scale: float
    ) -> InputError:
        """Returns the error for a target that cannot be reached.

        Args:
            error: What is possible, as shares of all parameters.
            model: The model before the cut.
            blocks: Its blocks.
            full: Number of parameters or bytes before any cut.
            scale: Share of ``full`` that goes with all parameters.
        """
        least, most, method = error.least * scale, error.most * scale, type(self.method).__name__
        if self.target is None:
            return InputError(
                f"`pruning.sparsity` must be between {math.ceil(least * 1e4) / 1e4:g} and "
                f"{math.floor(most * 1e4) / 1e4:g} of all bytes with `pruning.budget: bytes`, as {error.bounds}, "
                f"{error.part} of all parameters, got {self.sparsity:g}."
            )
        asked = int(getattr(self, self.target))
        remedy = self._for_fewer(model, blocks) if asked < full * (1 - most) else ""
        return InputError(
            f"`pruning.{self.target}` must be between {math.ceil(full * (1 - most) - 1e-6):,} and "
            f"{math.floor(full * (1 - least) + 1e-6):,} for {method}, as {error.bounds}, {error.part} of all "
            f"parameters, got {asked:,}.{remedy}"
        )

    def _for_fewer(self, model: PreTrainedModel, blocks: Sequence[Block]) -> str:
        """Returns the remedy for a target below what the recipe can leave of ``model``."""
        if self.max_rate < min(type(self).max_rate, self.method.max_rate(model, blocks)):
            return f" For fewer, raise `pruning.max_rate`, which is {self.max_rate:g}."
        return f" For fewer, {self.method.for_fewer}." if self.method.for_fewer else ""

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

    def check_method(self, model: PreTrainedModel, sparsity: float) -> None:
        """Raises InputError if the method cannot prune ``model`` to ``sparsity``.

        Of a share of all parameters, only the bounds of the rates tell what is possible; see :meth:`limits`.
        """
        in_units = self.budget == "linears" or self.method.of_all_parameters
        self.method.check_model(model)
        self.method.check(model, find_blocks(model, blocks=self.blocks), sparsity if in_units else 0.0)

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
        if not self.is_resolved:
            return self.resolved(model).bounded(model)
        self.check_method(model, self.sparsity)
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
            stays = "weights that are pruned stay pruned" if self.method.makes_zeros else "what is gone stays gone"
            raise InputError(
                f"`pruning.sparsity` must be at least the current sparsity, {limits.current_sparsity:.4g}: {stays}; "
                f"got {limits.target:.4g}."
            )
        limits = self._as_planned(model, blocks, limits)
        self.method.check_rates(model, blocks, self.allocation, limits.effective_target)
        self.allocation.check(limits.sizes, limits.effective_target, limits.lower, limits.upper)
        if (named := self.allocation.named_rates(self.method.named_sizes(model, blocks))) is not None:
            self.method.check_named(model, blocks, named)
        equal_rates = self._equal_rates(blocks, limits)
        if self.allocation.is_uniform():
            self.method.check_sizes(model, blocks, equal_rates)
        return blocks, limits

    def _equal_rates(self, blocks: Sequence[Block], limits: Limits) -> list[float]:
        """Returns the rates of the blocks that are as equal as ``limits`` allow."""
        return self.spread(limits, [1.0] * len(blocks), equal=True)

    def fits(self, model: PreTrainedModel) -> bool:
        """Returns whether the config of ``model`` accepts the sizes that equal rates leave; True for other rates."""
        if not self.allocation.is_uniform():
            return True
        blocks = self.find(model)
        try:
            self.method.check_sizes(model, blocks, self._equal_rates(blocks, self.limits(model, blocks)))
        except InputError:
            return False
        return True

    def check_removes(self, model: PreTrainedModel) -> None:
        """Raises InputError for a cut of shapes that removes nothing, or by equal rates is rounded to nothing."""
        recipe = self.resolved(model)
        if recipe.method.makes_zeros:
            return
        blocks = recipe.find(model)
        limits = recipe.limits(model, blocks)
        if any(limits.current) and limits.target <= limits.current_sparsity + TOLERANCE:
            return
        rounded = recipe.allocation.is_uniform() and not recipe.method.removes(
            model, blocks, recipe._equal_rates(blocks, limits)
        )
        if rounded or limits.target <= TOLERANCE:
            field, method = self.target or "sparsity", type(self.method).__name__
            raise InputError(
                f"`pruning.{field}` must remove something, got {getattr(self, field):,}, which {method} rounds to "
                f"nothing: remove more{', or set a smaller `multiple`' if method != 'Depth' else ''}."
            )

    def _as_planned(self, model: PreTrainedModel, blocks: Sequence[Block], limits: Limits) -> Limits:
        """Returns ``limits`` with the mean of a plan as their target, if that is the target but for rounding."""
        planned = self.allocation.planned_rates(len(blocks))
        if planned is None:
            return limits
        mean = weighted_mean(planned, limits.sizes)
        exceeds = abs(mean - limits.effective_target) > self.method.rounding_of_mean(model, blocks, planned)
        return limits if exceeds else replace(limits, target=mean)

    def limits(self, model: PreTrainedModel, blocks: Sequence[Block], *, share: float | None = None) -> Limits:
        """Returns the bounds of the blocks' rates, and the mean rate that gives the sparsity.

        Args:
            model: The model.
            blocks: Its blocks.
            share: Share of all parameters to remove, which may be out of range; None is the sparsity.

        Raises:
            OutOfRange: if the budget is a share of all parameters that the linears cannot give.
        """
        most = self.max_rate
        least, upper = self.method.bounds(self.min_rate, min(most, self.method.max_rate(model, blocks)))
        current, sizes = self.method.current_rates(model, blocks), self.method.sizes(model, blocks)
        lower, target = [max(least, rate) for rate in current], self.sparsity
        # by which an earlier cut may have exceeded its sparsity
        slack = self.method.rounding(model, blocks) if any(current) else 0.0
        if self.budget == "parameters":
            asked = self.sparsity if share is None else share
            target = self.method.rate_of_parameters(asked, model, blocks, lower=lower, upper=upper, slack=slack)
        return Limits(sizes, lower, upper, target, current, slack, least, most)

    def sparsities(self, model: PreTrainedModel) -> tuple[float, float]:
        """Returns the smallest and the largest sparsity that the bounds of the rates allow, to four digits."""
        blocks = self.find(model)
        try:
            limits = self.limits(model, blocks, share=2.0)  # for a share of all parameters, out of range
        except OutOfRange as error:
            least, most = error.least, error.most
        else:
            least = weighted_mean(limits.lower, limits.sizes)
            most = weighted_mean([max(limits.upper, low) for low in limits.lower], limits.sizes)
            most = min(most, self.method.max_sparsity(model, blocks))
        return math.ceil(max(least, 0.0) * 1e4) / 1e4, math.floor(min(most, 0.9999) * 1e4) / 1e4

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
        return self.method.further_rates(rates, limits.sizes, limits.current)


def _check_type(field: str, value: object, kind: type, example: str) -> None:
    """Raises InputError for a class or a name where an object is needed, as from Python."""
    if not isinstance(value, kind):
        raise InputError(f"`pruning.{field}` must be an object such as {example}, got {described(value)}.")


def check_one_target(sparsity: object, **targets: object) -> None:
    """Raises InputError if more than one of the sparsity and the targets is given."""
    given = {name: value for name, value in {"sparsity": sparsity, **targets}.items() if value is not None}
    if len(given) > 1:
        names = " and ".join(f"`pruning.{name}`" for name in given)
        values = " and ".join(str(value) for value in given.values())
        remedy = " `--pruning.sparsity null` takes back that of a configuration." if sparsity is not None else ""
        raise InputError(f"{names} must not be given together, got {values}: leave out all but one.{remedy}")


def recipe_record(recipe: Recipe) -> dict[str, object]:
    """Returns ``recipe`` as a JSON-serialisable dict, with method and allocation as their ``repr``."""
    target = {} if recipe.target is None else {recipe.target: getattr(recipe, recipe.target)}
    return target | {
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
