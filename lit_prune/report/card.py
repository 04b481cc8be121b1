"""The model card: README.md of the exported folder."""

from __future__ import annotations

from huggingface_hub import ModelCardData

from lit_prune.report.report import Report
from lit_prune.report.sections import Quantised
from lit_prune.report.table import task_rows
from lit_prune.report.wording import describe_budget, describe_protocol, describe_size, short

FORMS = {
    "adapter": (
        "over them. The folder holds the quantised weights, for which `from_pretrained` needs bitsandbytes, and "
        "beside them the adapter, which it loads where peft is installed; without peft it loads the unrecovered "
        "weights alone."
    ),
    "merged": "over them that kept the zeros; it is merged into weights of full precision.",
    "requantised": (
        "over them that kept the zeros; it is merged, and the result is quantised again. `from_pretrained` needs "
        "bitsandbytes."
    ),
}


def model_card(report: Report, base: str, tokenizer: str = "this/folder") -> str:
    """Returns the model card.

    Args:
        report: What was done, and what it cost.
        base: The model that was started from.
        tokenizer: Where the tokenizer is.
    """
    data = ModelCardData(library_name="transformers", tags=["pruning", "sparse", "lit-prune"])
    perplexity = "\n".join(f"| {name} | {short(value)} |" for name, value in report.measured.items())
    loading = "".join(f"{structure.loading}\n" for structure in report.structures if structure.loading)
    return f"""---
{data.to_yaml()}
---

# {base}, {"pruned" if report.recipe and not report.baseline else "trained"} with lit_prune

Made from `{base}`. {_pruning(report)}{_cuts_not_made(report)}
{_recovery(report)}
Parameters: {describe_size(report)}.

| | perplexity |
| --- | --- |
{perplexity}

Measured on {"nothing" if report.protocol is None else describe_protocol(report.protocol)}.
{_tasks(report)}
```python
{loading}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this/folder")
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
```
"""


def _pruning(report: Report) -> str:
    """What was removed, and what that makes of the size."""
    if not report.recipe:
        return _existing_zeros(report)
    how = f"{report.recipe['method']}, spread over the blocks by {report.recipe['allocation']}"
    if report.shape is not None:
        structure = report.shape.structure
        return f"{structure.done} with {how}{_steps(report)}: {structure.outcome}"
    sparsity = report.sparsity
    before = f" Before, {sparsity.before:.2%} of the weights of the linears were zero." if sparsity.before else ""
    return (
        f"Pruned with {how}, at a sparsity of {sparsity.requested:g} ({describe_budget(sparsity.budget)})"
        f"{_steps(report)}. "
        f"{sparsity.achieved_linears:.2%} of the weights of the linears that were pruned are exactly zero, "
        f"{sparsity.achieved_all:.2%} of all parameters.{before} The zeros are stored, so that masks "
        "alone make nothing smaller."
    )


def _existing_zeros(report: Report) -> str:
    """What is known of a model without a recipe."""
    if not report.masked:
        return "Not pruned."
    return (
        f"It came with zeros, {report.sparsity.before:.2%} of the weights of the linears of its blocks, which "
        f"were kept: {report.sparsity.achieved_linears:.2%} are exactly zero."
    )


def _steps(report: Report) -> str:
    """When the cuts came, unless there was only one, at the start."""
    if report.baseline:
        return ", before it was trained here"
    if not report.cuts or report.cuts[-1].step == 0:
        return ""
    steps = ", ".join(f"{cut.step} ({cut.sparsity:.2%})" for cut in report.cuts)
    return f", during training, before optimizer step{'s' if len(report.cuts) > 1 else ''} {steps}"


def _cuts_not_made(report: Report) -> str:
    """The cuts that the training ended before."""
    if not report.cuts_not_made:
        return ""
    steps = ", ".join(f"{cut.step} ({cut.sparsity:.2%})" for cut in report.cuts_not_made)
    return f" Training ended early: the cuts before optimizer step {steps} were not made."


def _recovery(report: Report) -> str:
    """What was trained after the cut, and where that is in the folder."""
    if report.recovery is None and not report.adapter and report.distillation is None:
        return ""
    by = "" if report.recovery is None else f" by {report.recovery}"
    if report.distillation is not None:
        by += f" under the dense model as its teacher ({report.distillation})"
    word = "Healed" if report.pruned_here else "Trained"
    return f"\n{word}{by}{_trained(report)}\n"


def _trained(report: Report) -> str:
    """The weights that a recovery trained, and where they are."""
    if not report.adapter:
        zeros = ", and those that were pruned stayed zero" if report.masked else ""
        return f": its own weights were trained{zeros}."
    if report.quantised is not None:
        return f". {_quantised(report.quantised)}"
    if report.merged:
        zeros = ", which kept the zeros" if report.masked else ""
        return f": an adapter was trained, and is merged into the weights{zeros}."
    return (
        ". The folder holds the pruned weights and, beside them, the adapter that was trained. It is not "
        "merged: merging would fill the zeros. `from_pretrained` loads both where peft is installed; without peft it "
        "loads the pruned weights alone, unrecovered."
    )


def _quantised(quantised: Quantised) -> str:
    """How the weights were quantised for the recovery, and what became of them."""
    assert quantised.form is not None  # there is an adapter
    kind = f"The linears were quantised to {quantised.quantization} before that, and an adapter was trained"
    return f"{kind} {FORMS[quantised.form]}"


def _tasks(report: Report) -> str:
    """The results of lm-eval."""
    if report.tasks is None:
        return ""
    rows = "\n".join(f"| {name} | {text} |" for name, text in task_rows(report.tasks).items())
    return f"\n| task, {report.tasks.harness} | |\n| --- | --- |\n{rows}\n" if rows else ""
