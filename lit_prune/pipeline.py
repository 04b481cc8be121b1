"""Calibrate, allocate, prune: the whole of it, without Lightning. Read this file first.

scores = score(model, batches, recipe)     # changes nothing
pruned = prune(model, batches, recipe)     # score, spread the budget over the blocks, remove weights in place

In several processes (torch.distributed) each is given all batches, runs its share, and arrives at the same weights.

Calibrate once, and try many recipes on copies of the model:

scored, statistics = score_with_statistics(model, batches, recipe)
pruned = prune(copy, batches, other_recipe, statistics=statistics)
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.allocate.base import Refined, weighted_mean
from lit_prune.allocate.budget import Limits
from lit_prune.calibration.cached_statistics import CachedStatistics, Key, key_of
from lit_prune.calibration.statistics import COSINE, INPUTS, BlockStatistics
from lit_prune.calibration.stream import Stream, observe, on_device
from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import evaluating
from lit_prune.models import structure
from lit_prune.models.digest import digest
from lit_prune.models.families import Block
from lit_prune.models.on_disk import check_offload_folder
from lit_prune.progress import log, track
from lit_prune.recipe import Recipe, recipe_record

DEFAULT = Recipe()
LEAST_SPARSITY = 1e-3  # of a model that was pruned before; a few weights are exactly 0 by rounding


@dataclass(frozen=True)
class Scored:
    """What scoring the blocks gave.

    Attributes:
        scores: One score a block, as the allocation defines it.
        rates: The share that each block is to give.
        target: The mean that the rates were to have, weighted by ``sizes``.
        sizes: Size of each block in the unit that rates are a share of: prunable weights, dimensions, ...
        seconds: How long it took.
        statistics: Of each block, as far as they were needed.
        search: What a search for rates reports, see ``allocate.base.Refined``.
        sparsity_before: The share that earlier cuts had removed, weighted by ``sizes``; 0 for a dense model.
    """

    scores: list[float]
    rates: list[float]
    target: float
    sizes: list[int]
    seconds: float
    statistics: list[BlockStatistics] = field(repr=False)
    search: dict[str, Any] = field(default_factory=dict)
    sparsity_before: float = 0.0

    @property
    def planned(self) -> float:
        """The mean of the rates, weighted by ``sizes``: the target, as nearly as the method's rates allow."""
        return weighted_mean(self.rates, self.sizes)


@dataclass(frozen=True)
class Pruned:
    """What pruning did.

    Attributes:
        scores: One score a block.
        rates: The share that each block was to give.
        target: The mean that the rates were to have, weighted by ``sizes``.
        achieved: The share that each block has given: of weights that are exactly 0 now, of dimensions, ...
        sparsity: The same over all blocks.
        sizes: Size of each block before, in the unit that rates are a share of.
        seconds: How long scoring and pruning took, by phase.
        search: What a search for rates reports.
        sparsity_before: The share that earlier cuts had removed; 0 for a dense model.
    """

    scores: list[float]
    rates: list[float]
    target: float
    achieved: list[float]
    sparsity: float
    sizes: list[int]
    seconds: dict[str, float]
    search: dict[str, Any] = field(default_factory=dict)
    sparsity_before: float = 0.0


def score(
    model: PreTrainedModel,
    batches: Iterable[Batch | Tensor],
    recipe: Recipe = DEFAULT,
    *,
    device: torch.device | str | None = None,
    statistics: CachedStatistics | None = None,
) -> Scored:
    """Returns each block's score and the rate that it would give; the model is left as it is.

    Args:
        model: A Hugging Face causal LM.
        batches: Token ids (batch, tokens), or dicts of `input_ids` and, where there is padding, `attention_mask`.
        recipe: What is to be removed, and how.
        device: Where blocks compute, one at a time; None means where the model is.
        statistics: Those that :func:`score_with_statistics` took of this model over these batches, which are then not
            run again.

    Raises:
        InputError: see :meth:`Recipe.check`; also for NaN or infinity in the activations, for no batches, and for
            statistics that were taken of another model or other batches.
    """
    return _score(model, list(batches), recipe, device, _needed_for_rates(recipe), statistics)


