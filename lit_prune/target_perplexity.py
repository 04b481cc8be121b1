"""The greatest sparsity whose perplexity stays at most a given one, by bisection over cuts of copies of a model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.calibration.cached_statistics import CachedStatistics
from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import measure
from lit_prune.models.on_disk import on_disk, placed
from lit_prune.pipeline import needed_statistics, prune, score, score_with_statistics
from lit_prune.progress import log
from lit_prune.recipe import Recipe

TOLERANCE = 1e-2


@dataclass(frozen=True)
class SparsityTrial:
    """The perplexity after a cut to one sparsity."""

    sparsity: float
    perplexity: float


@dataclass(frozen=True)
class FoundSparsity:
    """The sparsity that was found.

    Attributes:
        sparsity: The greatest of the sparsities that were tried whose perplexity is at most ``limit``.
        perplexity: The perplexity after a cut to it.
        limit: The perplexity that was asked for.
        before: The perplexity before the cut.
        trials: The cuts that were tried, in order; of sparsities that are rounded to the same sizes only the first.
    """

    sparsity: float
    perplexity: float
    limit: float
    before: float
    trials: Sequence[SparsityTrial]

    @property
    def next_greater(self) -> SparsityTrial:
        """The trial of the next greater sparsity, whose perplexity is above ``limit``."""
        return min((trial for trial in self.trials if trial.sparsity > self.sparsity), key=lambda trial: trial.sparsity)


def find_sparsity(
    model: PreTrainedModel,
    batches: Iterable[Batch | Tensor],
    recipe: Recipe,
    validation: tuple[Iterable[Batch], str],
    perplexity: float,
    *,
    tolerance: float = TOLERANCE,
    device: torch.device | None = None,
    statistics: CachedStatistics | None = None,
) -> FoundSparsity:
    """Returns the greatest sparsity of ``recipe`` whose perplexity on ``validation`` is at most ``perplexity``.

    The interval of all sparsities that the recipe allows is halved until it is shorter than ``tolerance``: 8 cuts of
    copies of the model for 0 to 0.99 and 0.01, fewer if the method rounds some of them to the same sizes. Sparsities
    that leave sizes which the config does not accept are left out, so that the interval may stay longer. The blocks
    are scored once. Where the perplexity does not rise with the sparsity throughout, a greater sparsity than the one
    that is found may do as well.

    Args:
        model: A Hugging Face causal LM, which is not changed; a copy of it must fit into memory beside it.
        batches: Calibration batches, see ``pipeline.score``.
        recipe: The settings of the cut; its sparsity is ignored.
        validation: Batches that the perplexity is measured on, and a description of their text.
        perplexity: The perplexity that must not be exceeded.
        tolerance: Largest distance of the result from a sparsity whose perplexity is too high.
        device: Device on which the blocks are cut and the model is measured; None means the model's.
        statistics: The result of ``pipeline.score_with_statistics`` for this model and these batches.

    Raises:
        InputError: if the perplexity is below that of the model or of the smallest sparsity that was tried, or at least
            that of the largest one; for an allocation that searches, a budget of bytes, several processes, and a model
            on disk.
    """
    check_single_cut(recipe)
    check_copies(model)
    batches, chosen = list(batches), device or model.device
    least, most = recipe.sparsities(model)
    if least >= most:
        raise InputError(
            f"`pruning.target_perplexity` must be left out if only the sparsity {least:.4g} is possible, by "
            "`pruning.min_rate` and `pruning.max_rate` or after what was removed before."
        )
    before = measure(placed(model, chosen), *validation, label="Perplexity, before the trials").perplexity
    if not before <= perplexity:
        raise InputError(
            f"`pruning.target_perplexity` must be at least {before:.4g}, that of the model before the cut, got "
            f"{perplexity:g}."
        )
    count = 1 + max(1, math.ceil(math.log2((most - least) / tolerance)))
    known: dict[tuple[float, ...], SparsityTrial] = {}  # by rates: sizes are rounded, so that sparsities may agree
    first = replace(recipe, sparsity=most)
    settings: dict[str, Any] = {"device": chosen, "statistics": statistics}
    if needed_statistics(first):
        scored, statistics = score_with_statistics(model, batches, first, **settings)
    else:
        scored = score(model, batches, first, **settings)

    def trial(sparsity: float) -> SparsityTrial:
        tried, label = replace(recipe, sparsity=sparsity), f"trial {len(known) + 1} of about {count}"
        rates = tuple(tried.spread(tried.bounded(model)[1], scored.scores))
        if rates not in known:
            cut = copy.deepcopy(model)
            prune(cut, batches, tried, device=chosen, statistics=statistics)
            found = measure(placed(cut, chosen), *validation, label=f"Perplexity, {label}").perplexity
            known[rates] = SparsityTrial(sparsity, found)
            log(
                f"Sparsity, {label}: {sparsity:.4f} has a perplexity of {found:.4g}, at most {perplexity:g} is asked "
                "for."
            )
        return known[rates]

    def allows(sparsity: float) -> bool:
        return trial(sparsity).perplexity <= perplexity

    if allows(most):
        raise InputError(
            f"`pruning.target_perplexity` must be below {trial(most).perplexity:.4g}, that of the largest sparsity "
            f"that the recipe allows, {most:.4g}, got {perplexity:g}: give `--pruning.sparsity {most:.4g}`."
        )
    sparsity = greatest(allows, least, most, tolerance, lambda sparsity: replace(recipe, sparsity=sparsity).fits(model))
    if sparsity is None:
        smallest = min(known.values(), key=lambda tried: tried.sparsity)
        raise InputError(
            f"`pruning.target_perplexity` must be at least {smallest.perplexity:.4g}, that of a sparsity of "
            f"{smallest.sparsity:.4g}, the smallest that was tried, got {perplexity:g}."
        )
    found = trial(sparsity)
    return FoundSparsity(found.sparsity, found.perplexity, perplexity, before, tuple(known.values()))


def greatest(
    allows: Callable[[float], bool],
    least: float,
    most: float,
    tolerance: float,
    possible: Callable[[float], bool] = lambda _: True,
) -> float | None:
    """Returns the greatest number tried that is allowed, by bisection; None if none is.

    For numbers up to 0.6 between 0 and 1, and a tolerance of 0.2: 0.5 is, 0.75 and 0.625 are not allowed; it is 0.5.

    Args:
        allows: Function that tells whether a number is allowed.
        least: A number that counts as allowed, and is not tried.
        most: A number that counts as not allowed, and is not tried.
        tolerance: Longest distance between the result and a number that is not allowed, or not possible.
        possible: Function that tells whether a number can be tried; for one that cannot, the nearest is that can, in
            steps of ``tolerance``.
    """
    found = None
    while most - least > tolerance:
        steps = range(1, math.ceil((most - least) / 2 / tolerance))
        offsets = [0.0, *(sign * step * tolerance for step in steps for sign in (1, -1))]
        numbers = ((least + most) / 2 + offset for offset in offsets)
        tried = next((number for number in numbers if least < number < most and possible(number)), None)
        if tried is None:
            break
        if allows(tried):
            least = found = tried
        else:
            most = tried
    return found


def check_copies(model: PreTrainedModel) -> None:
    """Raises InputError if copies of ``model`` cannot be cut: in several processes, and for weights on disk."""
    if distributed.world_size() > 1 or on_disk(model) is not None:
        raise InputError(
            "`pruning.target_perplexity` must be left out in several processes and with `model.on_disk`, since copies "
            "of the model are cut: find the sparsity in one process, and give it as `pruning.sparsity`."
        )


def check_single_cut(recipe: Recipe) -> None:
    """Raises InputError for settings with which a cut cannot be tried several times."""
    if recipe.budget == "bytes":
        raise InputError(
            "`pruning.budget` must be linears or parameters with `pruning.target_perplexity`, which needs no bytes, "
            "got bytes: leave it out."
        )
    if recipe.allocation.searches:
        raise InputError(
            f"`pruning.allocation` must not be {type(recipe.allocation).__name__} with `pruning.target_perplexity`, "
            "since every trial would search: find the sparsity with Uniform or DLP, and then search at it."
        )
    if recipe.reconstruction is not None and recipe.reconstruction.state is not None:
        raise InputError(
            "`pruning.reconstruction.state` must be null with `pruning.target_perplexity`, since it holds the blocks "
            f"of one cut, got {recipe.reconstruction.state}."
        )
