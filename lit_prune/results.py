"""Writes what came out of a run: the Hugging Face folder, reopened and compared, report.json and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune import report as reports
from lit_prune import structure
from lit_prune.allocate import write_plan
from lit_prune.allocate.plan import MEAN_TOLERANCE
from lit_prune.errors import InputError
from lit_prune.evaluate import full_bytes, measure, parameters, pruned, size_bytes
from lit_prune.export import export, form, merged, merges, without_adapter
from lit_prune.kept import zero_shares
from lit_prune.modeling_sliced import SlicedCausalLM
from lit_prune.pipeline import Recipe
from lit_prune.progress import say
from lit_prune.quantised import quantisation
from lit_prune.recover import adapter_config
from lit_prune.report import Report
from lit_prune.run_folder import RunFolder, write_text, written_aside
from lit_prune.schedule import Cut
from lit_prune.slice import slices
from lit_prune.stored import FILE, Stored, write_stored
from lit_prune.verify import Validation, verify


def summary(
    model: PreTrainedModel,
    recipe: Recipe | None,
    cuts: Sequence[dict[str, Any]],
    kept: dict[str, Any] | None = None,
    following: Sequence[Cut] = (),
) -> Report:
    """Returns the report of what ``model`` is now, and of the ``cuts`` that were made (see DynamicPruningCallback).

    What it says of scores, rates and the like is the last cut's; `cuts` tells every one. Where nothing was cut, it is
    what ``kept`` tells of the model before it was trained. Where training ended early, cuts were still ``following``.
    """
    plain, done = without_adapter(model), dict(cuts[-1]) if cuts else {}
    sparsity: dict[str, Any] = {"requested": None, "achieved_linears": 0.0}
    if kept is not None:
        done = _known(kept)
        sparsity = _kept_sparsity(model, kept)
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
    fills = merges(model) and not structure.masked(model)
    zero, total = pruned(merged(model) if fills else plain)
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
        "merged": merges(model),
        "adapter_parameters": parameters(model) - parameters(plain),
        "bytes": _bytes(model, plain),
        "quantised": _quantised(model, plain),
        "slice": _slice(plain, recipe, done),
        "sliced": isinstance(plain, SlicedCausalLM),
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


def _kept_sparsity(model: PreTrainedModel, kept: dict[str, Any]) -> dict[str, Any]:
    """How many zeros there were before, and are now."""
    if not kept["achieved"]:
        return {"requested": None, "achieved_linears": 0.0}
    recipe = kept["record"].get("recipe") or {}
    return {
        "requested": recipe.get("sparsity"),
        "budget": recipe.get("budget", "linears"),
        "found": kept["sparsity"],
        "achieved_linears": zero_shares(model)[1],
    }


def _bytes(model: PreTrainedModel, plain: PreTrainedModel) -> int:
    """What the weights of the exported folder take."""
    if form(model) == "merged":
        return full_bytes(plain)
    return size_bytes(plain if merges(model) else model)


def _quantised(model: PreTrainedModel, plain: PreTrainedModel) -> dict[str, Any] | None:
    """How the model that was trained is quantised, and what is exported of it."""
    kind = quantisation(model)
    return kind and kind | {"form": form(model), "bytes_unquantised": full_bytes(plain)}


def _first(plain: PreTrainedModel, recipe: Recipe | None, cuts: Sequence[dict[str, Any]]) -> str:
    """What the model is called before the first cut: one that had zeros or slices is not dense."""
    sliced = isinstance(plain, SlicedCausalLM) and recipe is not None and not recipe.method.changes_shapes
    return "before" if _found(cuts) or sliced else "dense"


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
    """What a model that was sliced in this run has become, beside what it was."""
    if recipe is None:
        requested = None if done.get("achieved") else (done.get("recipe") or {}).get("sparsity")
    else:
        requested = recipe.sparsity if recipe.method.changes_shapes else None
    if requested is None or not isinstance(plain, SlicedCausalLM):  # training may have ended before the cut
        return None
    sizes, full = plain.config.slice_sizes, plain.config.hidden_size
    gone = slices(sizes[:-1], full)
    return {
        "requested": requested,
        "achieved": sum(gone) / len(gone),
        "hidden_size": full,
        "sizes": sizes[:-1],
        "head_size": sizes[-1],
        "shortcut_parameters": sum(p.numel() for name, p in plain.named_parameters() if "shortcut" in name),
        **structure.record(plain).get("slice", {}),
        "dense": done.get("size", {}).get("before"),
        "pruned": done.get("size", {}).get("after"),
    }


def write_results(
    folder: RunFolder,
    model: PreTrainedModel,
    report: Report,
    *,
    written: PreTrainedModel,
    base: str,
    tokenizer: Tokenizer | None,
    validation: Validation | None,
    device: torch.device | None = None,
) -> list[Path]:
    """Writes `model/`, `report.json` and `blocks.png` into ``folder``; returns what was written.

    ``written`` is the model whose weights are exported for ``model``, see ``export.exported``.

    The exported folder is reopened and compared before it gets its name; see ``verify``.

    Raises:
        RuntimeError: if the reopened model is another.
    """
    target = folder.path / "model"
    if form(model) == "requantised" and validation is not None:
        found = measure(written, *validation, label="Perplexity, requantised", device=device)
        report["perplexity"]["requantised"] = found.perplexity
    with written_aside(target) as draft:
        export(model, draft, tokenizer, _card(report, base, tokenizer), written=written)
        report["export"] = verify(draft, model, written, report, validation, device)
    return [target, *_told(folder.path, report)]


def write_tasks(folder: RunFolder, report: Report, *, base: str, tokenizer: Tokenizer | None) -> None:
    """Writes model card and `report.json` once more, now that the ``report`` has tasks."""
    write_text(folder.path / "model" / "README.md", _card(report, base, tokenizer))
    write_text(folder.path / "report.json", reports.to_json(report))


def _card(report: Report, base: str, tokenizer: Tokenizer | None) -> str:
    return reports.model_card(report, base, base if tokenizer is None else "this/folder")


def write_scores(folder: Path, report: Report, stored: Stored) -> list[Path]:
    """Writes plan, statistics, picture and report.json of a look at the blocks; returns what was written."""
    plan, mean = folder / "plan.yaml", report["sparsity"]["planned"]
    header = f"block: share to remove; mean {mean:.6g}, by {report['recipe']['allocation']}\n"
    if report.get("search"):
        header += f"search: {reports.describe_search(report['search'])}\n"
    header += f"use it by --pruning.allocation Plan --pruning.allocation.path {plan}"
    if abs(mean - report["sparsity"]["requested"]) > MEAN_TOLERANCE:
        header += f" --pruning.sparsity {mean:.6g} --pruning.budget linears"
    with written_aside(plan) as draft:
        write_plan(draft, report["rates"], report["scores"], header)
    with written_aside(folder / FILE) as draft:
        write_stored(draft, stored)
    return [plan, folder / FILE, *_told(folder, report)]


def _told(folder: Path, report: Report) -> list[Path]:
    """Writes report.json, then the picture, where there are scores to draw; returns what was written."""
    image, numbers = folder / "blocks.png", folder / "report.json"
    write_text(numbers, reports.to_json(report))
    if report["scores"] is None:
        return [numbers]
    try:
        with written_aside(image) as draft:
            reports.picture(draft, report["scores"], report["rates"], report)
    except InputError:
        raise
    except Exception as error:  # of the drawing: a run that is through is not lost by its picture
        say(f"{image} could not be drawn: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
        return [numbers]
    return [image, numbers]
