"""The model card: README.md of the exported folder."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import ModelCardData

from lit_prune.report.report import Report
from lit_prune.report.sections import Quantised
from lit_prune.report.table import task_rows
from lit_prune.report.wording import (
    describe_budget,
    describe_found,
    describe_gains,
    describe_protocol,
    describe_settings,
    describe_size,
    describe_target,
    short,
)

QUANTISED_FORMS = {  # of the export, see ``export.plan.form_of``
    "adapter": "over them. The adapter is not merged, but saved beside the quantised weights.",
    "merged": "over them that keeps the zeros. It is merged into weights in full precision.",
    "requantised": "over them that keeps the zeros. It is merged, and the result is quantised again.",
}


def model_card(
    report: Report,
    base: str,
    usage: str,
    *,
    base_model: str | None = None,
    library_name: str | None = "transformers",
    tags: Sequence[str] = (),
) -> str:
    """Returns the text of the model card, with the metadata that the hub reads.

    Args:
        report: Report of the run.
        base: Name of the base model.
        usage: The Markdown that says how the folder is opened, see ``ExportFormat.usage``.
        base_model: Id of the base model on the hub; None for another.
        library_name: Library that opens the folder; None names none.
        tags: Tags of the format.
    """
    kind = ["sparse"] if report.masked or (report.sparsity.achieved_all or 0) > 0.01 else []
    data = ModelCardData(base_model=base_model, library_name=library_name, tags=["pruning", *kind, "lit-prune", *tags])
    return f"""---
{data.to_yaml()}
---

# {base}, {_what_was_done(report)} with lit_prune

Made from `{base}`. {_pruning(report)}{_other_structures(report)}{_cuts_not_made(report)}
{_recovery(report)}
Parameters: {describe_size(report)}.{_target(report)}{_rounding(report)}
{_gains(report)}
{_perplexities(report)}
{_tasks(report)}
## How to open it