def score_with_statistics(
    model: PreTrainedModel,
    batches: Iterable[Batch | Tensor],
    recipe: Recipe = DEFAULT,
    *,
    device: torch.device | str | None = None,
    settings: Mapping[str, Any] | None = None,
    statistics: CachedStatistics | None = None,
) -> tuple[Scored, CachedStatistics]:
    """Returns what :func:`score` does, and the statistics, which serve other recipes and sparsities too.

    Norms and cosines are taken whatever the recipe, so that they serve every allocation, and the Gram matrices where
    the method reads those of the unpruned model. ``statistics`` that are given are returned with the new scores added.
    Arguments and errors as in :func:`score`; ``settings`` as in ``cached_statistics.Key``.
    """
    batches, needs = list(batches), frozenset({INPUTS, COSINE}) | _needs(recipe)
    scored = _score(model, batches, recipe, device, needs, statistics)
    cached = statistics or CachedStatistics(key_of(model, batches, settings), needs, scored.statistics, {})
    return scored, replace(cached, scores=cached.scores | {repr(recipe.allocation): scored.scores})


def prune(
    model: PreTrainedModel,
    batches: Iterable[Batch | Tensor],
    recipe: Recipe = DEFAULT,
    *,
    device: torch.device | str | None = None,
    statistics: CachedStatistics | None = None,
) -> Pruned:
    """Prunes ``model`` in place, and returns what was done; arguments and errors as in :func:`score`."""
    check_offload_folder(model)
    batches = list(batches)
    scored = _score(model, batches, recipe, device, _needs(recipe), statistics)
    blocks = recipe.find(model)
    begin = time.perf_counter()
    with evaluating(model):
        achieved = recipe.method.apply(
            model,
            blocks,
            rates=scored.rates,
            statistics=scored.statistics,
            device=torch.device(device or model.device),
            stream=lambda: _stream(model, blocks, batches, device),
        )
    _check_same(blocks)
    structure.write(model, recipe=recipe_record(recipe), rates=scored.rates)
    return Pruned(
        scores=scored.scores,
        rates=scored.rates,
        target=scored.target,
        achieved=achieved,
        sparsity=weighted_mean(achieved, scored.sizes),
        sizes=scored.sizes,
        seconds={"score": scored.seconds, "prune": time.perf_counter() - begin},
        search=scored.search,
        sparsity_before=scored.sparsity_before,
    )


def _check_same(blocks: Sequence[Block]) -> None:
    """Raises RuntimeError where the processes have not arrived at the same weights, to the bit."""
    if distributed.world_size() > 1:
        weights = [{name: digest(tensor) for name, tensor in block.module.state_dict().items()} for block in blocks]
        distributed.check_same("The pruned weights", weights)


