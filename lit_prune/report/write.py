"""Writes what came out of a run: the Hugging Face folder, reopened and compared, report.json and the picture."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.allocate import write_plan
from lit_prune.allocate.plan import MEAN_TOLERANCE
from lit_prune.calibration.cached_statistics import FILE, CachedStatistics, write_statistics
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import measure
from lit_prune.export.formats import ExportFormat
from lit_prune.export.plan import ExportPlan
from lit_prune.export.run_folder import RunFolder
from lit_prune.export.verify import Validation, verify
from lit_prune.files import write_text, written_aside
from lit_prune.progress import log
from lit_prune.report import report as reports
from lit_prune.report.report import Report


def write_results(
    folder: RunFolder,
    plan: ExportPlan,
    report: Report,
    *,
    format: ExportFormat,
    base: str,
    tokenizer: Tokenizer | None,
    validation: Validation | None,
    device: torch.device | None = None,
) -> list[Path]:
    """Writes `model/`, `report.json` and `blocks.png` into ``folder``; returns what was written.

    The exported folder is reopened and compared before it gets its name; see ``verify``.

    Raises:
        RuntimeError: if the reopened model is another.
    """
    target = folder.path / "model"
    if plan.outline.form == "requantised" and validation is not None:
        found = measure(plan.plain, *validation, label="Perplexity, requantised", device=device)
        report["perplexity"]["requantised"] = found.perplexity
    with written_aside(target) as draft:
        format.write(plan, draft, tokenizer)
        (draft / "README.md").write_text(_card(report, base, tokenizer), encoding="utf-8")
        measured = [value for value in report["perplexity"].values() if value is not None]
        report["export"] = verify(
            draft,
            plan,
            format,
            validation,
            achieved=report["achieved"],
            perplexity=measured[-1] if measured else None,
            device=device,
        ).to_dict()
    return [target, *_told(folder.path, report)]


def write_tasks(folder: RunFolder, report: Report, *, base: str, tokenizer: Tokenizer | None) -> None:
    """Writes model card and `report.json` once more, now that the ``report`` has tasks."""
    write_text(folder.path / "model" / "README.md", _card(report, base, tokenizer))
    write_text(folder.path / "report.json", reports.to_json(report))


def _card(report: Report, base: str, tokenizer: Tokenizer | None) -> str:
    return reports.model_card(report, base, base if tokenizer is None else "this/folder")


def write_scores(folder: Path, report: Report, stored: CachedStatistics) -> list[Path]:
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
        write_statistics(draft, stored)
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
        log(f"{image} could not be drawn: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
        return [numbers]
    return [image, numbers]
