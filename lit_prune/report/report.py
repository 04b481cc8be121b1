"""What a run tells at its end: a table, a picture, report.json, and the exported folder's model card."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import textwrap
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from rich.table import Table

from lit_prune.evaluation.tasks import describe

PACKAGES = ("lit-prune", "torch", "lightning", "transformers", "peft", "bitsandbytes", "torchmetrics", "datasets")
Report = dict[str, Any]
SHOWN = 5e-5
FIRST = ("dense", "before")  # what the perplexity is called that the others are compared with
COLORS = {"dense": "#54a24b", "before": "#54a24b", "recovered": "#f58518"}  # of bars; what was cut is red
TITLE_LETTERS, LEGEND_COLUMNS = 100, 5
LONG = 1e6  # perplexity, from which on more digits say nothing
LONGEST_BAR = 1e100  # perplexity, beyond which an axis overflows


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that the numbers hang on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def to_json(report: Report) -> str:
    """Returns ``report`` as report.json has it, where a number that is not finite, which JSON has not, is null."""
    return json.dumps(_finite(report), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short(value: float, usual: str = ".3f") -> str:
    """Returns a perplexity, or a ratio of two, in few letters: as ``usual``, with an exponent from a million on.

    >>> short(21.5), short(1.5e158), short(math.inf)
    ('21.500', '1.50e+158', 'not finite')
    """
    if not math.isfinite(value):
        return "not finite"
    return format(value, usual if value < LONG else ".2e")


def table(report: Report) -> Table:
    """Returns the table of perplexities, sparsity, size and seconds."""
    grid = Table(title="lit_prune", show_header=False, title_justify="left")
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in report.get("perplexity", {}).items():
        if value is not None:
            grid.add_row(f"perplexity, {name}", f"{short(value)}{_change(report, name)}")
    if report.get("protocol"):
        grid.add_row("protocol", describe_protocol(report["protocol"]))
    for label, value in {**_cut(report), **_cuts(report)}.items():
        grid.add_row(label, value)
    if report.get("search"):
        grid.add_row("search of the rates", describe_search(report["search"]))
    if "parameters" in report:
        grid.add_row("parameters", _size(report))
    for name, text in task_rows(report).items():
        grid.add_row(f"task {name}", text)
    seconds = report["seconds"]
    grid.add_row("seconds", ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in seconds.items()))
    return grid


def task_rows(report: Report) -> dict[str, str]:
    """Returns what lm-eval found, a line a task."""
    return {name: describe(result) for name, result in ((report.get("tasks") or {}).get("results") or {}).items()}


def task_table(report: Report) -> Table:
    """Returns the table of what lm-eval found."""
    grid = Table(title=f"{report['model']}, {report['tasks']['harness']}", show_header=False, title_justify="left")
    for name, text in task_rows(report).items():
        grid.add_row(name, text)
    return grid


def _cut(report: Report) -> dict[str, str]:
    """The rows that tell how much was cut."""
    sliced = report.get("slice")
    if sliced is None:
        return _zeros(report.get("sparsity", {}))
    rows = {f"slice {name}, mean over blocks": f"{sliced[name]:.4f}" for name in ("requested", "achieved")}
    rows["widths of the blocks"] = f"{min(sliced['sizes'])} to {max(sliced['sizes'])} of {sliced['hidden_size']}"
    dense, pruned = (sliced.get(name) or {} for name in ("dense", "pruned"))
    for name in ("prefill", "decode") if dense.get("speed") and pruned.get("speed") else ():
        before, after = dense["speed"][name], pruned["speed"][name]
        rows[f"tokens a second, {name}"] = f"{after:,.1f}, dense {before:,.1f}  ({after / before:.2f} x dense)"
    return rows


def _cuts(report: Report) -> dict[str, str]:
    """A row for every cut where there were several, or where the one came after the start."""
    cuts, later = report.get("cuts", []), report.get("cuts_not_made", [])
    not_made = {f"cut at step {cut['step']}": f"{cut['sparsity']:.4f}, not made" for cut in later}
    if not later and (not cuts or cuts[-1]["step"] == 0):
        return {}
    made = {f"cut at step {done['step']}": f"{done['sparsity']:.4f}{_jump(done['perplexity'])}" for done in cuts}
    return made | not_made


def _jump(perplexity: dict[str, float]) -> str:
    """From which perplexity to which a cut went."""
    if not perplexity:
        return ""
    return f", perplexity {short(perplexity['before'])} to {short(perplexity['after'])}"


def _zeros(sparsity: dict[str, Any]) -> dict[str, str]:
    """The rows that tell how many weights are zero."""
    labels = {
        "requested": f"requested, {_requested_of(sparsity)}",
        "found": "found in the model, over the linears",
        "achieved_linears": "achieved over the linears",
        "achieved_all": "achieved over all parameters",
    }
    missed = {"achieved_linears": _missed(sparsity)}
    return {
        f"sparsity {label}": f"{sparsity[name]:.4f}{missed.get(name, '')}"
        for name, label in labels.items()
        if sparsity.get(name) is not None
    }


def _requested_of(sparsity: dict[str, Any]) -> str:
    return "share of all parameters" if sparsity.get("budget") == "parameters" else "mean over blocks"


def _missed(sparsity: dict[str, Any]) -> str:
    """By how much the budget was missed, where that shows in four digits."""
    missed = sparsity.get("missed", 0.0)
    return f"  (missed by {missed:+.4f})" if abs(missed) >= SHOWN else ""


def _size(report: Report) -> str:
    """Parameters and bytes, beside those of the dense model where slicing changed them."""
    adapter = ""
    if report["adapter"] and not report["merged"]:
        adapter = f" and {report['adapter_parameters']:,} of the adapter"
    text = f"{report['parameters']:,}{adapter}, {report['bytes'] / 1e6:,.1f} MB"
    quantised = report.get("quantised")
    if quantised is not None and quantised["form"] != "merged":
        return text + f", {quantised['bytes_unquantised'] / 1e6:,.1f} MB before {quantised['quantization']}"
    if report["slice"] is None:
        return text + ", zeros stored"
    dense = report["slice"].get("dense")
    if dense is None:
        return text
    share = report["parameters"] / dense["parameters"] - 1
    told = f", dense {dense['parameters']:,}, {dense['bytes'] / 1e6:,.1f} MB  ({share:+.1%})"
    return text + told + (": bigger than the dense model" if share > 0 else "")


def _change(report: Report, name: str) -> str:
    """How a perplexity stands to the first one, and how much of the loss recovery won back, or that it lost more."""
    values = {key: value for key, value in report["perplexity"].items() if value is not None and math.isfinite(value)}
    first = next((key for key in FIRST if key in values), None)
    if first is None or name == first or name not in values:
        return ""
    text, value, start, pruned = "", values[name], values[first], values.get("pruned")
    if name in ("recovered", "requantised") and pruned is not None and pruned > start:
        won = f"{(pruned - value) / (pruned - start):.0%} of the loss won back"
        text = f"; {won if value <= pruned else short(value / pruned, '.2f') + ' x pruned'}"
    return f"  ({short(value / start, '.2f')} x {first}{text})"


def describe_protocol(protocol: dict[str, Any]) -> str:
    """Returns a protocol in one line."""
    return (
        f"{protocol['data']}; {protocol['windows']} windows of {protocol['seq_length']} tokens, "
        f"{protocol['tokens']:,} predicted; {protocol['dtype']}"
    )


def describe_search(search: dict[str, Any]) -> str:
    """Returns what a search of the rates did in one line."""
    return (
        f"{search['evaluations']} evaluations of a calibration window in {search['generations']} generations; loss "
        f"{search['loss_start']:.4f} at the start, {search['loss_end']:.4f} at the end, on {search['windows']} of the "
        "windows"
    )


def block_table(report: Report) -> Table:
    """Returns the table of every block's score and rate, and below it their mean and what it was to be."""
    sparsity = report["sparsity"]
    told = f"mean {sparsity['planned']:.4f}, asked for {sparsity['requested']:.4f}, {_requested_of(sparsity)}"
    if abs(sparsity["planned"] - sparsity["target"]) >= SHOWN:
        told += f"; missed by {sparsity['planned'] - sparsity['target']:+.4f}"
    if report.get("search"):
        told += f"; {describe_search(report['search'])}"
    grid = Table(title="blocks", title_justify="left", caption=told, caption_justify="left")
    for name in ("block", "score", "rate"):
        grid.add_column(name, justify="right")
    grid.add_column("")
    for block, (score, rate) in enumerate(zip(report["scores"], report["rates"], strict=True)):
        grid.add_row(str(block), f"{score:.6g}", f"{rate:.4f}", "█" * round(rate * 40))
    return grid