{usage}
"""


def _what_was_done(report: Report) -> str:
    if report.recipe and not report.baseline:
        return "pruned"
    return "trained" if "train" in report.seconds else "exported"


def _target(report: Report) -> str:
    """Returns the sentence about the size or the perplexity that was asked for; empty if a share was."""
    if report.target_perplexity is not None:
        return f" Asked for was a perplexity of {describe_found(report.target_perplexity)}."
    return "" if report.target is None else f" Asked for were {describe_target(report.target)}."


def _rounding(report: Report) -> str:
    """Returns the sentence about weights that are written in another data type than they were trained in."""
    if not report.rounded:
        return ""
    last = "" if report.protocol is None else f" The last perplexity is theirs, computed in {report.dtype_in_memory}."
    return f" The weights were {report.dtype_in_memory} in memory and are written in {report.dtype}.{last}"


def _gains(report: Report) -> str:
    """Returns the list of what another shape saves; empty if the shape is that of the dense model."""
    rows = {} if report.shape is None else describe_gains(report.shape)
    lines = [f"- {label}: {text}" for label, text in rows.items()]
    if len(lines) > 1:
        dtype = report.dtype_in_memory
        lines.append(
            f"\nSpeeds are those of one sequence in {dtype}; both models were measured by turns in one process."
        )
    return "".join(f"\n{line}" for line in lines) + ("\n" if lines else "")


def _perplexities(report: Report) -> str:
    """Returns the table of the perplexities and the text that they were measured on."""
    if report.protocol is None:
        return "No perplexity was measured."
    rows = "\n".join(f"| {name} | {short(value)} |" for name, value in report.measured.items())
    return f"| model | perplexity |\n| --- | --- |\n{rows}\n\nMeasured on {describe_protocol(report.protocol)}."


def _pruning(report: Report) -> str:
    """Returns the sentences about the pruning: the recipe, the zeros or the shape, and the size."""
    if not report.recipe:
        return _existing_zeros(report)
    method, allocation = (describe_settings(str(report.recipe[name])) for name in ("method", "allocation"))
    how = f"{method}, rates per block by {allocation}"
    if settings := report.recipe.get("reconstruction"):
        how += f", every block then trained towards its dense output by {describe_settings(str(settings))}"
    if report.shape is not None:
        structure = report.shape.structure
        return f"{structure.done} with {how}{_steps(report)}: {structure.outcome}{_zeros_kept(report)}"
    sparsity = report.sparsity
    before = f" Before this run, {sparsity.before:.2%} of the linears' weights were zero." if sparsity.before else ""
    return (
        f"Pruned with {how}, at a sparsity of {sparsity.requested:g} ({describe_budget(sparsity.budget)})"
        f"{_steps(report)}. "
        f"Of the weights in the pruned linears, {sparsity.achieved_linears:.2%} are exactly zero, and of all "
        f"parameters {sparsity.achieved_all:.2%}.{before} {_storage(report)}"
    )


def _zeros_kept(report: Report) -> str:
    """Returns the sentence about the zeros of earlier masks in a model whose shape was cut; empty without any."""
    if not report.masked:
        return ""
    return f" Of the linears' weights that remain, {report.sparsity.achieved_linears:.2%} are zero, by earlier masks."


def _other_structures(report: Report) -> str:
    """Returns the sentences about changes of the shape that are not those of the last cut; empty if there are none."""
    outcomes: dict[str, list[str]] = {}
    for other in report.other_structures:
        outcomes.setdefault(other.done, []).append(other.outcome.removesuffix("."))
    return "".join(f" {done} by an earlier cut: {'; '.join(texts)}." for done, texts in outcomes.items())


def _storage(report: Report) -> str:
    """Returns the sentence about what the zeros save."""
    if report.bytes_unpacked is None:
        return "Zeros are stored like other weights, so they alone make the model no smaller."
    return "They are not stored, which makes the folder smaller; opened, the model is dense, and no faster."


def _existing_zeros(report: Report) -> str:
    """Returns the sentence about the pruning of a model whose recipe is not known."""
    if not report.masked:
        return "" if report.other_structures else "No pruning of it is recorded."
    return (
        f"The base model was already pruned, and training kept its zeros: {report.sparsity.before:.2%} of the linears' "
        f"weights were zero before, {report.sparsity.achieved_linears:.2%} are now."
    )


def _steps(report: Report) -> str:
    """Returns the optimizer steps of the cuts; empty for a single cut at the start."""
    if report.baseline:
        return ", before it was trained here" if "train" in report.seconds else ", in an earlier run"
    if not report.cuts or report.cuts[-1].step == 0:
        return ""
    steps = ", ".join(f"{cut.step} ({cut.sparsity:.2%})" for cut in report.cuts)
    return f", during training, before optimizer step{'s' if len(report.cuts) > 1 else ''} {steps}"


def _cuts_not_made(report: Report) -> str:
    """Returns the sentence about cuts that were planned for after the end of the training; empty if there are none."""
    if not report.cuts_not_made:
        return ""
    steps = ", ".join(f"{cut.step} ({cut.sparsity:.2%})" for cut in report.cuts_not_made)
    return f" Training ended early: the cuts before optimizer step {steps} were not made."


def _recovery(report: Report) -> str:
    """Returns the paragraph about the training; empty for a model that was not trained."""
    if report.recovery is None and not report.adapter and report.distillation is None:
        return ""
    method = "" if report.recovery is None else f" with {report.recovery}"
    if report.distillation is not None:
        method += f", distilled from the model before its cuts ({report.distillation})"
    if report.baseline and not report.adapter and "train" not in report.seconds:
        return f"\nTrained{method} in an earlier run.\n"
    verb = "Recovered" if report.pruned_here else "Trained"
    return f"\n{verb}{method}{_trained(report)}\n"


def _trained(report: Report) -> str:
    """Returns the end of the sentence about the training: which weights were trained, and where they are saved."""
    if not report.adapter:
        zeros = "; pruned weights stayed zero" if report.masked else ""
        return f": the model's own weights were trained{zeros}."
    if report.quantised is not None:
        return f". {_quantised(report.quantised)}"
    if report.merged:
        zeros = ", which keeps the zeros" if report.masked else ""
        return f": an adapter was trained and is merged into the weights{zeros}."
    return ": an adapter was trained. It is saved beside the pruned weights, because merging it would fill the zeros."


def _quantised(quantised: Quantised) -> str:
    """Returns the sentences about the quantisation before the recovery, and the form of the exported weights."""
    assert quantised.form is not None  # there is an adapter
    first = f"The linears were quantised to {quantised.quantization}, and an adapter was trained"
    return f"{first} {QUANTISED_FORMS[quantised.form]}"


def _tasks(report: Report) -> str:
    """Returns the table of lm-eval's results; empty without any."""
    if report.tasks is None:
        return ""
    rows = "\n".join(f"| {name} | {text} |" for name, text in task_rows(report.tasks).items())
    return f"\n| task, {report.tasks.harness} | |\n| --- | --- |\n{rows}\n" if rows else ""
