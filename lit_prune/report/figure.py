"""The picture of a run, blocks.png: the score and the rate (or size) of every block, and the perplexities."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_prune.models.structure import Description
from lit_prune.report.report import Report, ScoreReport
from lit_prune.report.sections import CutSummary
from lit_prune.report.wording import REFERENCES, describe_search, describe_settings, part_names, reference, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, PALE, DARK, BLACK = "#4c78a8", "#dbe5f0", "#1f3b5c", "#222222"
COLORS = {"dense": "#54a24b", "before": "#54a24b", "recovered": "#f58518"}  # of the bars of perplexities; others: RED
RED = "#e45756"
MARKERS = "sD^v"  # of the parts of a block
TITLE_LETTERS, LEGEND_COLUMNS, PANEL_LEGEND_COLUMNS = 100, 5, 3
HEIGHT, PANEL_HEIGHT = 4.0, 1.8  # of a picture with one panel of blocks, and of every further panel, in inches
MAX_LINEAR_RATIO = 10  # of the largest to the smallest perplexity; beyond, the axis is logarithmic
LONGEST_BAR = 1e100  # beyond, a logarithmic axis overflows
NARROW, WIDE = 0.08, 0.4  # margins, as shares of the span of the bars; the wide one has room for a number


def save_figure(path: Path, report: Report | ScoreReport) -> None:
    """Writes the picture of ``report`` to a PNG file."""
    draw(report).savefig(path, dpi=120, format="png")


def draw(report: Report | ScoreReport) -> Figure:
    """Returns the picture of a report that has scores: the blocks and, if several were measured, the perplexities.

    A cut of several parts of the blocks has a panel of blocks for each, one below the other.
    """
    from matplotlib.figure import Figure  # imported here because it takes a second

    perplexity = perplexities(report) if isinstance(report, Report) else {}
    several, structures = len(perplexity) > 1, _structures(report)
    panels = max(len(structures), 1)
    size = (10 if several else 7.5, HEIGHT + (panels - 1) * PANEL_HEIGHT)
    figure = Figure(figsize=size, layout="constrained")
    mosaic: list[Any] = [[f"blocks {panel}", *(["perplexity"] if several else [])] for panel in range(panels)]
    axes = figure.subplot_mosaic(mosaic, width_ratios=[3, 1] if several else [1])
    blocks = [axes[row[0]] for row in mosaic]
    _draw_blocks(blocks, report, structures)
    scores = _scores(report)
    drawn = [*blocks, *([_draw_scores(blocks[0], scores)] if scores else [])]
    handles = {handle.get_label(): handle for axis in drawn for handle in axis.get_legend_handles_labels()[0]}
    columns = min(len(handles), LEGEND_COLUMNS if panels == 1 else PANEL_LEGEND_COLUMNS)
    figure.legend(handles=list(handles.values()), loc="outside lower left", ncols=columns, fontsize=8)
    blocks[0].set_title(_title(report), fontsize=9)
    if several:
        _draw_perplexities(axes["perplexity"], perplexity)
    return figure


def perplexities(report: Report) -> dict[str, float]:
    """Returns the finite perplexities, by the label of their bar; after several cuts, one for each cut."""
    values: Mapping[str, float | None] = report.perplexity
    if len(report.cuts) > 1 and values.get("pruned") is not None:
        first = {name: values[name] for name in REFERENCES if name in values}
        after = {f"cut at {cut.step}": cut.perplexity.get("after") for cut in report.cuts}
        values = first | after | {name: value for name, value in values.items() if name not in (*first, "pruned")}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _structures(report: Report | ScoreReport) -> Sequence[Description]:
    """Returns the structures whose sizes are drawn, one for every part of the blocks; none if the cut was of masks."""
    shape = report.shape if isinstance(report, Report) else None
    return () if shape is None else shape.structure.parts or (shape.structure,)


def _remaining(structures: Sequence[Description]) -> Sequence[int]:
    """Returns the numbers of the blocks that are left, in the model that no block had been removed from."""
    for structure in structures:
        if structure.name == "depth":
            return list(structure.facts["remaining"])
    return range(len(structures[0].sizes)) if structures else ()


def _draw_blocks(axes: Sequence[Any], report: Report | ScoreReport, structures: Sequence[Description]) -> None:
    """Draws a bar for each block: its rate or, if the cut changed shapes, its size of every structure."""
    numbers = _remaining(structures)
    for axis, structure in zip(axes, structures, strict=False):
        places = numbers if len(structure.sizes) == len(numbers) else range(len(structure.sizes))
        _draw_sizes(axis, structure, places, alone=len(structures) == 1)
        axis.set_xlim(-0.7, max([*numbers, *places]) + 0.7)
    if not structures:
        earlier = report.cuts[:-1] if isinstance(report, Report) else ()
        _draw_rates(axes[0], report.rates or [], earlier, report.sparsity.target)
        _draw_parts(axes[0], report.parts or [])
    axes[-1].set_xlabel("block")
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)


def _draw_rates(axis: Any, rates: Sequence[float], earlier: Sequence[CutSummary], target: float | None) -> None:
    """Draws a bar for each block's rate, a line for the rates of each earlier cut, and one at the requested mean."""
    from matplotlib import colormaps

    axis.bar(range(len(rates)), rates, color=BLUE, label="share removed (left)")
    for index, cut in enumerate(earlier):
        color, label = colormaps["plasma"](0.9 * (index + 1) / len(earlier)), f"after step {cut.step} (left)"
        axis.plot(range(len(cut.rates)), cut.rates, drawstyle="steps-mid", color=color, label=label)
    if target is not None:
        axis.axhline(target, color=BLUE, linestyle=":", label="requested mean (left)")
    axis.set(ylabel="share removed", ylim=(0, 1))


