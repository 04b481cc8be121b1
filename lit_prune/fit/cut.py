"""One cut of a model, and the measurements before and after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from lit_prune.calibration.cached_statistics import CachedStatistics
from lit_prune.calibration.windows import Batch
from lit_prune.evaluation.perplexity import Measurement, measure
from lit_prune.evaluation.sizes import parameters, size_bytes
from lit_prune.evaluation.speed import tokens_per_second
from lit_prune.models.on_disk import placed
from lit_prune.pipeline import Pruned
from lit_prune.recipe import Recipe, recipe_record
from lit_prune.report.records import CutRecord, ModelSize, SearchRecord


class _State(NamedTuple):
    """Measurements of a model before or after a cut: its perplexity, and its size if the cut changes shapes."""

    perplexity: Measurement | None
    size: ModelSize | None


@dataclass(frozen=True)
class CutInputs:
    """The inputs of a cut, besides the model.

    Args:
        recipe: The pruning recipe.
        batches: Calibration batches.
        calibration: Description of the batches, for the report.
        validation: Validation batches and their description; None measures no perplexity.
        device: Device that blocks are pruned and the model is measured on.
        measured: Whether to measure perplexity and speed.
        moves: Whether to move the whole model to ``device`` to measure it; otherwise its blocks are moved one at a
            time.
        step: Optimizer step before which the cut is made.
        statistics: Cached statistics of the model and the batches, used instead of running the model.
    """

    recipe: Recipe
    batches: list[Batch]
    calibration: dict[str, Any]
    validation: tuple[Iterable[Batch], str] | None
    device: torch.device
    measured: bool = True
    moves: bool = True
    step: int = 0
    statistics: CachedStatistics | None = None


class MeasuredCut:
    """A cut in progress.

    Args:
        inputs: The inputs of the cut.

    Attributes:
        pruned: The result of ``pipeline.prune``, assigned in the body of :func:`measured_cut`.
        record: The record of the cut, available after that body.
    """

    pruned: Pruned
    record: CutRecord

    def __init__(self, inputs: CutInputs) -> None:
        self.inputs = inputs


@contextmanager
def measured_cut(model: PreTrainedModel, inputs: CutInputs) -> Iterator[MeasuredCut]:
    """Measures ``model``, a causal LM without an adapter, before and after the body, which prunes it.

    The body assigns the result of ``pipeline.prune`` to ``pruned``; afterwards ``record`` is set. The call is left to
    the body to keep the call stack from a Trainer's hook to the score of a weight short:

        with measured_cut(model, inputs) as cut:
            cut.pruned = prune(model, inputs.batches, inputs.recipe)
    """
    cut = MeasuredCut(inputs)
    before = _measure(model, "before", inputs)
    yield cut
    cut.record = _record(inputs, before, cut.pruned, _measure(model, "after", inputs))


def _record(inputs: CutInputs, before: _State, pruned: Pruned, after: _State) -> CutRecord:
    measurements = {"before": before.perplexity, "after": after.perplexity}
    sizes = {"before": before.size, "after": after.size}
    return CutRecord(
        step=inputs.step,
        perplexity={when: result.perplexity for when, result in measurements.items() if result is not None},
        seconds=_seconds(before.perplexity, "before") | pruned.seconds | _seconds(after.perplexity, "after"),
        protocol=None if after.perplexity is None else after.perplexity.protocol,
        calibration=inputs.calibration,
        size={when: size for when, size in sizes.items() if size is not None},
        recipe=recipe_record(inputs.recipe),
        scores=pruned.scores,
        rates=pruned.rates,
        target=pruned.target,
        achieved=pruned.achieved,
        sparsity=pruned.sparsity,
        search=SearchRecord.from_dict(pruned.search),
        sparsity_before=pruned.sparsity_before,
        reconstruction=pruned.reconstruction,
        linears=pruned.linears,
    )


def _measure(model: PreTrainedModel, when: str, inputs: CutInputs) -> _State:
    """Returns the measurements of the model that ``inputs`` ask for."""
    model = placed(model, inputs.device) if inputs.moves else model
    perplexity = size = None
    if inputs.measured and inputs.validation is not None:
        label = f"Perplexity, {when} the cut"
        streamed = not inputs.moves
        perplexity = measure(model, *inputs.validation, label=label, device=inputs.device, streamed=streamed)
    if inputs.recipe.method.changes_shapes:
        speed = tokens_per_second(model) if inputs.measured else None
        size = ModelSize(parameters(model), size_bytes(model), speed)
    return _State(perplexity, size)


def _seconds(measured: Measurement | None, when: str) -> dict[str, float]:
    return {} if measured is None else {f"perplexity_{when}": measured.seconds}
