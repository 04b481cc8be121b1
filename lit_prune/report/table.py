"""The tables that are printed at the end of a verb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from lit_prune.evaluation.tasks import TaskResults, describe
from lit_prune.masks.zeros import MASK_SHARE
from lit_prune.report.report import Report, ScoreReport, TaskReport
from lit_prune.report.sections import Shape, Sparsity
from lit_prune.report.wording import (
    MIN_MISS,
    describe_budget,
    describe_change,
    describe_found,
    describe_gains,
    describe_means,
    describe_miss,
    describe_protocol,
    describe_reconstruction,
    describe_search,
    describe_size,
    describe_target,
    describe_trials,
    part_names,
    short,
)

BAR = 40  # characters of a rate of 1
EARLIER = ", by an earlier cut"


def table(report: Report) -> Table:
    """Returns the table of a run: perplexities, sparsity or shape, cuts, size, tasks and seconds."""
    grid = _grid("lit_prune")
    for label, text in _rows(report).items():
        grid.add_row(label, text)
    return grid


def metrics_table(model: str, metrics: Sequence[Mapping[str, float]]) -> Table:
    """Returns the table of what a validation or a test of ``model`` has measured, of every dataloader."""
    grid = _grid(model)
    for name, value in (pair for measured in metrics for pair in measured.items()):
        grid.add_row(name, short(value))
    return grid


def task_table(report: TaskReport) -> Table:
    """Returns the table of lm-eval's results."""
    grid = Table(title=f"{report.model}, {report.tasks.harness}", show_header=False, title_justify="left")
    for name, text in task_rows(report.tasks).items():
        grid.add_row(name, text)
    return grid


def task_rows(tasks: TaskResults | None) -> dict[str, str]:
    """Returns one line of results for each task of lm-eval, by the task's name."""
    return {} if tasks is None else {name: describe(result) for name, result in tasks.results.items()}


def block_table(report: ScoreReport) -> Table:
    """Returns the table of every block's score and rates; the caption has the mean rate and the requested one."""
    sparsity = report.sparsity
    assert sparsity.planned is not None
    assert sparsity.target is not None
    mean = f"mean {sparsity.planned:.4f}, requested {sparsity.requested:.4f} ({describe_budget(sparsity.budget)})"
    if abs(sparsity.target - (sparsity.requested or 0.0)) >= MIN_MISS:
        mean += f", which is a mean of {sparsity.target:.4f}"
    search = "" if report.search is None else describe_search(report.search)
    named = describe_means(report.linears or report.parts)
    caption = "; ".join(filter(None, (mean, describe_miss(sparsity.planned - sparsity.target), named, search)))
    grid = Table(title="blocks", title_justify="left", caption=caption, caption_justify="left")
    parts = report.parts or [{} for _ in report.rates]
    names = part_names(parts)
    for name in ("block", "score", *names, "rate"):
        grid.add_column(name, justify="right")
    grid.add_column("")
    for block, (score, rate, rates) in enumerate(zip(report.scores, report.rates, parts, strict=True)):
        of_parts = [f"{rates[name]:.4f}" if name in rates else "" for name in names]
        grid.add_row(str(block), f"{score:.6g}", *of_parts, f"{rate:.4f}", "█" * round(rate * BAR))
    return grid


def _grid(title: str) -> Table:
    grid = Table(title=title, show_header=False, title_justify="left")
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _rows(report: Report) -> dict[str, str]:
    rows = {f"perplexity, {name}": _perplexity(report, name) for name in report.measured}
    if report.protocol is not None:
        rows["perplexity measured on"] = describe_protocol(report.protocol)
    note = "" if report.pruned_here else EARLIER
    asked = "requested" if report.target_perplexity is None else "found"
    rows |= _sparsity_rows(report.sparsity, asked) if report.shape is None else _shape_rows(report.shape, asked, note)
    for structure in report.other_structures:
        rows |= {label: f"{text}{EARLIER}" for label, text in structure.rows.items()}
    rows |= _cut_rows(report)
    if report.search is not None:
        rows["search of the rates"] = describe_search(report.search)
    if report.reconstruction:
        rows["reconstruction"] = describe_reconstruction(report.reconstruction)
    if report.linears is not None:
        rows["rates of the linears"] = describe_means(report.linears)
    if report.parts is not None:
        rows["rates of the parts"] = describe_means(report.parts)
    rows["parameters"] = describe_size(report)
    if report.target is not None:
        rows["size requested"] = describe_target(report.target)
    if report.target_perplexity is not None:
        rows["perplexity requested"] = describe_found(report.target_perplexity)
        rows["sparsities tried"] = describe_trials(report.target_perplexity)
    if report.rounded:
        rows["data type"] = f"{report.dtype}, {report.dtype_in_memory} in memory"
    rows |= {f"task {name}": text for name, text in task_rows(report.tasks).items()}
    rows["seconds"] = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in report.seconds.items())
    return rows


def _perplexity(report: Report, name: str) -> str:
    change = describe_change(report.perplexity, name)
    return short(report.measured[name]) + (f"  ({change})" if change else "")


def _sparsity_rows(sparsity: Sparsity, asked: str) -> dict[str, str]:
    """Returns the rows of the share of zeros that was ``asked`` for or found, and of the achieved ones.

    There are none for a model without masks.
    """
    if sparsity.requested is None and not sparsity.before and (sparsity.achieved_all or 0.0) < MASK_SHARE:
        return {}
    shares = {
        f"{asked}, {describe_budget(sparsity.budget)}": sparsity.requested,
        "before this run, over the linears": sparsity.before,
        "achieved over the linears": sparsity.achieved_linears,
        "achieved over all parameters": sparsity.achieved_all,
    }
    miss = describe_miss(sparsity.missed)
    notes = {"achieved over the linears": f"  ({miss})" if miss else ""}
    return {
        f"sparsity {label}": f"{share:.4f}{notes.get(label, '')}"
        for label, share in shares.items()
        if share is not None
    }


def _shape_rows(shape: Shape, asked: str, note: str) -> dict[str, str]:
    """Returns the rows of the structure, and of what it saves; ``note`` follows the share that was ``asked`` for."""
    requested = {f"sparsity {asked}, {describe_budget(shape.budget)}": f"{shape.requested:.4f}{note}"}
    return requested | shape.structure.rows | describe_gains(shape)


def _cut_rows(report: Report) -> dict[str, str]:
    """Returns a row for every cut; empty for a single cut at the start."""
    not_made = {f"cut at step {cut.step}": f"{cut.sparsity:.4f}, not made" for cut in report.cuts_not_made}
    if not not_made and (not report.cuts or report.cuts[-1].step == 0):
        return {}
    made = {f"cut at step {cut.step}": f"{cut.sparsity:.4f}{_describe_jump(cut.perplexity)}" for cut in report.cuts}
    return made | not_made


def _describe_jump(perplexity: Mapping[str, float]) -> str:
    """Returns the perplexities before and after a cut; empty if they were not measured."""
    if not perplexity:
        return ""
    return f", perplexity {short(perplexity['before'])} to {short(perplexity['after'])}"
