"""The report of a run: what the model is now, and what every cut did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from lit_prune.evaluation.sizes import full_bytes, parameters, pruned
from lit_prune.export.formats import ExportFormat, HuggingFace
from lit_prune.export.plan import ExportPlan
from lit_prune.masks.zeros import zero_shares
from lit_prune.models import structure
from lit_prune.models.quantised import quantisation
from lit_prune.recipe import Recipe
from lit_prune.recover import adapter_config
from lit_prune.report import report as reports
from lit_prune.report.records import Baseline, CutRecord, to_plain
from lit_prune.report.report import Report
from lit_prune.schedule import Cut


def summary(
    plan: ExportPlan,
    recipe: Recipe | None,
    records: Sequence[CutRecord],
    baseline: Baseline | None = None,
    following: Sequence[Cut] = (),
    *,
    format: ExportFormat = HuggingFace(),  # noqa: B008 (frozen)
) -> Report:
    """Returns the report of the model of ``plan``, and of the cuts that were made (see DynamicPruningCallback).

    What it says of scores, rates and the like is the last cut's; `cuts` tells every one. Where nothing was cut, it is
    what ``baseline`` says of the model before that training. Where it ended early, cuts were still ``following``.
    """
    cuts, kept = to_plain(list(records)), to_plain(baseline)
    model, plain, done = plan.model, plan.base, dict(cuts[-1]) if cuts else {}
    sparsity: dict[str, Any] = {"requested": None, "achieved_linears": 0.0}
    if kept is not None:
        done = _known(kept)
        sparsity = _kept_sparsity(plain, kept)
    if recipe is not None and recipe.method.makes_zeros:
        blocks = recipe.find(plain, quantised=True)
        zero, total = sum(block.pruned for block in blocks), sum(block.size for block in blocks)
        target = done.get("target", recipe.sparsity)
        sparsity = {
            "requested": done["recipe"]["sparsity"] if done.get("recipe") else recipe.sparsity,
            "budget": recipe.budget,
            "target": target,
            "achieved_linears": zero / total,
            "missed": zero / total - target,
        } | _found(cuts)
    zero, total = pruned(plain if plan.outline.masked else plan.plain)
    return {
        "perplexity": _perplexities(plain, recipe, cuts) if kept is None else {**kept["perplexity"], "after": None},
        "protocol": done.get("protocol"),
        "sparsity": sparsity | {"achieved_all": zero / total},
        "recipe": done.get("recipe"),
        "calibration": done.get("calibration"),
        "scores": done.get("scores"),
        "rates": done.get("rates"),
        "achieved": done.get("achieved"),
        "search": done.get("search", {}),
        "parameters": parameters(plain),
        "recovery": structure.record(model).get("recovery"),
        "distillation": structure.record(model).get("distillation"),
        "adapter": adapter_config(model),
        "merged": plan.merged,
        "adapter_parameters": parameters(model) - parameters(plain),
        "bytes": format.bytes(plan),
        "quantised": _quantised(plan),
        "slice": _slice(plain, recipe, done),
        "sliced": any(shape.name == "slice" for shape in structure.describe(plain)),
        "cuts": [_told_of(done) for done in cuts],
        "cuts_not_made": [cut._asdict() for cut in following],
        "kept": None if kept is None else kept["record"],
        "seconds": _seconds(cuts, _first(plain, recipe, cuts)) if kept is None else dict(kept["seconds"]),
        "versions": reports.versions(),
    }


def _known(kept: dict[str, Any]) -> dict[str, Any]:
    """What is known of the cuts before this run."""
    recipe = kept["record"].get("recipe")
    known = {"recipe": recipe} if recipe and "method" in recipe else {}
    return known | {field: kept[field] for field in ("protocol", "achieved")}


def _kept_sparsity(plain: PreTrainedModel, kept: dict[str, Any]) -> dict[str, Any]:
    """How many zeros there were before, and are now."""
    if not kept["achieved"]:
        return {"requested": None, "achieved_linears": 0.0}
    recipe = kept["record"].get("recipe") or {}
    return {
        "requested": recipe.get("sparsity"),
        "budget": recipe.get("budget", "linears"),
        "found": kept["sparsity"],
        "achieved_linears": zero_shares(plain)[1],
    }


def _quantised(plan: ExportPlan) -> dict[str, Any] | None:
    """How the model that was trained is quantised, and what is exported of it."""
    kind, form = quantisation(plan.model), plan.outline.form
    exported = {"form": None if form == "quantised" else form, "bytes_unquantised": full_bytes(plan.base)}
    return kind and kind | exported


def _first(plain: PreTrainedModel, recipe: Recipe | None, cuts: Sequence[dict[str, Any]]) -> str:
    """What the model is called before the first cut: one that had zeros or another shape is not dense."""
    shaped = bool(structure.structures(plain)) and recipe is not None and not recipe.method.changes_shapes
    return "before" if _found(cuts) or shaped else "dense"


def _found(cuts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The share of zeros that the model came with, where there were any."""
    found = cuts[0].get("found", 0.0) if cuts else 0.0
    return {"found": found} if found else {}


def _perplexities(
    plain: PreTrainedModel, recipe: Recipe | None, cuts: Sequence[dict[str, Any]]
) -> dict[str, float | None]:
    """Before the first cut, after the last, and what will be measured at the end; without a cut that alone."""
    if recipe is None:
        return {"after": None}
    measured, first = [done["perplexity"] for done in cuts] or [{}], _first(plain, recipe, cuts)
    quantised = {name: value for name, value in measured[-1].items() if name == "quantised"}
    return {first: measured[0].get("before"), "pruned": measured[-1].get("after"), **quantised, "recovered": None}


def _told_of(done: dict[str, Any]) -> dict[str, Any]:
    """What the report says of one cut."""
    fields = ("step", "target", "sparsity", "perplexity", "protocol", "scores", "rates", "achieved", "seconds")
    return {"requested": done["recipe"]["sparsity"]} | {field: done[field] for field in fields}


def _seconds(cuts: Sequence[dict[str, Any]], first: str) -> dict[str, float]:
    """The seconds of all cuts together; of the ``first`` perplexity, that before the first."""
    total: dict[str, float] = {}
    for index, done in enumerate(cuts):
        for name, seconds in done["seconds"].items():
            if name in ("perplexity_before", "perplexity_after"):
                name = "perplexity_pruned" if index or name == "perplexity_after" else f"perplexity_{first}"
            total[name] = total.get(name, 0.0) + seconds
    return total


def _slice(plain: PreTrainedModel, recipe: Recipe | None, done: dict[str, Any]) -> dict[str, Any] | None:
    """What a cut of this run made of the model's shape, beside what it was."""
    if recipe is None:
        requested = None if done.get("achieved") else (done.get("recipe") or {}).get("sparsity")
    else:
        requested = recipe.sparsity if recipe.method.changes_shapes else None
    described = next((shape for shape in structure.describe(plain) if shape.name == "slice"), None)
    if requested is None or described is None:  # training may have ended before the cut
        return None
    sizes = {name: done.get("size", {}).get(when) for name, when in (("dense", "before"), ("pruned", "after"))}
    return {"requested": requested, **described.facts, **sizes}