def picture(path: Path, scores: list[float], rates: list[float], report: Report) -> None:
    """Draws every block's score and its rate or width, and the perplexities where there are any, to a PNG file."""
    from matplotlib.figure import Figure

    perplexity = _bars(report)
    figure = Figure(figsize=(10, 4) if len(perplexity) > 1 else (7.5, 4), layout="constrained")
    widths = [3, 1] if len(perplexity) > 1 else [1]
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    blocks = range(len(rates))
    if report.get("slice") is None:
        axes[0].bar(blocks, rates, color="#4c78a8", label="share removed (left)")
        _draw_earlier_cuts(axes[0], report.get("cuts", [])[:-1])
        axes[0].axhline(report["sparsity"]["target"], color="#4c78a8", linestyle=":", label="mean asked for (left)")
        axes[0].set(xlabel="block", ylabel="share removed", ylim=(0, 1))
    else:
        _draw_widths(axes[0], report["slice"])
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    other = axes[0].twinx()
    other.plot(blocks, scores, color="#222222", marker="o", markersize=3, label="score (right)")
    other.set_ylabel("score")
    other.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    handles = [handle for axis in (axes[0], other) for handle in axis.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower left", ncols=min(len(handles), LEGEND_COLUMNS), fontsize=8)
    axes[0].set_title(_title(report), fontsize=9)
    if len(perplexity) > 1:
        _draw_perplexity(axes[1], perplexity)
    figure.savefig(path, dpi=120, format="png")


def _draw_earlier_cuts(axis: Any, cuts: list[dict[str, Any]]) -> None:
    """A line of every cut's rates, the later the lighter."""
    from matplotlib import colormaps

    for index, done in enumerate(cuts):
        color, label = colormaps["plasma"](0.9 * (index + 1) / len(cuts)), f"after step {done['step']} (left)"
        axis.plot(range(len(done["rates"])), done["rates"], drawstyle="steps-mid", color=color, label=label)


def _draw_perplexity(axis: Any, perplexity: dict[str, float]) -> None:
    """A bar of every perplexity on a logarithmic axis that begins at 1: its length is the loss."""
    colors, values = [COLORS.get(name, "#e45756") for name in perplexity], list(perplexity.values())
    drawn = [min(value, LONGEST_BAR) for value in values]
    bars = axis.barh(list(perplexity), [value - 1 for value in drawn], left=1, color=colors)
    axis.bar_label(bars, [short(value, ",.1f") for value in values], padding=2, fontsize=8)
    axis.set(title="perplexity", xscale="log", xlim=(1, max(drawn) ** 1.4))
    axis.minorticks_off()
    axis.invert_yaxis()


def _bars(report: Report) -> dict[str, float]:
    """The perplexities to draw, those that were measured and are numbers: where there were several cuts, after each."""
    told, cuts = report.get("perplexity", {}), report.get("cuts", [])
    if len(cuts) > 1 and told.get("pruned") is not None:
        after = {f"cut at {done['step']}": done["perplexity"].get("after") for done in cuts}
        first = {name: told[name] for name in FIRST if name in told}
        told = first | after | {name: value for name, value in told.items() if name not in (*FIRST, "pruned")}
    return {name: value for name, value in told.items() if value is not None and math.isfinite(value)}


def _title(report: Report) -> str:
    """How the rates came about, in lines that fit."""
    told = [report["recipe"]["allocation"], report["recipe"]["method"]]
    if report.get("search"):
        told.append(describe_search(report["search"]))
    return "\n".join(line for text in told for line in textwrap.wrap(text, TITLE_LETTERS))


def _draw_widths(axis: Any, sliced: dict[str, Any]) -> None:
    """Bars of what every block keeps of the stream's dimensions, what it gives above them."""
    sizes, full = sliced["sizes"], sliced["hidden_size"]
    blocks = range(len(sizes))
    axis.bar(blocks, sizes, color="#4c78a8", label="width kept (left)")
    axis.bar(blocks, [full - size for size in sizes], bottom=sizes, color="#dbe5f0", label="sliced off (left)")
    mean = sum(sizes) / len(sizes)
    axis.axhline(mean, color="#1f3b5c", linestyle=":", label=f"mean width, {mean:.0f} of {full} (left)")
    axis.set(xlabel="block", ylabel="dimensions of the residual stream", ylim=(0, full * 1.05))


def model_card(report: Report, base: str, tokenizer: str = "this/folder") -> str:
    """Returns the README.md of the exported folder; ``tokenizer`` says where the tokenizer is."""
    data = ModelCardData(library_name="transformers", tags=["pruning", "sparse", "lit-prune"])
    perplexity = "\n".join(
        f"| {name} | {short(value)} |" for name, value in report["perplexity"].items() if value is not None
    )
    recipe = report.get("recipe")
    return f"""---
{data.to_yaml()}
---

# {base}, {"pruned" if recipe and not report.get("kept") else "trained"} with lit_prune

Made from `{base}`. {_done(report)}{_not_done(report)}
{_healed(report)}
Parameters: {_size(report)}.

| | perplexity |
| --- | --- |
{perplexity}

Measured on {describe_protocol(report["protocol"]) if report["protocol"] else "nothing"}.
{_asked(report)}
```python
{"import lit_prune  # or pass trust_remote_code=True below" + chr(10) if report["sliced"] else ""}\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this/folder")
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
```
"""


def _asked(report: Report) -> str:
    """The card's table of tasks."""
    rows = "\n".join(f"| {name} | {text} |" for name, text in task_rows(report).items())
    return f"\n| task, {report['tasks']['harness']} | |\n| --- | --- |\n{rows}\n" if rows else ""


def _healed(report: Report) -> str:
    """What was trained after the cut, and where that is in the folder."""
    recovery, distillation = report.get("recovery"), report.get("distillation")
    if recovery is None and not report["adapter"] and distillation is None:
        return ""
    by = "" if recovery is None else f" by {recovery}"
    by += "" if distillation is None else f" under the dense model as its teacher ({distillation})"
    word = "Healed" if report.get("kept") is None else "Trained"
    if not report["adapter"]:
        zeros = ", and those that were pruned stayed zero" if _has_zeros(report) else ""
        return f"\n{word}{by}: its own weights were trained{zeros}.\n"
    if report.get("quantised"):
        return f"\n{word}{by}. {_quantised(report['quantised'])}\n"
    if report["merged"]:
        kept = ", which kept the zeros" if _has_zeros(report) else ""
        return f"\n{word}{by}: an adapter was trained, and is merged into the weights{kept}.\n"
    return (
        f"\n{word}{by}. The folder holds the pruned weights and, beside them, the adapter that was trained. It is not "
        "merged: merging would fill the zeros. `from_pretrained` loads both where peft is installed; without peft it "
        "loads the pruned weights alone, unrecovered.\n"
    )


def _quantised(quantised: dict[str, Any]) -> str:
    """What a model card says of weights that were quantised for the recovery."""
    kind = f"The linears were quantised to {quantised['quantization']} before that, and an adapter was trained"
    told = {
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
    return f"{kind} {told[quantised['form']]}"


def _has_zeros(report: Report) -> bool:
    """Whether weights of the model are masked."""
    pruned = report["sparsity"].get("found", 0) > 0 or (bool(report.get("recipe")) and not report.get("kept"))
    return pruned and report["slice"] is None


def _at_steps(report: Report) -> str:
    """When it was cut, where that was not once at the start."""
    if report.get("kept"):
        return ", before it was trained here"
    cuts = report.get("cuts", [])
    if not cuts or cuts[-1]["step"] == 0:
        return ""
    steps = ", ".join(f"{done['step']} ({done['sparsity']:.2%})" for done in cuts)
    return f", during training, before optimizer step{'s' if len(cuts) > 1 else ''} {steps}"


def _not_done(report: Report) -> str:
    """Which cuts were still to come."""
    later = report.get("cuts_not_made", [])
    if not later:
        return ""
    steps = ", ".join(f"{cut['step']} ({cut['sparsity']:.2%})" for cut in later)
    return f" The training was not through, not made were the cuts before optimizer step {steps}."


def _found(report: Report) -> str:
    """What is known of a model without a recipe."""
    if not _has_zeros(report):
        return "Not pruned."
    return (
        f"It came with zeros, {report['sparsity']['found']:.2%} of the weights of the linears of its blocks, which "
        f"were kept: {report['sparsity']['achieved_linears']:.2%} are exactly zero."
    )


def _came(sparsity: dict[str, Any]) -> str:
    """What share of the linears had been zero before."""
    found = sparsity.get("found")
    return f" Before, {found:.2%} of the weights of the linears were zero." if found else ""


def _done(report: Report) -> str:
    """What was done to the model, and what that makes of its size."""
    sparsity, recipe, sliced = report["sparsity"], report.get("recipe"), report["slice"]
    if not recipe:
        return _found(report)
    how = f"{recipe['method']}, spread over the blocks by {recipe['allocation']}"
    if sliced is None:
        return (
            f"Pruned with {how}, at a sparsity of {sparsity['requested']:g} ({_requested_of(sparsity)})"
            f"{_at_steps(report)}. "
            f"{sparsity['achieved_linears']:.2%} of the weights of the linears that were pruned are exactly zero, "
            f"{sparsity['achieved_all']:.2%} of all parameters.{_came(sparsity)} The zeros are stored, so that masks "
            "alone make nothing smaller."
        )
    return (
        f"Sliced with {how}{_at_steps(report)}: the residual stream has {min(sliced['sizes'])} to "
        f"{max(sliced['sizes'])} of its {sliced['hidden_size']} dimensions, {sliced['achieved']:.2%} less in the mean. "
        "Shortcut matrices "
        f"({sliced['shortcut_parameters']:,} parameters) and a head of its own are part of it."
    )
