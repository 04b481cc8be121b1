"""One cut of a model, and the measurements before and after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import psutil
import torch
from transformers import PreTrainedModel

from lit_prune.calibration.cached_statistics import CachedStatistics
from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import Measurement, measure
from lit_prune.evaluation.sizes import parameters, size_bytes
from lit_prune.evaluation.speed import compare_speed, tokens_per_second, with_random_weights, without_weights
from lit_prune.models.on_disk import on_disk, placed
from lit_prune.pipeline import Pruned
from lit_prune.progress import log
from lit_prune.recipe import Recipe, recipe_record
from lit_prune.report.records import CutRecord, ModelSize, SearchRecord
from lit_prune.target_perplexity import FoundSparsity, find_sparsity


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
        found: The search for the recipe's sparsity; None if that was given.
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
    found: FoundSparsity | None = None

    def with_sparsity(self, model: PreTrainedModel, perplexity: float | None) -> CutInputs:
        """Returns the inputs with the greatest sparsity that keeps ``perplexity``; unchanged if that is None.

        Raises:
            InputError: see ``find_sparsity``, and without validation batches.
        """
        if perplexity is None:
            return self
        if self.validation is None:
            raise InputError("`pruning.target_perplexity` must have validation batches, got none: give some.")
        settings: dict[str, Any] = {"device": self.device, "statistics": self.statistics}
        found = find_sparsity(model, self.batches, self.recipe, self.validation, perplexity, **settings)
        return replace(self, recipe=replace(self.recipe, sparsity=found.sparsity), found=found)


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
    compared = inputs.measured and inputs.moves and inputs.recipe.method.changes_shapes
    uncut = without_weights(model) if compared and _has_room(model, inputs.device) else None
    before = _measure(model, "before", inputs, alone=uncut is None)
    yield cut
    after = _measure(model, "after", inputs, alone=uncut is None)
    if uncut is not None:
        before, after = _by_turns(uncut, before, model, after)
    cut.record = _record(inputs, before, cut.pruned, after)


def _has_room(model: PreTrainedModel, device: torch.device) -> bool:
    """Returns whether a second model of this size may be allocated on ``device``.

    A model on disk may be larger than memory; and for want of memory a GPU raises an error, but the system ends the
    process.
    """
    if on_disk(model) is not None:
        return False
    return device.type != "cpu" or size_bytes(model) < psutil.virtual_memory().available


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
        masked_before=pruned.masked_before,
        reshaped_before=pruned.reshaped_before,
        reconstruction=pruned.reconstruction,
        linears=pruned.linears,
        parts=pruned.parts,
        found=inputs.found,
    )


def _measure(model: PreTrainedModel, when: str, inputs: CutInputs, *, alone: bool) -> _State:
    """Returns the measurements of the model that ``inputs`` ask for; those of its speed only if ``alone``."""
    model = placed(model, inputs.device) if inputs.moves else model
    perplexity = None
    if inputs.measured and inputs.validation is not None:
        label = f"Perplexity, {when} the cut"
        streamed = not inputs.moves
        perplexity = measure(model, *inputs.validation, label=label, device=inputs.device, streamed=streamed)
    if not inputs.recipe.method.changes_shapes:
        return _State(perplexity, None)
    speed = tokens_per_second(model) if inputs.measured and alone else None
    return _State(perplexity, ModelSize(parameters(model), size_bytes(model), speed))


def _by_turns(uncut: PreTrainedModel, before: _State, model: PreTrainedModel, after: _State) -> tuple[_State, _State]:
    """Returns both states with speeds that are measured by turns.

    Args:
        uncut: The model before the cut, without weights.
        before: Its state.
        model: The model after the cut, on the device that it was measured on.
        after: Its state.

    Without memory for both models, the states are returned as they are.
    """
    try:
        speeds = compare_speed([with_random_weights(uncut, model), model])
    except torch.OutOfMemoryError:
        log("The speed before the cut was not measured: both models together do not fit into the device's memory.")
        return before, after
    states = [
        state._replace(size=replace(state.size, speed=speed))
        for state, speed in zip((before, after), speeds, strict=True)
        if state.size is not None
    ]
    return states[0], states[1]


def _seconds(measured: Measurement | None, when: str) -> dict[str, float]:
    return {} if measured is None else {f"perplexity_{when}": measured.seconds}
