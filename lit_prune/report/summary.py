"""Builds the report of a run from the model at its end and the records of its cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from lit_prune.allocate.budget import Budget
from lit_prune.evaluation.sizes import full_bytes, parameters, pruned
from lit_prune.export.formats import ExportFormat, HuggingFace
from lit_prune.export.plan import ExportPlan
from lit_prune.masks.zeros import share_of_zeros, zero_shares
from lit_prune.models import structure
from lit_prune.models.quantised import quantisation
from lit_prune.recipe import Recipe
from lit_prune.recover import adapter_config
from lit_prune.report.records import Baseline, CutRecord, ModelSize
from lit_prune.report.report import Report, versions
from lit_prune.report.sections import CutSummary, Quantised, Shape, Sparsity, TargetSize
from lit_prune.schedule import Cut


def summary(
    plan: ExportPlan,
    recipe: Recipe | None,
    cuts: Sequence[CutRecord],
    baseline: Baseline | None = None,
    cuts_not_made: Sequence[Cut] = (),
    *,
    trained: bool = True,
    format: ExportFormat = HuggingFace(),  # noqa: B008 (frozen)
) -> Report:
    """Returns the report of a run, to which the measurements of the final model are still to be added.

    Scores, rates and calibration are those of the last cut; the field `cuts` has those of every cut.

    Args:
        plan: Plan of the export.
        recipe: The recipe; None for a training without cuts.
        cuts: Records of the cuts that were made.
        baseline: Record of the model before a training without cuts.
        cuts_not_made: Planned cuts that the training ended before.
        trained: Whether the model was trained, see :func:`last_name`.
        format: Format of the export, which counts the bytes.
    """
    last, record = cuts[-1] if cuts else None, structure.record(plan.model)
    start, first = baseline or last, _first_name(plan.base, recipe, cuts)
    return Report(
        perplexity=_perplexities(first, recipe, cuts, baseline, trained),
        protocol=None if start is None else start.protocol,
        sparsity=_sparsity(plan, recipe, cuts, baseline),
        recipe=_recipe(last, baseline),
        calibration=None if last is None else last.calibration,
        scores=None if last is None else last.scores,
        rates=None if last is None else last.rates,
        linears=None if last is None else last.linears,
        parts=None if last is None else last.parts,
        achieved=None if start is None else start.achieved,
        search=None if last is None else last.search,
        reconstruction=() if last is None else last.reconstruction,
        parameters=parameters(plan.plain),
        untied_parameters=parameters(plan.plain) - parameters(plan.base) if plan.unties_head else None,
        recovery=record.get("recovery"),
        distillation=record.get("distillation"),
        adapter=adapter_config(plan.model),
        merged=plan.merged,
        adapter_parameters=parameters(plan.model) - parameters(plan.base),
        bytes=format.bytes(plan),
        bytes_unpacked=None if format.stores_zeros else plan.bytes,
        dtype=format.dtype(plan),
        dtype_in_memory=str(plan.model.dtype).removeprefix("torch."),
        quantised=_quantised(plan),
        shape=_shape(plan, recipe, cuts, baseline, format),
        structures=structure.describe(plan.base),
        target=_target(plan, recipe, cuts, format),
        target_perplexity=None if last is None else last.found,
        cuts=[CutSummary.of(cut) for cut in cuts],
        cuts_not_made=cuts_not_made,
        baseline=None if baseline is None else baseline.record,
        seconds=_seconds(cuts, first) if baseline is None else baseline.seconds,
        versions=versions(),
    )


def _recipe(last: CutRecord | None, baseline: Baseline | None) -> Mapping[str, Any] | None:
    """Returns the recipe of the last cut, in this run or a recorded earlier one; None if there is none."""
    if baseline is None:
        return None if last is None else last.recipe
    recipe = baseline.record.get("recipe")
    return recipe if recipe and "method" in recipe else None


def _sparsity(
    plan: ExportPlan, recipe: Recipe | None, cuts: Sequence[CutRecord], baseline: Baseline | None
) -> Sparsity:
    """Returns the requested sparsity and the share of zeros that the model has now."""
    zero, total = pruned(plan.base if plan.outline.masked else plan.plain)[0], parameters(plan.plain)
    if recipe is not None and recipe.method.makes_zeros:
        achieved = share_of_zeros(recipe.find(plan.base, quantised=True))
        target = cuts[-1].target if cuts else recipe.sparsity
        return Sparsity(
            requested=cuts[-1].recipe["sparsity"] if cuts else recipe.sparsity,
            budget=recipe.budget,
            target=target,
            achieved_linears=achieved,
            missed=achieved - target,
            before=_sparsity_before(cuts) or None,
            achieved_all=zero / total,
        )
    if baseline is not None and baseline.achieved:
        earlier = baseline.record.get("recipe") or {}
        return Sparsity(
            requested=None if _changed_shape(baseline) else earlier.get("sparsity"),
            budget=earlier.get("budget", "linears"),
            before=baseline.sparsity,
            achieved_linears=zero_shares(plan.base)[1],
            achieved_all=zero / total,
        )
    kept = zero_shares(plan.base)[1] if plan.outline.masked else 0.0  # by a cut of shapes, of earlier masks
    return Sparsity(requested=None, achieved_linears=kept, achieved_all=zero / total)


def _sparsity_before(cuts: Sequence[CutRecord]) -> float:
    """Returns the share of zeros before the first cut; 0 for a dense model."""
    return cuts[0].sparsity_before if cuts else 0.0


def _quantised(plan: ExportPlan) -> Quantised | None:
    """Returns the quantisation of the trained model and the form of its export; None in full precision."""
    kind, form = quantisation(plan.model), plan.outline.form
    if kind is None:
        return None
    return Quantised(**kind, form=None if form == "quantised" else form, bytes_unquantised=full_bytes(plan.plain))


def _first_name(base: PreTrainedModel, recipe: Recipe | None, cuts: Sequence[CutRecord]) -> str:
    """Returns the name of the first perplexity: `dense`, or `before` if the model was pruned or trained before."""
    if cuts:
        first = cuts[0]
        changed = first.sparsity_before or first.masked_before or first.reshaped_before or first.step > 0
    else:
        changed = recipe is not None and (structure.masked(base) or bool(structure.structures(base)))
    return "before" if changed else "dense"


def last_name(recipe: Recipe | None, trained: bool) -> str:
    """Returns the name of the perplexity at the end of a run: `recovered` if the run cuts, else `after` the training.

    It is `exported` for a model that was neither cut nor trained.
    """
    if recipe is not None:
        return "recovered"
    return "after" if trained else "exported"


def _perplexities(
    first: str, recipe: Recipe | None, cuts: Sequence[CutRecord], baseline: Baseline | None, trained: bool
) -> dict[str, float | None]:
    """Returns the perplexities around the cuts, and None for the one that is measured at the end of the run."""
    end: dict[str, float | None] = {last_name(recipe, trained): None}
    if recipe is None:
        return {**({} if baseline is None else baseline.perplexity), **end}
    if not cuts:
        return {first: None, "pruned": None, **end}
    last = cuts[-1].perplexity
    quantised = {name: value for name, value in last.items() if name == "quantised"}
    return {first: cuts[0].perplexity.get("before"), "pruned": last.get("after"), **quantised, **end}


def _seconds(cuts: Sequence[CutRecord], first: str) -> dict[str, float]:
    """Returns the seconds of all cuts, summed by part; the perplexity before the first cut is called ``first``."""
    total: dict[str, float] = {}
    for index, cut in enumerate(cuts):
        for name, seconds in cut.seconds.items():
            if name in ("perplexity_before", "perplexity_after"):
                name = "perplexity_pruned" if index or name == "perplexity_after" else f"perplexity_{first}"
            total[name] = total.get(name, 0.0) + seconds
    return total


def _shape(
    plan: ExportPlan,
    recipe: Recipe | None,
    cuts: Sequence[CutRecord],
    baseline: Baseline | None,
    format: ExportFormat,
) -> Shape | None:
    """Returns the structure of the last cut, in this run or before a training without cuts; None if there is none."""
    requested, described = _requested(recipe, cuts[-1] if cuts else None, baseline), structure.describe(plan.base)
    if requested is None or not described or (recipe is not None and not cuts):  # training may have ended before it
        return None
    sizes = (_size_before(cuts), cuts[-1].size.get("after") if cuts else None)
    before, pruned = (None if size is None else _in_written_type(size, plan) for size in sizes)
    if pruned is not None and format.opened_as_stored:
        pruned = replace(pruned, bytes=format.bytes(plan))
    share, budget = requested
    earlier: Mapping[str, Any] = {} if baseline is None else baseline.record
    count = earlier.get(structure.ADDED) or 1 if recipe is None else recipe.method.structures
    shape, reference = structure.joined(described[-count:], "shrink"), _first_name(plan.base, recipe, cuts)
    return Shape(shape, share, before=before, pruned=pruned, budget=budget, reference=reference)


def _requested(recipe: Recipe | None, last: CutRecord | None, baseline: Baseline | None) -> tuple[float, Budget] | None:
    """Returns the share that a cut of shapes was to remove and its budget; None if there was no such cut."""
    earlier: Mapping[str, Any] = _recipe(last, baseline) or {}
    if recipe is not None and not recipe.method.changes_shapes:
        return None
    if recipe is None and (baseline is None or not _changed_shape(baseline)):
        return None
    if recipe is not None and recipe.target is None and (last is None or last.found is None):
        return recipe.sparsity, recipe.budget
    return None if earlier.get("sparsity") is None else (earlier["sparsity"], earlier.get("budget", "linears"))


def _changed_shape(baseline: Baseline) -> bool:
    """Returns whether the last cut before a training without cuts changed shapes."""
    added = baseline.record.get(structure.ADDED)
    return bool(added) if added is not None else not baseline.achieved


def _target(
    plan: ExportPlan, recipe: Recipe | None, cuts: Sequence[CutRecord], format: ExportFormat
) -> TargetSize | None:
    """Returns the size that was asked for, and that of the exported weights; None without a target, or without cuts."""
    if recipe is None or recipe.target is None or not cuts:
        return None
    unit = recipe.target.removeprefix("target_")
    achieved = parameters(plan.plain) if unit == "parameters" else format.bytes(plan)
    return TargetSize(unit, int(getattr(recipe, recipe.target)), achieved)


def _size_before(cuts: Sequence[CutRecord]) -> ModelSize | None:
    """Returns the size before the first cut, whose speed is that after the last one over the ratios of all cuts.

    Both speeds of a cut are measured by turns, and those of different cuts at different times.
    """
    first = cuts[0].size.get("before") if cuts else None
    if first is None or len(cuts) == 1:
        return first
    speed = cuts[-1].size["after"].speed
    for cut in cuts:
        before, after = cut.size["before"].speed, cut.size["after"].speed
        if speed is None or before is None or after is None:
            return replace(first, speed=None)
        prefill, decode = speed.prefill * before.prefill / after.prefill, speed.decode * before.decode / after.decode
        speed = replace(speed, prefill=prefill, decode=decode)
    return replace(first, speed=speed)


def _in_written_type(size: ModelSize, plan: ExportPlan) -> ModelSize:
    """Returns a size in memory with the bytes that the parameters would have in the data type that is written."""
    return replace(size, bytes=size.bytes * plan.plain.dtype.itemsize // plan.model.dtype.itemsize)
