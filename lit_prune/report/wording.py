"""Texts for the numbers of a report, shared by the table, the picture and the model card."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import lit_prune
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import Protocol
from lit_prune.pruning import Pattern
from lit_prune.reconstruct.losses import BlockLosses
from lit_prune.report.records import SearchRecord
from lit_prune.report.report import Report
from lit_prune.report.sections import Shape, TargetSize
from lit_prune.target_perplexity import FoundSparsity

REFERENCES = ("dense", "before")  # names of the perplexity that the others are compared with; a report has one of them
RECOVERED = ("recovered", "requantised")
MIN_MISS = 5e-5  # smallest difference that four digits show
MIN_APART = 5e-3  # shares of parameters and bytes that differ by more have a number each
MAX_FIXED = 1e6  # perplexities from here on get an exponent, since their digits mean nothing
MIN_LOSS = 0.01  # share of the reference; a share of a smaller loss would be a share of noise


def short(value: float, usual: str = ".3f") -> str:
    """Returns the text of a perplexity, or of a ratio of two, in the format ``usual``; from a million on, an exponent.

    >>> short(21.5), short(1.5e158), short(math.inf)
    ('21.500', '1.50e+158', 'not finite')
    """
    if not math.isfinite(value):
        return "not finite"
    return format(value, usual if value < MAX_FIXED else ".2e")


def describe_settings(text: str) -> str:
    """Returns the ``repr`` of a method, an allocation or a reconstruction without the settings that have their default.

    Texts that are no such call stay as they are, and 2:4 keeps its numbers.

    >>> describe_settings("MLPWidth(multiple=32, rounds=16, damping=0.001, compensate=True, correct_errors=True)")
    'MLPWidth(multiple=32)'
    >>> describe_settings("Wanda(pattern=NofM(n=2, m=4), propagate='dense')")
    'Wanda(pattern=NofM(n=2, m=4))'
    >>> describe_settings("Uniform()")
    'Uniform'
    """
    if re.fullmatch(r"\w+\(.*\)", text, re.DOTALL) is None:
        return text
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError:
        return text
    return ast.unparse(_WithoutDefaults().visit(call)) if isinstance(call, ast.Call) else text


class _WithoutDefaults(ast.NodeTransformer):
    """Removes the arguments that have their default from calls of lit_prune's classes."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Returns the call, or the name alone if no argument is left."""
        self.generic_visit(node)
        known = getattr(lit_prune, node.func.id, None) if isinstance(node.func, ast.Name) else None
        if isinstance(known, type) and is_dataclass(known) and not issubclass(known, Pattern):
            defaults = _defaults(known)
            node.keywords = [each for each in node.keywords if ast.unparse(each.value) != defaults.get(str(each.arg))]
        return node if node.args or node.keywords else node.func


def _defaults(settings: type) -> dict[str, str]:
    """Returns the texts of a class's defaults; of a class that needs arguments, those of the fields that have one."""
    try:
        known: dict[str, Any] = vars(settings())
    except (TypeError, InputError):
        known = {field.name: field.default for field in fields(settings) if field.default is not MISSING}
    return {name: describe_settings(repr(value)) for name, value in known.items()}


def reference(perplexity: Mapping[str, float | None]) -> str | None:
    """Returns the name of the perplexity that the others are compared with; None if there is none that is finite."""
    return next((name for name in REFERENCES if math.isfinite(perplexity.get(name) or math.nan)), None)


