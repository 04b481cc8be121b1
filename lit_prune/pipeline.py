"""Pruning from end to end, without Lightning: calibrate, allocate, prune. Read this file first.

scored = score(model, batches, recipe)     # does not change the model
pruned = prune(model, batches, recipe)     # scores, spreads the budget over the blocks, removes weights in place

With torch.distributed, every process gets all batches, runs its share of them, and arrives at the same weights.

To calibrate once and try many recipes on copies of the model:

scored, statistics = score_with_statistics(model, batches, recipe)
pruned = prune(copy, batches, other_recipe, statistics=statistics)
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.allocate.base import TOLERANCE, Refined, weighted_mean
from lit_prune.allocate.budget import Limits
from lit_prune.calibration.cached_statistics import CachedStatistics, key_of
from lit_prune.calibration.statistics import COSINE, INPUTS, BlockStatistics
from lit_prune.calibration.stream import Stream, observe, on_device
from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import evaluating
from lit_prune.masks.zeros import MASK_SHARE
from lit_prune.models import structure
from lit_prune.models.families import Block
from lit_prune.models.on_disk import check_offload_folder
from lit_prune.models.tensors import digest
from lit_prune.progress import log, track
from lit_prune.pruning.base import Method
from lit_prune.recipe import Recipe, recipe_record
from lit_prune.reconstruct.finished import FinishedBlocks
from lit_prune.reconstruct.losses import BlockLosses
from lit_prune.reconstruct.reconstruction import Reconstruction, check_batches
from lit_prune.search.trial import NamedRates, Trial, Trials

DEFAULT = Recipe()
MIN_SPARSITY_BEFORE = 1e-3  # below it a model counts as dense, in which a few weights are 0 by rounding


@dataclass(frozen=True)
class Scored:
    """The result of scoring the blocks.

    Attributes:
        scores: One score per block, as the allocation defines it.
        rates: The share to remove from each block.
        target: The requested mean of the rates, weighted by ``sizes``.
        sizes: Size of each block in the unit of its rate: prunable weights, dimensions, ...
        seconds: Duration of the scoring.
        statistics: Statistics of each block, as far as they were needed.
        search: Details of a search for rates, see ``allocate.base.Refined``; empty without one.
        sparsity_before: The share that earlier cuts had removed, weighted by ``sizes``; 0 for a dense model.
        linears: The rates of each block's linears by name; None if all linears of a block have the block's rate.
        parts: The rates of each block's parts by name, for `Shrink`; None if only the blocks have rates.
    """

    scores: list[float]
    rates: list[float]
    target: float
    sizes: list[int]
    seconds: float
    statistics: list[BlockStatistics] = field(repr=False)
    search: dict[str, Any] = field(default_factory=dict)
    sparsity_before: float = 0.0
    linears: list[dict[str, float]] | None = None
    parts: list[dict[str, float]] | None = None

    @property
    def planned(self) -> float:
        """The mean of the rates, weighted by ``sizes``: the target, as nearly as the method's rates allow."""
        return weighted_mean(self.rates, self.sizes)


