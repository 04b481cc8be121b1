"""One cut of a model, with what is measured before and after it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from lit_prune.calibration.cached_statistics import CachedStatistics
from lit_prune.calibration.windows import Batch
from lit_prune.evaluation.perplexity import Measurement, measure
from lit_prune.evaluation.sizes import parameters, size_bytes
from lit_prune.evaluation.speed import tokens_per_second
from lit_prune.models.on_disk import placed
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe, recipe_record
from lit_prune.report.records import CutRecord, ModelSize, SearchRecord


class _State(NamedTuple):
    """A model right before or right after a cut: its perplexity, and its size where the cut changes that."""

    perplexity: Measurement | None
    size: ModelSize | None


def cut(
    model: PreTrainedModel,
    recipe: Recipe,
    calibration: tuple[list[Batch], dict[str, Any]],
    validation: tuple[Iterable[Batch], str] | None,
    device: torch.device,
    *,
    measured: bool = True,
    moves: bool = True,
    step: int = 0,
    stored: CachedStatistics | None = None,
) -> CutRecord:
    """Prunes ``model`` in place; returns the record of the cut.

    Args:
        model: The causal LM, without an adapter.
        recipe: What is to be removed.
        calibration: Batches, and what the report says of them.
        validation: Batches whose perplexity is measured before and after, and what they are.
        device: Where blocks compute, and where the model is measured.
        measured: Whether to measure at all.
        moves: Whether the model is moved to ``device`` to be measured; else it stays, and its blocks are moved in turn.
        step: The optimizer step before which the cut comes.
        stored: Statistics of the model and the batches, which are read in place of a pass.
    """
    batches, settings = calibration
    before = _measure(model, "before", recipe, validation, device, measured, moves)
    pruned = prune(model, batches, recipe, device=device, statistics=stored)
    after = _measure(model, "after", recipe, validation, device, measured, moves)
    measurements = {"before": before.perplexity, "after": after.perplexity}
    sizes = {"before": before.size, "after": after.size}
    return CutRecord(
        step=step,
        perplexity={when: result.perplexity for when, result in measurements.items() if result is not None},
        seconds=_seconds(before.perplexity, "before") | pruned.seconds | _seconds(after.perplexity, "after"),
        protocol=None if after.perplexity is None else after.perplexity.protocol,
        calibration=settings,
        size={when: size for when, size in sizes.items() if size is not None},
        recipe=recipe_record(recipe),
        scores=pruned.scores,
        rates=pruned.rates,
        target=pruned.target,
        achieved=pruned.achieved,
        sparsity=pruned.sparsity,
        search=SearchRecord.from_dict(pruned.search),
        sparsity_before=pruned.sparsity_before,
    )


def _measure(
    model: PreTrainedModel,
    when: str,
    recipe: Recipe,
    validation: tuple[Iterable[Batch], str] | None,
    device: torch.device,
    measured: bool,
    moves: bool,
) -> _State:
    """The state of the model now, as far as it is to be measured."""
    model = placed(model, device) if moves else model
    perplexity = size = None
    if measured and validation is not None:
        label = f"Perplexity, {when} the cut"
        perplexity = measure(model, *validation, label=label, device=device, streamed=not moves)
    if recipe.method.changes_shapes:
        speed = tokens_per_second(model) if measured else None
        size = ModelSize(parameters(model), size_bytes(model), speed)
    return _State(perplexity, size)


def _seconds(measured: Measurement | None, when: str) -> dict[str, float]:
    return {} if measured is None else {f"perplexity_{when}": measured.seconds}