def describe_change(perplexity: Mapping[str, float | None], name: str) -> str:
    """Returns the ratio of a perplexity to the reference and, after a recovery, the share of the loss recovered.

    The text is empty for the reference itself and for a perplexity that is not finite.

    >>> describe_change({"dense": 20.0, "pruned": 60.0, "recovered": 30.0}, "recovered")
    '1.50 x dense; 75% of the loss recovered'
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
    """Returns the share of the loss from ``start`` to ``pruned`` that is recovered; empty for a loss near zero."""
    if value < start:
        return f"better than {first}"
    if value > pruned:
        return f"{short(value / pruned, '.2f')} x pruned"
    if pruned - start < MIN_LOSS * start:
        return ""
    return f"{(pruned - value) / (pruned - start):.0%} of the loss recovered"


def describe_protocol(protocol: Protocol) -> str:
    """Returns the protocol of a perplexity in one line: text, windows, tokens and data type."""
    return (
        f"{protocol.data}; {protocol.windows} windows of {protocol.seq_length} tokens, "
        f"{protocol.tokens:,} predicted; {protocol.dtype}"
    )


def describe_search(search: SearchRecord) -> str:
    """Returns the record of a search for rates in one line."""
    start = f"the start ({search.start})" if search.start else "the start"
    return (
        f"{search.evaluations} evaluations of a calibration window in {search.sweeps} "
        f"sweep{'' if search.sweeps == 1 else 's'}; loss "
        f"{search.loss_start:.4f} at {start}, {search.loss_end:.4f} at the end, on {search.windows} of the windows"
    )


def describe_reconstruction(losses: Sequence[BlockLosses]) -> str:
    """Returns the losses of a reconstruction in one line: means over the blocks, and the blocks that it left alone."""
    sides = []
    for label, name in (("training", "train"), ("held-out", "held_out")):
        before = sum(getattr(block, f"{name}_before") for block in losses) / len(losses)
        after = sum(getattr(block, f"{name}_{'after' if block.kept else 'before'}") for block in losses) / len(losses)
        sides.append(f"{before:.4f} to {after:.4f} on {label} windows")
    rejected = [str(index) for index, block in enumerate(losses) if not block.kept]
    unchanged = (
        f"; block{'s' if len(rejected) > 1 else ''} {', '.join(rejected)} kept the weights of the cut"
        if rejected
        else ""
    )
    return f"mean loss of a block {', '.join(sides)}{unchanged}"


def part_names(parts: Sequence[Mapping[str, float]]) -> list[str]:
    """Returns the names of the parts that any block has a rate for, in their order.

    >>> part_names([{"MLPWidth": 0.5}, {"MLPWidth": 0.4, "HeadGroups": 0.2}])
    ['MLPWidth', 'HeadGroups']
    """
    return list(dict.fromkeys(name for rates in parts for name in rates))


def describe_means(named: Sequence[Mapping[str, float]] | None) -> str:
    """Returns the mean rate of all linears or parts of a name, in one line; empty if they have no rates of their own.

    >>> describe_means([{"q_proj": 0.5, "o_proj": 0.4}, {"q_proj": 0.6, "o_proj": 0.4}])
    'mean of q_proj 0.5500, o_proj 0.4000'
    """
    by_name: dict[str, list[float]] = {}
    for rates in named or ():
        for name, rate in rates.items():
            by_name.setdefault(re.sub(r"\d+", "*", name), []).append(rate)
    means = [f"{name} {sum(rates) / len(rates):.4f}" for name, rates in by_name.items()]
    return f"mean of {', '.join(means)}" if means else ""


def describe_budget(budget: str | None) -> str:
    """Returns the meaning of a sparsity: the mean of the blocks' rates, or a share of all parameters or bytes."""
    return "mean over blocks" if budget in (None, "linears") else f"share of all {budget}"


def describe_target(target: TargetSize) -> str:
    """Returns the size that was asked for, and the one that came out.

    >>> describe_target(TargetSize("parameters", requested=100_000_000, achieved=99_500_000))
    '100,000,000 parameters; 99,500,000 came out  (-0.50%)'
    """
    miss = target.achieved / target.requested - 1
    return f"{target.requested:,} {target.unit}; {target.achieved:,} came out  ({miss:+.2%})"


def describe_found(found: FoundSparsity) -> str:
    """Returns the perplexity that was asked for, and the sparsity that was found for it."""
    above = found.next_greater
    return (
        f"at most {short(found.limit, 'g')}; a sparsity of {found.sparsity:.4f} has {short(found.perplexity)}, the "
        f"next of {len(found.trials)} that were tried is {above.sparsity:.4f}: {short(above.perplexity)}"
    )


