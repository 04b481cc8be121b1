"""Calibrate, allocate, prune: the whole of it, without Lightning. Read this file first.

scores = score(model, batches, recipe)     # look, change nothing
pruned = prune(model, batches, recipe)     # score, spread the budget over the blocks, remove weights in place

In several processes (torch.distributed) each is given all batches, runs its share, and comes to the same weights.

Calibrate once, and try many recipes on copies of the model:

scored, stored = look(model, batches, recipe)
pruned = prune(copy, batches, other_recipe, stored=stored)
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
from lit_prune.models.on_disk import check_working
from lit_prune.progress import log, track
from lit_prune.recipe import Recipe, recipe_record

DEFAULT = Recipe()
TOLD = 1e-3  # share of zeros that is no accident of a weight's data type


@dataclass(frozen=True)
class Scored:
    """What a look at the blocks gave.

    Attributes:
        scores: One score a block, as the allocation defines it.
        rates: The share that each block is to give.
        target: The mean that the rates were to have, weighted by ``sizes``.
        sizes: What each block has to give: its prunable weights, for slices its dimensions.
        seconds: How long it took.
        observed: What passed through each block, where statistics were taken.
        search: What an allocation that tries rates out tells of it, see ``allocate.base.Refined``.
        found: The share that was gone before, weighted by ``sizes``; 0 for a dense model.
    """

    scores: list[float]
    rates: list[float]
    target: float
    sizes: list[int]
    seconds: float
    observed: list[BlockStatistics] = field(repr=False)
    search: dict[str, Any] = field(default_factory=dict)
    found: float = 0.0

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
        achieved: The share that each block has given: of weights that are exactly 0 now, or of dimensions.
        sparsity: The same over all blocks.
        sizes: What each block had to give: its prunable weights, for slices its dimensions.
        seconds: How long scoring and pruning took, by phase.
        search: What an allocation that tries rates out tells of it.
        found: The share that was gone before; 0 for a dense model.
    """

    scores: list[float]
    rates: list[float]
    target: float
    achieved: list[float]
    sparsity: float
    sizes: list[int]
    seconds: dict[str, float]
    search: dict[str, Any] = field(default_factory=dict)
    found: float = 0.0


def score(
    model: PreTrainedModel,
    batches: Iterable[Batch | Tensor],
    recipe: Recipe = DEFAULT,
    *,
    device: torch.device | str | None = None,
    stored: CachedStatistics | None = None,
) -> Scored:
    """Returns each block's score and the rate that it would give, and changes nothing.

    Args:
        model: A Hugging Face causal LM.
        batches: Token ids (batch, tokens), or dicts of `input_ids` and, where there is padding, `attention_mask`.
        recipe: What is to be removed, and how.
        device: Where blocks compute, one at a time; None means where the model is.
        stored: Statistics that :func:`look` took of this model over these batches: nothing runs then.

    Raises:
        InputError: see :meth:`Recipe.check`; also for NaN or infinity in the activations, for no batches, and for
            statistics that were taken of something else.
    """
    return _score(model, list(batches), recipe, device, _looks(recipe), stored)


def look(
    model: PreTrainedModel,
    batches: Iterable[Batch | Tensor],
    recipe: Recipe = DEFAULT,
    *,
    device: torch.device | str | None = None,
    settings: Mapping[str, Any] | None = None,
    stored: CachedStatistics | None = None,
) -> tuple[Scored, CachedStatistics]:
    """Returns what :func:`score` does, and the statistics to be kept for other recipes and sparsities.

    Norms and cosines are taken whatever the recipe, and the Gram matrices where its method reads them unpruned, so that
    they serve every allocation; statistics that were ``stored`` are handed on, with the new scores beside theirs.
    Arguments and errors as in :func:`score`; ``settings`` as in ``stored.Key``.
    """
    batches, needs = list(batches), frozenset({INPUTS, COSINE}) | _needs(recipe)
    scored = _score(model, batches, recipe, device, needs, stored)
    taken = stored or CachedStatistics(key_of(model, batches, settings), needs, scored.observed, {})
    return scored, replace(taken, scores=taken.scores | {repr(recipe.allocation): scored.scores})


def prune(
    model: PreTrainedModel,
    batches: Iterable[Batch | Tensor],
    recipe: Recipe = DEFAULT,
    *,
    device: torch.device | str | None = None,
    stored: CachedStatistics | None = None,
) -> Pruned:
    """Prunes ``model`` in place, and returns what was done; arguments and errors as in :func:`score`."""
    check_working(model)
    batches, method = list(batches), recipe.method
    scored = _score(model, batches, recipe, device, _needs(recipe), stored)
    blocks = recipe.find(model)
    begin = time.perf_counter()
    with evaluating(model):
        achieved = method.apply(
            model,
            blocks,
            rates=scored.rates,
            observed=scored.observed,
            device=torch.device(device or model.device),
            stream=lambda: _stream(model, blocks, batches, device),
        )
    _check_same(blocks)
    total = weighted_mean(achieved, scored.sizes)
    structure.write(model, recipe=recipe_record(recipe), rates=scored.rates)
    seconds = {"score": scored.seconds, "prune": time.perf_counter() - begin}
    return Pruned(
        scores=scored.scores,
        rates=scored.rates,
        target=scored.target,
        achieved=achieved,
        sparsity=total,
        sizes=scored.sizes,
        seconds=seconds,
        search=scored.search,
        found=scored.found,
    )