@dataclass(frozen=True)
class Pruned:
    """The result of pruning.

    Attributes:
        scores: One score per block.
        rates: The share to remove from each block, as planned.
        target: The requested mean of the rates, weighted by ``sizes``.
        achieved: The share that each block has lost, by earlier cuts too: of weights that are exactly 0, ...
        sparsity: The mean of ``achieved``, weighted by ``sizes``.
        sizes: Size of each block before pruning, in the unit of its rate.
        seconds: Duration of scoring and of pruning, by phase.
        search: Details of a search for rates; empty without one.
        sparsity_before: The share that earlier cuts had removed; 0 for a dense model.
        masked_before: Whether earlier cuts had masked the model.
        reshaped_before: Whether earlier cuts had changed the shape of the model.
        reconstruction: Losses of every block before and after its reconstruction; empty without one.
        linears: The planned rates of each block's linears by name; None if they all have the block's rate.
        parts: The planned rates of each block's parts by name, for `Shrink`; None if only the blocks have rates.
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
    masked_before: bool = False
    reshaped_before: bool = False
    reconstruction: list[BlockLosses] = field(default_factory=list)
    linears: list[dict[str, float]] | None = None
    parts: list[dict[str, float]] | None = None


def score(
    model: PreTrainedModel,
    batches: Iterable[Batch | Tensor],
    recipe: Recipe = DEFAULT,
    *,
    device: torch.device | str | None = None,
    statistics: CachedStatistics | None = None,
) -> Scored:
    """Returns the score of each block and the rate at which it would be pruned; the model is not changed.

    Args:
        model: A Hugging Face causal LM.
        batches: Token ids (batch, tokens), or dicts of `input_ids` and, if there is padding, `attention_mask`.
        recipe: The settings of the cut.
        device: Device on which the blocks compute, one at a time; None means the model's.
        statistics: The result of :func:`score_with_statistics` for this model and these batches, which replaces the
            pass over the batches.

    Raises:
        InputError: see :meth:`Recipe.check`; also for NaN or infinity in the activations, for no batches, and for
            statistics of another model or of other batches.
    """
    return _score(model, list(batches), recipe.resolved(model), device, _needed_for_rates(recipe), statistics)


def score_with_statistics(
    model: PreTrainedModel,
    batches: Iterable[Batch | Tensor],
    recipe: Recipe = DEFAULT,
    *,
    device: torch.device | str | None = None,
    settings: Mapping[str, Any] | None = None,
    statistics: CachedStatistics | None = None,
) -> tuple[Scored, CachedStatistics]:
    """Returns the result of :func:`score`, and the statistics, which can be used for other recipes and sparsities.

    Norms and cosines are collected for any recipe, so that they suit every allocation; Gram matrices if the method
    reads those of the unpruned model. ``statistics`` that are passed in are returned with the new scores added.
    Arguments and errors are those of :func:`score`; for ``settings`` see ``cached_statistics.Key``.
    """
    batches, recipe = list(batches), recipe.resolved(model)
    needs = frozenset({INPUTS, COSINE}) | needed_statistics(recipe)
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
    """Prunes ``model`` in place and returns the result; arguments and errors are those of :func:`score`."""
    check_offload_folder(model)
    batches, recipe = list(batches), recipe.resolved(model)
    if recipe.reconstruction is not None:
        check_batches(len(batches))
    finished = _finished(model, batches, recipe)
    scored = _score(model, batches, recipe, device, needed_statistics(recipe), statistics)
    blocks = _with_rates(recipe.find(model), scored.linears or scored.parts)
    before = recipe.method.current_rates(model, blocks) if recipe.method.changes_shapes else []
    masked_before, reshaped_before = structure.masked(model), bool(structure.structures(model))
    begin = time.perf_counter()
    with evaluating(model):
        reconstruction = None
        if recipe.reconstruction is not None:
            reconstruction = Reconstruction(recipe.reconstruction, _stream(model, blocks, batches, device), finished)
        achieved = recipe.method.apply(
            model,
            blocks,
            rates=scored.rates,
            statistics=scored.statistics,
            device=torch.device(device or model.device),
            stream=lambda: _stream(model, blocks, batches, device),
            reconstruction=reconstruction,
        )
    _check_same(blocks)
    if before and math.dist(achieved, before) < TOLERANCE:
        _tell_nothing_removed(recipe, scored.target, weighted_mean(before, scored.sizes))
    added = recipe.method.structures if recipe.method.changes_shapes else 0
    structure.write_cut(model, recipe_record(recipe), scored.rates, added=added)
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
        masked_before=masked_before,
        reshaped_before=reshaped_before,
        reconstruction=[] if reconstruction is None else reconstruction.losses,
        linears=scored.linears,
        parts=scored.parts,
    )


def _tell_nothing_removed(recipe: Recipe, target: float, before: float) -> None:
    """Logs why a cut of shapes removed nothing, unless nothing was asked for."""
    name = type(recipe.method).__name__
    if target > before + TOLERANCE:
        log(f"{name} removed nothing: a sparsity of {target:.4g} is less than half of its smallest step. Choose more.")
    elif before:
        log(f"{name} removed nothing: a sparsity of {target:.4g} was reached by an earlier cut.")


def _finished(model: PreTrainedModel, batches: Sequence[Batch | Tensor], recipe: Recipe) -> FinishedBlocks | None:
    """Returns the blocks that the same cut reconstructed before an interrupt; None if it keeps none.

    Raises:
        InputError: for a cut that the recipe does not allow, before a folder is made for it.
    """
    if recipe.reconstruction is None or recipe.reconstruction.state is None:
        return None
    recipe.check(model)
    processes = {"processes": distributed.world_size()}
    return FinishedBlocks(recipe.reconstruction.state, key_of(model, batches), recipe_record(recipe) | processes)


def _with_rates(blocks: Sequence[Block], named: Sequence[Mapping[str, float]] | None) -> list[Block]:
    """Returns the blocks with the rates of their linears or parts, if these are planned one by one."""
    if named is None:
        return list(blocks)
    return [replace(block, rates=rates) for block, rates in zip(blocks, named, strict=True)]


def _check_same(blocks: Sequence[Block]) -> None:
    """Raises RuntimeError unless all processes have the same weights, bit for bit."""
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
    """Raises InputError if ``statistics`` do not fit a cut of ``model`` by ``recipe``, with the difference."""
    statistics.check(key_of(model, batches, settings), recipe.find(model), needed_statistics(recipe))


def check_expected_statistics(
    statistics: CachedStatistics, model: PreTrainedModel, recipe: Recipe, settings: Mapping[str, Any]
) -> None:
    """Raises InputError as :func:`check_statistics` does, with those checks that need no weights and no text."""
    statistics.check(statistics.key.expected(settings), recipe.find(model), needed_statistics(recipe))


def check_search(model: PreTrainedModel, batches: Iterable[Batch | Tensor], recipe: Recipe) -> None:
    """Raises InputError if the file of losses that a search would resume from is of another search."""
    if recipe.allocation.searches:
        recipe.allocation.check_key(_search_key(model, batches, recipe))


def _search_key(model: PreTrainedModel, batches: Iterable[Batch | Tensor], recipe: Recipe) -> dict[str, Any]:
    """Returns everything that the losses of a search depend on, besides the allocation's own settings."""
    unrelated = ("allocation", "reconstruction")
    recorded = {name: value for name, value in recipe_record(recipe).items() if name not in unrelated}
    return vars(key_of(model, batches)) | recorded