def check_statistics(
    statistics: CachedStatistics,
    model: PreTrainedModel,
    batches: Iterable[Batch | Tensor],
    recipe: Recipe,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Raises InputError where ``statistics`` do not serve a cut of ``model`` by ``recipe``, saying what differs."""
    statistics.check(key_of(model, batches, settings), recipe.find(model), _needs(recipe))


def check_expected_statistics(
    statistics: CachedStatistics, model: PreTrainedModel, recipe: Recipe, settings: Mapping[str, Any]
) -> None:
    """Raises InputError as :func:`check_statistics` does, as far as that needs no weights and no text."""
    statistics.check(statistics.key.expected(settings), recipe.find(model), _needs(recipe))


def _needs(recipe: Recipe) -> frozenset[str]:
    """The statistics of the unpruned model that a cut reads."""
    return _needed_for_rates(recipe) | (recipe.method.needs if recipe.method.propagate == "dense" else frozenset())


def _needed_for_rates(recipe: Recipe) -> frozenset[str]:
    """The statistics of the unpruned model that the rates depend on."""
    return recipe.allocation.needs | (recipe.method.needs if recipe.allocation.searches else frozenset())


def _score(
    model: PreTrainedModel,
    batches: Sequence[Batch | Tensor],
    recipe: Recipe,
    device: torch.device | str | None,
    needs: frozenset[str],
    cached: CachedStatistics | None = None,
) -> Scored:
    """Scores the blocks; the statistics in ``needs`` stay where the model is."""
    blocks, limits = recipe.bounded(model)
    key = key_of(model, batches) if cached is not None or recipe.allocation.searches else None
    if cached is not None:
        assert key is not None
        cached.check(key, blocks, needs)
    begin = time.perf_counter()
    with evaluating(model):
        scores, statistics = _score_blocks(model, blocks, batches, recipe, device, needs, cached)
    before = limits.current_sparsity if limits.current_sparsity >= LEAST_SPARSITY else 0.0
    if before:
        log(f"{before:.1%} of what is to be pruned is gone already: it stays so, and counts toward the sparsity.")
    refined = _refine(model, blocks, batches, recipe, device, limits=limits, scores=scores, taken=statistics, key=key)
    seconds = time.perf_counter() - begin
    return Scored(scores, refined.rates, limits.target, limits.sizes, seconds, statistics, refined.details, before)


def _score_blocks(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    batches: Sequence[Batch | Tensor],
    recipe: Recipe,
    device: torch.device | str | None,
    needs: frozenset[str],
    cached: CachedStatistics | None,
) -> tuple[list[float], list[BlockStatistics]]:
    """The score and the statistics of every block, in one pass over the batches where nothing is cached."""
    known = cached.scores_of(recipe.allocation, blocks) if cached else None
    stream = _stream(model, blocks, batches, device) if needs and not cached else None
    scores, statistics = [], []
    for block in track(blocks, "Scoring blocks"):
        taken = cached.by_block[block.index] if cached else BlockStatistics()
        with on_device(block, torch.device(device or model.device)):
            if stream is not None:
                taken = observe(stream, block, needs, advance=block is not blocks[-1])
            taken = taken.to(next(block.module.parameters()).device)
            scores.append(known[block.index] if known else recipe.allocation.score(_weights(block), taken))
        statistics.append(taken.to(model.device))
    return scores, statistics


def _refine(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    batches: Sequence[Batch | Tensor],
    recipe: Recipe,
    device: torch.device | str | None,
    *,
    limits: Limits,
    scores: Sequence[float],
    taken: Sequence[BlockStatistics],
    key: Key | None,
) -> Refined:
    """Spreads the budget by the scores, and searches for better rates where the allocation does."""
    rates = recipe.spread(limits, scores)
    if not recipe.allocation.searches:
        return Refined(rates)
    assert key is not None
    recorded = {name: value for name, value in recipe_record(recipe).items() if name != "allocation"}
    place, dicts = torch.device(device or model.device), _dicts(model, batches)
    trial = recipe.method.trial(model, blocks, statistics=taken, device=place, batches=dicts)
    with evaluating(model), trial as opened:
        return recipe.allocation.refine(rates, limits, trial=opened, key=vars(key) | recorded)


def _weights(block: Block) -> dict[str, Tensor]:
    return {name: linear.weight_OI for name, linear in block.linears.items()}


def _stream(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    batches: Iterable[Batch | Tensor],
    device: torch.device | str | None,
) -> Stream:
    share = distributed.shard(_dicts(model, batches))  # each process runs its share of the batches
    return Stream(model, blocks, share, torch.device(device or model.device))


def _dicts(model: PreTrainedModel, batches: Iterable[Batch | Tensor]) -> list[Batch]:
    """The batches as dicts, none of them longer than the model can take."""
    dicts = [{"input_ids": batch} if isinstance(batch, Tensor) else batch for batch in batches]
    if not dicts:
        raise InputError("`calibration` must have at least one batch, got none.")
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(batch["input_ids"].shape[-1] for batch in dicts)
    if limit is not None and longest > limit:
        raise InputError(f"`calibration.seq_length` must be at most {limit}, the model's limit, got {longest}.")
    return dicts
