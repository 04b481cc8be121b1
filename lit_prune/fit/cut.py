"""One cut of a model, with what is measured before and after it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from lit_prune.calibration.cached_statistics import CachedStatistics
from lit_prune.calibration.windows import Batch
from lit_prune.evaluation.perplexity import measure
from lit_prune.evaluation.sizes import parameters, size_bytes
from lit_prune.evaluation.speed import tokens_per_second
from lit_prune.models.on_disk import placed
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe, recipe_record

Done = dict[str, Any]


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
) -> Done:
    """Prunes ``model`` in place; returns what was done, in plain types.

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
    done: Done = {"step": step, "perplexity": {}, "seconds": {}, "protocol": None, "calibration": settings, "size": {}}
    given = validation if measured else None
    _look(model, "before", done, recipe, given, device, measured, moves)
    pruned = prune(model, batches, recipe, device=device, stored=stored)
    done["seconds"] |= pruned.seconds
    _look(model, "after", done, recipe, given, device, measured, moves)
    return done | {
        "recipe": recipe_record(recipe),
        "scores": pruned.scores,
        "rates": pruned.rates,
        "target": pruned.target,
        "achieved": pruned.achieved,
        "sparsity": pruned.sparsity,
        "search": pruned.search,
        "found": pruned.found,
    }


def _look(
    model: PreTrainedModel,
    when: str,
    done: Done,
    recipe: Recipe,
    validation: tuple[Iterable[Batch], str] | None,
    device: torch.device,
    measured: bool,
    moves: bool,
) -> None:
    """Adds to ``done`` what the model is worth now, and what it weighs where the cut changes that."""
    model = placed(model, device) if moves else model
    if validation is not None:
        label = f"Perplexity, {when} the cut"
        found = measure(model, *validation, label=label, device=device, streamed=not moves)
        done["perplexity"][when] = found.perplexity
        done["seconds"][f"perplexity_{when}"] = found.seconds
        done["protocol"] = found.protocol
    if recipe.method.changes_shapes:
        speed = tokens_per_second(model) if measured else None
        done["size"][when] = {"parameters": parameters(model), "bytes": size_bytes(model), "speed": speed}