def needed_statistics(recipe: Recipe) -> frozenset[str]:
    """Returns the kinds of statistics of the unpruned model that a cut reads."""
    return recipe.allocation.needs | _needed_for_pruning(recipe)


def _needed_for_rates(recipe: Recipe) -> frozenset[str]:
    """Returns the kinds of statistics of the unpruned model that the rates depend on."""
    return recipe.allocation.needs | (_needed_for_pruning(recipe) if recipe.allocation.searches else frozenset())


def _needed_for_pruning(recipe: Recipe) -> frozenset[str]:
    """Returns the kinds of statistics of the unpruned model by which the method prunes."""
    return recipe.method.needs if recipe.method.propagate == "dense" else frozenset()


def _score(
    model: PreTrainedModel,
    batches: Sequence[Batch | Tensor],
    recipe: Recipe,
    device: torch.device | str | None,
    needs: frozenset[str],
    cached: CachedStatistics | None = None,
) -> Scored:
    """Returns the scores and rates of the blocks, and their statistics named in ``needs``, on the model's device."""
    blocks, limits = recipe.bounded(model)
    if cached is not None:
        cached.check(key_of(model, batches), blocks, needs)
    begin = time.perf_counter()
    with evaluating(model):
        scores, statistics = _score_blocks(model, blocks, batches, recipe, device, needs, cached)
    threshold = MIN_SPARSITY_BEFORE if structure.record(model) else MASK_SHARE
    before = limits.current_sparsity if limits.current_sparsity >= threshold else 0.0
    if before:
        what = (
            "the weights to prune" if recipe.method.makes_zeros else f"what {type(recipe.method).__name__} can remove"
        )
        log(f"{before:.1%} of {what} is gone already, and counts toward the sparsity.")
    refined = _refine(model, blocks, batches, recipe, device, limits=limits, scores=scores, statistics=statistics)
    seconds = time.perf_counter() - begin
    return Scored(
        scores,
        refined.rates,
        limits.target,
        limits.sizes,
        seconds,
        statistics,
        search=refined.details,
        sparsity_before=before,
        linears=refined.linears,
        parts=refined.parts,
    )


