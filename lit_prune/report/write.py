"""Writes the files of a run: the exported folder, which is then verified, report.json and the picture."""

from __future__ import annotations

from dataclasses import replace
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
from lit_prune.files import atomic_write, write_text
from lit_prune.progress import log
from lit_prune.report.card import model_card
from lit_prune.report.figure import save_figure
from lit_prune.report.report import Report, ScoreReport, to_json
from lit_prune.report.wording import describe_search


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
) -> tuple[list[Path], Report]:
    """Writes `model/`, `report.json` and `blocks.png`; returns their paths, and the report with the verification.

    The exported folder is reopened and compared before it gets its name, see ``verify``.

    Args:
        folder: Folder of the run.
        plan: Plan of the export.
        report: The report so far.
        format: Format of the export.
        base: Name of the base model.
        tokenizer: Tokenizer to save beside the model.
        validation: Batches to measure the perplexity of the reopened model on, and the name of their text.
        device: Device that computes the blocks of a model on disk.

    Raises:
        RuntimeError: if the reopened model differs from the one in memory.
    """
    target = folder.path / "model"
    if plan.outline.form == "requantised" and validation is not None:
        measured = measure(plan.plain, *validation, label="Perplexity, requantised", device=device)
        report = replace(report, perplexity={**report.perplexity, "requantised": measured.perplexity})
    with atomic_write(target) as draft:
        format.write(plan, draft, tokenizer)
        perplexity = next(reversed(report.measured.values()), None)
        zeros = report.achieved if report.shape is None else None  # those of a cut of shapes are no shares of zeros
        verification = verify(draft, plan, format, validation, achieved=zeros, perplexity=perplexity, device=device)
        report = report.with_exported(verification)
        (draft / "README.md").write_text(_card(report, plan, format, base, tokenizer), encoding="utf-8")
    return [target, *write_report(folder.path, report)], report


def write_tasks(
    folder: RunFolder,
    plan: ExportPlan,
    report: Report,
    *,
    format: ExportFormat,
    base: str,
    tokenizer: Tokenizer | None,
) -> None:
    """Rewrites the model card and `report.json` with the results of tasks; see :func:`write_results`."""
    write_text(folder.path / "model" / "README.md", _card(report, plan, format, base, tokenizer))
    write_text(folder.path / "report.json", to_json(report))


def write_scores(folder: Path, report: ScoreReport, statistics: CachedStatistics) -> list[Path]:
    """Writes the plan, the statistics, the picture and report.json of `lit-prune score`; returns their paths."""
    plan = folder / "plan.yaml"
    with atomic_write(plan) as draft:
        write_plan(draft, report.rates, report.scores, _plan_header(plan, report), report.linears or report.parts)
    with atomic_write(folder / FILE) as draft:
        write_statistics(draft, statistics)
    return [plan, folder / FILE, *write_report(folder, report)]


def write_report(folder: Path, report: Report | ScoreReport) -> list[Path]:
    """Writes report.json and, if there are scores to draw, the picture; returns their paths."""
    image, numbers = folder / "blocks.png", folder / "report.json"
    write_text(numbers, to_json(report))
    if report.scores is None:
        return [numbers]
    try:
        with atomic_write(image) as draft:
            save_figure(draft, report)
    except InputError:
        raise
    except Exception as error:  # an error of matplotlib must not cost hours of training
        log(f"{image} could not be drawn: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
        return [numbers]
    return [image, numbers]


def _plan_header(plan: Path, report: ScoreReport) -> str:
    """Returns the comment at the top of a plan: the format of its lines, and the options that use it."""
    mean, requested = report.sparsity.planned, report.sparsity.requested
    assert mean is not None
    assert requested is not None
    lines = [f"block: share to remove; mean {mean:.6g}, by {report.recipe['allocation']}"]
    for name in ("linears", "parts"):
        if getattr(report, name) is not None:
            lines.append(f"the rate of a block is the mean of its {name}, weighted by their sizes")
    if report.search is not None:
        lines.append(f"search: {describe_search(report.search)}")
    usage = "use it with the same method, in place of a target, by --pruning.allocation Plan"
    usage += f" --pruning.allocation.path {plan}"
    exceeds = abs(mean - requested) > MEAN_TOLERANCE
    usage += f" --pruning.sparsity {mean:.6g} --pruning.budget {'linears' if exceeds else report.sparsity.budget}"
    return "\n".join([*lines, usage])


def _card(report: Report, plan: ExportPlan, format: ExportFormat, base: str, tokenizer: Tokenizer | None) -> str:
    imports = list(dict.fromkeys(structure.loading for structure in report.structures if structure.loading))
    is_local = Path(plan.model.name_or_path or "").exists()  # an empty name is the working directory
    others = "the/folder/of/its/tokenizer" if is_local else base
    usage = format.usage(plan.outline, "this/folder" if tokenizer is not None else others, imports)
    base_model = None if is_local or "/" not in base else base
    return model_card(report, base, usage, base_model=base_model, library_name=format.library_name, tags=format.tags)