def _draw_parts(axis: Any, parts: Sequence[Mapping[str, float]]) -> None:
    """Draws a mark for the rate of each part of the blocks."""
    style = {"color": DARK, "markersize": 5, "linestyle": "none", "clip_on": False}
    for name, marker in zip(part_names(parts), itertools.cycle(MARKERS)):
        rates = [of_block.get(name, math.nan) for of_block in parts]
        axis.plot(range(len(parts)), rates, marker=marker, label=f"{name} (left)", **style)


def _draw_sizes(axis: Any, structure: Description, blocks: Sequence[int], *, alone: bool) -> None:
    """Draws a bar for each of the ``blocks``: the size that is left and, above it, what was removed.

    Unless the structure is drawn ``alone``, the legend, which is that of all panels, names its unit at the mean only.
    """
    sizes, mean = structure.sizes, sum(structure.sizes) / len(structure.sizes)
    axis.bar(blocks, sizes, color=BLUE, label=f"remaining {structure.noun} (left)" if alone else "remaining (left)")
    removed = [structure.full - size for size in sizes]
    axis.bar(blocks, removed, bottom=sizes, color=PALE, label="removed (left)")
    noun = structure.noun if alone else structure.unit
    label = f"mean {noun}, {mean:.{0 if structure.full > 9 else 2}f} of {structure.full} (left)"
    axis.axhline(mean, color=DARK, linestyle=":", label=label)
    axis.set(ylabel=structure.unit, ylim=(0, structure.full * 1.05))
    axis.yaxis.get_major_locator().set_params(integer=True)


def _scores(report: Report | ScoreReport) -> Sequence[float]:
    """Returns the scores; none if they are all the same, or an earlier cut removed blocks that the picture shows."""
    scores = report.scores or []
    shape = report.shape if isinstance(report, Report) else None
    fits = shape is None or len(scores) == len(shape.structure.sizes)
    return scores if fits and len(set(scores)) > 1 else []


def _draw_scores(axis: Any, scores: Sequence[float]) -> Any:
    """Draws a line of the scores on an axis of their own; returns that axis."""
    other = axis.twinx()
    other.plot(range(len(scores)), scores, color=BLACK, marker="o", markersize=3, label="score (right)")
    other.set_ylabel("score")
    other.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return other


def _draw_perplexities(axis: Any, perplexity: Mapping[str, float]) -> None:
    """Draws a bar for each perplexity that starts at the dense model's, so that its length is the loss.

    Bars from zero would hide the differences: those of 14.3, 18.8 and 15.8 would have nearly the same length.
    """
    names, values = list(perplexity), [min(value, LONGEST_BAR) for value in perplexity.values()]
    first = reference(perplexity)
    start = values[0] if first is None else values[names.index(first)]
    colors = [COLORS.get(name, RED) for name in names]
    bars = axis.barh(names, [value - start for value in values], left=start, color=colors)
    axis.axvline(start, color=COLORS["dense"], linestyle="--", linewidth=1)
    axis.bar_label(bars, [short(value, ",.1f") for value in perplexity.values()], padding=2, fontsize=8)
    linear = max(values) <= MAX_LINEAR_RATIO * min(values)
    axis.set(xscale="linear" if linear else "log", xlim=_limits(values, start, linear))
    axis.set_title("perplexity", fontsize=9)
    axis.set_xlabel(f"bars begin at `{first or names[0]}`")
    axis.minorticks_off()
    axis.invert_yaxis()


def _limits(values: Sequence[float], start: float, linear: bool) -> tuple[float, float]:
    """Returns the limits of an axis with bars that begin at ``start`` and have a number at their end."""
    to, back = _scale(linear)
    low, high = to(min(values)), to(max(values))
    span = high - low or 1.0
    left = NARROW if low == to(start) else WIDE
    return back(low - left * span), back(high + WIDE * span)


def _scale(linear: bool) -> tuple[Callable[[float], float], Callable[[float], float]]:
    return (float, float) if linear else (math.log10, lambda exponent: 10**exponent)


def _title(report: Report | ScoreReport) -> str:
    """Returns the allocation, the method and the search of the rates, wrapped to the width of the picture."""
    assert report.recipe is not None  # there are rates
    details = [describe_settings(report.recipe[name]) for name in ("allocation", "method")]
    if report.search is not None:
        details.append(describe_search(report.search))
    return "\n".join(line for text in details for line in textwrap.wrap(text, TITLE_LETTERS))
