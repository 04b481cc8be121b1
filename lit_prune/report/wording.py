"""The numbers of a report in words, as table, figure and model card share them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lit_prune.evaluation.perplexity import Protocol
from lit_prune.report.records import SearchRecord
from lit_prune.report.report import Report

REFERENCES = ("dense", "before")  # the perplexities that the others are compared with, whichever there is
RECOVERED = ("recovered", "requantised")
SHOWN = 5e-5  # what shows in four digits
LONG = 1e6  # the perplexity from which on more digits say nothing
WORTH_A_SHARE = 0.01  # of the reference: a smaller loss is noise, and a share of it means nothing


def short(value: float, usual: str = ".3f") -> str:
    """Returns a perplexity, or a ratio of two, in few letters: as ``usual``, with an exponent from a million on.

    >>> short(21.5), short(1.5e158), short(math.inf)
    ('21.500', '1.50e+158', 'not finite')
    """
    if not math.isfinite(value):
        return "not finite"
    return format(value, usual if value < LONG else ".2e")


def reference(perplexity: Mapping[str, float | None]) -> str | None:
    """Returns the name of the perplexity that the others are compared with; None where it is not a finite number."""
    return next((name for name in REFERENCES if math.isfinite(perplexity.get(name) or math.nan)), None)


def describe_change(perplexity: Mapping[str, float | None], name: str) -> str:
    """Returns how a perplexity compares with the reference and, after a recovery, how much of the loss is won back.

    >>> describe_change({"dense": 20.0, "pruned": 60.0, "recovered": 30.0}, "recovered")
    '1.50 x dense; 75% of the loss won back'
    >>> describe_change({"dense": 20.0, "pruned": 21.0, "recovered": 18.0}, "recovered")
    '0.90 x dense; better than dense'
    """
    first, value = reference(perplexity), perplexity.get(name)
    if first is None or name == first or value is None or not math.isfinite(value):
        return ""
    start, pruned = perplexity[first], perplexity.get("pruned")
    assert start is not None
    ratio = f"{short(value / start, '.2f')} x {first}"
    if name not in RECOVERED or pruned is None or not math.isfinite(pruned):
        return ratio
    recovery = _describe_recovery(value, start, pruned, first)
    return f"{ratio}; {recovery}" if recovery else ratio


def _describe_recovery(value: float, start: float, pruned: float, first: str) -> str:
    """What a recovery made of the loss from ``start`` to ``pruned``; nothing where that loss is too small to divide."""
    if value < start:
        return f"better than {first}"
    if value > pruned:
        return f"{short(value / pruned, '.2f')} x pruned"
    if pruned - start < WORTH_A_SHARE * start:
        return ""
    return f"{(pruned - value) / (pruned - start):.0%} of the loss won back"


def describe_protocol(protocol: Protocol) -> str:
    """Returns a protocol in one line."""
    return (
        f"{protocol.data}; {protocol.windows} windows of {protocol.seq_length} tokens, "
        f"{protocol.tokens:,} predicted; {protocol.dtype}"
    )


def describe_search(search: SearchRecord) -> str:
    """Returns how a search of the rates went in one line."""
    return (
        f"{search.evaluations} evaluations of a calibration window in {search.generations} generations; loss "
        f"{search.loss_start:.4f} at the start, {search.loss_end:.4f} at the end, on {search.windows} of the windows"
    )


def describe_budget(budget: str | None) -> str:
    """Returns what a sparsity is a share of."""
    return "share of all parameters" if budget == "parameters" else "mean over blocks"


def describe_miss(missed: float | None) -> str:
    """Returns by how much a target was missed; nothing where that does not show in four digits."""
    return "" if missed is None or abs(missed) < SHOWN else f"missed by {missed:+.4f}"


def describe_size(report: Report) -> str:
    """Returns parameters and bytes, beside those of the dense model where the cut changed them."""
    adapter = ""
    if report.adapter and not report.merged:
        adapter = f" and {report.adapter_parameters:,} of the adapter"
    text = f"{report.parameters:,}{adapter}, {report.bytes / 1e6:,.1f} MB"
    quantised = report.quantised
    if quantised is not None and quantised.form != "merged":
        return f"{text}, {quantised.bytes_unquantised / 1e6:,.1f} MB before {quantised.quantization}"
    if report.shape is None:
        return f"{text}, zeros stored"
    dense = report.shape.dense
    if dense is None:
        return text
    share = report.parameters / dense.parameters - 1
    bigger = ": bigger than the dense model" if share > 0 else ""
    return f"{text}, dense {dense.parameters:,}, {dense.bytes / 1e6:,.1f} MB  ({share:+.1%}){bigger}"