def _check_same(blocks: Sequence[Block]) -> None:
    """Raises RuntimeError where the processes have not come to the same weights, to the bit."""
    if distributed.number() > 1:
        weights = [{name: digest(tensor) for name, tensor in block.module.state_dict().items()} for block in blocks]
        distributed.check_same("The pruned weights", weights)


def check_statistics(
    stored: CachedStatistics,
    model: PreTrainedModel,
    batches: Iterable[Batch | Tensor],
    recipe: Recipe,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Asks whether ``stored`` serves a cut of ``model`` by ``recipe``.

    Raises:
        InputError: if not, saying what differs.
    """
    stored.check(key_of(model, batches, settings), recipe.find(model), _needs(recipe))


def check_expected_statistics(
    stored: CachedStatistics, model: PreTrainedModel, recipe: Recipe, settings: Mapping[str, Any]
) -> None:
    """Asks the same of a ``model`` without weights, before the text is read, as far as that can be told."""
    stored.check(stored.key.expected(settings), recipe.find(model), _needs(recipe))


def _needs(recipe: Recipe) -> frozenset[str]:
    """The statistics of the unpruned model that a cut reads."""
    return _looks(recipe) | (recipe.method.needs if recipe.method.propagate == "dense" else frozenset())


def _looks(recipe: Recipe) -> frozenset[str]:
    """The statistics of the unpruned model that the rates hang on."""
    return recipe.allocation.needs | (recipe.method.needs if recipe.allocation.searches else frozenset())


def _score(
    model: PreTrainedModel,
    batches: Sequence[Batch | Tensor],
    recipe: Recipe,
    device: torch.device | str | None,
    needs: frozenset[str],
    stored: CachedStatistics | None = None,
) -> Scored:
    """Scores the blocks, and keeps the statistics that are needed where the model is."""
    blocks, limits = recipe.bounded(model)
    key = key_of(model, batches) if stored is not None or recipe.allocation.searches else None
    if stored is not None:
        assert key is not None
        stored.check(key, blocks, needs)
    begin = time.perf_counter()
    known = stored.scores_of(recipe.allocation, blocks) if stored else None
    with evaluating(model):
        stream = _stream(model, blocks, batches, device) if needs and not stored else None
        scores, observed = [], []
        for block in track(blocks, "Scoring blocks"):
            seen = stored.observed[block.index] if stored else BlockStatistics()
            with on_device(block, torch.device(device or model.device)):
                if stream is not None:
                    seen = observe(stream, block, needs, advance=block is not blocks[-1])
                seen = seen.to(next(block.module.parameters()).device)
                scores.append(known[block.index] if known else recipe.allocation.score(_weights(block), seen))
            observed.append(seen.to(model.device))
    found = limits.current_sparsity if limits.current_sparsity >= TOLD else 0.0
    if found:
        log(f"{found:.1%} of the weights to prune are pruned already: they stay so, and count toward the sparsity.")
    refined = _refine(model, blocks, batches, recipe, device, limits=limits, scores=scores, observed=observed, key=key)
    seconds = time.perf_counter() - begin
    return Scored(scores, refined.rates, limits.target, limits.sizes, seconds, observed, refined.details, found)


def _refine(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    batches: Sequence[Batch | Tensor],
    recipe: Recipe,
    device: torch.device | str | None,
    *,
    limits: Limits,
    scores: Sequence[float],
    observed: Sequence[BlockStatistics],
    key: Key | None,
) -> Refined:
    """Spreads the budget by the scores, and tries other rates where the allocation does."""
    rates = recipe.spread(limits, scores)
    if not recipe.allocation.searches:
        return Refined(rates)
    assert key is not None
    recorded = {name: value for name, value in recipe_record(recipe).items() if name != "allocation"}
    dicts = _dicts(model, batches)
    place = torch.device(device or model.device)
    trying = recipe.method.trial(model, blocks, observed=observed, device=place, batches=dicts)
    with evaluating(model), trying as trial:
        return recipe.allocation.refine(rates, limits, trial=trial, key=vars(key) | recorded)


def _weights(block: Block) -> dict[str, Tensor]:
    return {name: linear.weight_OI for name, linear in block.linears.items()}


def _stream(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    batches: Iterable[Batch | Tensor],
    device: torch.device | str | None,
) -> Stream:
    own = distributed.share(_dicts(model, batches))
    return Stream(model, blocks, own, torch.device(device or model.device))


def _dicts(model: PreTrainedModel, batches: Iterable[Batch | Tensor]) -> list[Batch]:
    """The batches as dicts, where the model can take them."""
    dicts = [{"input_ids": batch} if isinstance(batch, Tensor) else batch for batch in batches]
    if not dicts:
        raise InputError("`calibration` must have at least one batch, got none.")
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(batch["input_ids"].shape[-1] for batch in dicts)
    if limit is not None and longest > limit:
        raise InputError(f"`calibration.seq_length` must be at most {limit}, the model's limit, got {longest}.")
    return dicts