def describe_trials(found: FoundSparsity) -> str:
    """Returns the sparsities that were tried, with their perplexities, from the smallest on.

    >>> from lit_prune.target_perplexity import SparsityTrial
    >>> trials = (SparsityTrial(0.5, 60.0), SparsityTrial(0.25, 24.0))
    >>> describe_trials(FoundSparsity(0.25, 24.0, 30.0, 20.0, trials))
    '0.2500: 24.000, 0.5000: 60.000'
    """
    trials = sorted(found.trials, key=lambda trial: trial.sparsity)
    return ", ".join(f"{trial.sparsity:.4f}: {short(trial.perplexity)}" for trial in trials)


def describe_miss(missed: float | None) -> str:
    """Returns the difference from the target; empty if four digits do not show it."""
    return "" if missed is None or abs(missed) < MIN_MISS else f"missed by {missed:+.4f}"


def describe_size(report: Report) -> str:
    """Returns the parameters and bytes of the exported model and, if a cut changed them, those before it."""
    adapter = ""
    if report.adapter and not report.merged:
        adapter = f" and {report.adapter_parameters:,} of the adapter"
    text = f"{report.parameters:,}{adapter}, {report.bytes / 1e6:,.1f} MB"
    return f"{text}{_compare_size(report)}{_describe_head(report)}"


def _compare_size(report: Report) -> str:
    """Returns the end of the text: the size before quantising or slicing, or that zeros are stored."""
    quantised, types = report.quantised, [report.dtype]
    if report.adapter and not report.merged and report.dtype != "float32":
        types.append("float32")  # of an adapter beside the weights, whatever theirs is
    if quantised is not None and quantised.form != "merged":
        before = f"{quantised.bytes_unquantised / 1e6:,.1f} MB before {quantised.quantization}"
        return f" in {_listed([quantised.quantization, *types])}, {before}"
    return f" in {_listed(types)}{_compare_shape(report)}"


def _listed(names: Sequence[str]) -> str:
    """Returns names as a sentence lists them: `nf4, bfloat16 and float32`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _compare_shape(report: Report) -> str:
    """Returns the end of the text in full precision."""
    if report.bytes_unpacked is not None:
        return f", packed; {report.bytes_unpacked / 1e6:,.1f} MB with the zeros"
    shape = report.shape
    if shape is None:
        return ", zeros stored" if report.masked else ""
    if shape.before is None:
        return ""
    share, of_bytes = report.parameters / shape.before.parameters - 1, report.bytes / shape.before.bytes - 1
    shares = f"{share:+.1%}"
    if abs(of_bytes - share) > MIN_APART:  # in another type
        shares += f" of the parameters, {of_bytes:+.1%} of the bytes"
    bigger = f": bigger than {'the dense model' if shape.reference == 'dense' else 'before'}" if share > 0 else ""
    size = f"{shape.before.parameters:,}, {shape.before.bytes / 1e6:,.1f} MB"
    return f", {shape.reference} {size}  ({shares}){bigger}"


def _describe_head(report: Report) -> str:
    """Returns the parameters that a merged adapter added, by a head that was tied before; empty if there is none."""
    if report.untied_parameters is None:
        return ""
    return f"; {report.untied_parameters:,} of them are the head, which is no longer tied to the embedding"


def describe_gains(shape: Shape) -> dict[str, str]:
    """Returns the memory and the tokens per second of a model of another shape beside those before the cut, by label.

    Empty if the sizes are not known; without the speeds if they were not measured.
    """
    before, pruned, first = shape.before, shape.pruned, shape.reference
    if before is None or pruned is None:
        return {}
    change = f"{pruned.bytes / before.bytes - 1:+.1%}"
    rows = {"memory when opened": f"{pruned.bytes / 1e6:,.1f} MB, {first} {before.bytes / 1e6:,.1f} MB  ({change})"}
    if before.speed is None or pruned.speed is None:
        return rows
    device = "" if pruned.speed.device is None else f"; {pruned.speed.device}"
    for name in ("prefill", "decode"):
        earlier, now = getattr(before.speed, name), getattr(pruned.speed, name)
        change = f"{now / earlier:.2f} x {first}{device}"
        rows[f"tokens per second, {name}"] = f"{_three_digits(now)}, {first} {_three_digits(earlier)}  ({change})"
    return rows


def _three_digits(number: float) -> str:
    """Returns a measured number with three digits: 16442.2 as `16,400`, 128.06 as `128`, 18.41 as `18.4`."""
    return f"{float(f'{number:.3g}'):,.10g}"