def _score_blocks(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    batches: Sequence[Batch | Tensor],
    recipe: Recipe,
    device: torch.device | str | None,
    needs: frozenset[str],
    cached: CachedStatistics | None,
) -> tuple[list[float], list[BlockStatistics]]:
    """Returns the score and the statistics of every block, by one pass over the batches unless they are cached."""
    cached_scores = cached.scores_of(recipe.allocation, blocks) if cached else None
    stream = _stream(model, blocks, batches, device) if needs and not cached else None
    scores, statistics = [], []
    works = stream is not None or (cached is not None and not cached_scores)
    for block in track(blocks, "Scoring blocks") if works else blocks:
        block_statistics = cached.by_block[block.index] if cached else BlockStatistics()
        with on_device(block, torch.device(device or model.device)):
            if stream is not None:
                block_statistics = observe(stream, block, needs, advance=block is not blocks[-1])
            block_statistics = block_statistics.to(next(block.module.parameters()).device)
            if cached_scores:
                scores.append(cached_scores[block.index])
            else:
                scores.append(recipe.allocation.score(_weights(block), block_statistics))
        statistics.append(block_statistics.to(model.device))
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
    statistics: Sequence[BlockStatistics],
) -> Refined:
    """Returns the rates that follow from the scores, or better ones if the allocation searches."""
    rates = recipe.spread(limits, scores)
    named = recipe.allocation.named_rates(recipe.method.named_sizes(model, blocks))
    if not recipe.allocation.searches:
        return Refined(rates).with_named(recipe.method.finest_level, named)
    limits = replace(limits, least=max(limits.least, recipe.allocation.floor(limits.target)))
    mixtures: Mapping[str, NamedRates] = {}
    if named is None and "parts" in recipe.allocation.levels:
        least, most = limits.named_bounds
        mixtures = recipe.method.mixtures(model, blocks, rates, least=least, most=most)
    trial_device = torch.device(device or model.device)
    opening = _Opening(model, blocks, _dicts(model, batches), recipe.method, trial_device, rates, statistics)
    with evaluating(model):
        trials = Trials(opening, named, mixtures)
        return recipe.allocation.refine(rates, limits, trials=trials, key=_search_key(model, batches, recipe))


@dataclass
class _Opening:
    """Opens trials at rates of the linears or parts, or at the rates of the blocks for None; see :class:`Trials`.

    The statistics of the last one are kept, since those of a large model fit the memory only once.
    """

    model: PreTrainedModel
    blocks: Sequence[Block]
    batches: Sequence[Batch]
    method: Method
    device: torch.device
    rates: Sequence[float]
    statistics: Sequence[BlockStatistics]
    observed: tuple[NamedRates | None, Sequence[BlockStatistics]] | None = None

    @contextmanager
    def __call__(self, start: NamedRates | None) -> Iterator[Trial]:
        if self.observed is None or self.observed[0] is not start:
            self.observed = None
            statistics = self.method.trial_statistics(
                self.model,
                _with_rates(self.blocks, start),
                rates=self.rates,
                statistics=self.statistics,
                stream=lambda: _stream(self.model, self.blocks, self.batches, self.device),
                device=self.device,
            )
            self.observed = start, statistics
        _, statistics = self.observed
        with self.method.trial(
            self.model, self.blocks, statistics=statistics, device=self.device, batches=self.batches
        ) as trial:
            yield trial


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
    """Returns the batches as dicts.

    Raises:
        InputError: if there are none, or one has no token ids of two dimensions, or exceeds the model's length.
    """
    dicts = [{"input_ids": batch} if isinstance(batch, Tensor) else batch for batch in batches]
    if not dicts:
        raise InputError("`calibration` must have at least one batch, got none.")
    for batch in dicts:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise InputError(
                f"`calibration` must have batches with `input_ids` of shape (windows, tokens), got {got}: add a "
                "dimension to single windows by `ids[None]`."
            )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(batch["input_ids"].shape[-1] for batch in dicts)
    if limit is not None and longest > limit:
        raise InputError(f"`calibration.seq_length` must be at most {limit}, the model's limit, got {longest}.")
    return dicts
