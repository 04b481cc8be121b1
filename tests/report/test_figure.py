"""The picture is read back from its artists: what is drawn, not that something is."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_prune.report.figure import draw, perplexities, save_figure
from lit_prune.report.report import Report, ScoreReport
from tests.report.reports import REPORT, SCORES, SEARCH, SHAPE, SLICED, SLICES, cut, perplexity, sparsity


def blocks(report: Report | ScoreReport) -> Any:
    return draw(report).axes[0]


def bars(report: Report) -> Any:
    """The axis of the perplexities."""
    return next(axis for axis in draw(report).axes if axis.get_title() == "perplexity")


def scores(report: Report | ScoreReport) -> Any:
    """The axis of the scores."""
    return next(axis for axis in draw(report).axes if axis.get_ylabel() == "score")


def line(axis: Any, label: str) -> Any:
    return next(line for line in axis.get_lines() if line.get_label() == label)


def legend(report: Report | ScoreReport) -> set[str]:
    return {text.get_text() for text in draw(report).legends[0].get_texts()}


@pytest.mark.parametrize("report", [REPORT, SCORES])
def test_the_rates_the_mean_they_were_to_have_and_the_scores(report: Report | ScoreReport) -> None:
    report = sparsity(report, requested=0.4, target=0.55)  # of the linears, where 0.4 is of all parameters
    axis = blocks(report)
    assert [bar.get_height() for bar in axis.patches] == [0.4, 0.6]
    assert list(line(axis, "requested mean (left)").get_ydata()) == [0.55, 0.55]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_ylim()) == ("block", "share removed", (0, 1))
    assert list(line(scores(report), "score (right)").get_ydata()) == [1.0, 2.0]
    assert legend(report) == {"share removed (left)", "requested mean (left)", "score (right)"}


def test_equal_scores_are_not_drawn() -> None:
    report = replace(SCORES, scores=[1.0, 1.0])
    assert all(axis.get_ylabel() != "score" for axis in draw(report).axes)
    assert legend(report) == {"share removed (left)", "requested mean (left)"}


def test_blocks_are_whole_numbers() -> None:
    assert all(float(tick).is_integer() for tick in blocks(REPORT).get_xticks())


def test_every_earlier_cut_is_a_line_of_its_own_colour() -> None:
    cuts = [replace(cut(step), rates=[0.01 * step, 0.2]) for step in (0, 5, 9)]
    axis = blocks(replace(REPORT, cuts=cuts))
    lines = [line(axis, f"after step {step} (left)") for step in (0, 5)]
    assert [list(line.get_ydata()) for line in lines] == [[0.0, 0.2], [0.05, 0.2]]
    assert lines[0].get_color() != lines[1].get_color()
    assert len(axis.get_lines()) == 3  # the last cut is the bars


def test_what_every_block_keeps_of_its_width() -> None:
    axis = blocks(SLICED)
    assert [(bar.get_y(), bar.get_height()) for bar in axis.patches] == [(0, 56), (0, 40), (56, 8), (40, 24)]
    assert list(line(axis, "mean width, 48 of 64 (left)").get_ydata()) == [48, 48]
    assert axis.get_ylabel() == "dimensions of the residual stream"
    assert axis.get_ylim() == (0, pytest.approx(67.2))
    assert {"remaining width (left)", "removed (left)"} < legend(SLICED)


def test_every_part_of_the_blocks_has_a_panel() -> None:
    changes = {"name": "groups", "unit": "key/value groups", "noun": "size", "sizes": (3, 1), "full": 4}
    parts = (SLICES, replace(SLICES, **changes))  # type: ignore[arg-type]
    report = replace(SLICED, shape=replace(SHAPE, structure=replace(SLICES, parts=parts)))
    figure = draw(report)
    panels = [
        axis for axis in figure.axes if axis.get_ylabel() in ("dimensions of the residual stream", changes["unit"])
    ]
    assert [[bar.get_height() for bar in axis.patches] for axis in panels] == [[56, 40, 8, 24], [3, 1, 1, 3]]
    assert [axis.get_xlabel() for axis in panels] == ["", "block"]
    assert all(float(tick).is_integer() for tick in panels[1].get_yticks())  # there are no half groups
    assert list(line(panels[1], "mean key/value groups, 2.00 of 4 (left)").get_ydata()) == [2, 2]
    assert {axis.get_subplotspec().rowspan.start for axis in panels} == {0, 1}
    assert figure.get_figheight() > draw(SLICED).get_figheight()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(set(labels))
    assert {"mean dimensions of the residual stream, 48 of 64 (left)", "mean key/value groups, 2.00 of 4 (left)"} < {
        *labels
    }


def test_blocks_that_remain_have_the_same_place_in_all_panels() -> None:
    assert SLICED.shape is not None
    facts = {"remaining": [0, 2, 3]}
    depth = replace(SLICED.shape.structure, name="depth", facts=facts, unit="blocks", sizes=(1, 0, 1, 1), full=1)
    widths = replace(SLICED.shape.structure, name="mlp_width", unit="channels", sizes=(8, 6, 4), full=8)
    joined = replace(SLICED.shape, structure=replace(depth, parts=(depth, widths)))
    panels = {axis.get_ylabel(): axis for axis in draw(replace(SLICED, shape=joined)).axes}
    places = {unit: sorted({bar.get_x() + bar.get_width() / 2 for bar in panels[unit].patches}) for unit in panels}
    assert places["blocks"] == pytest.approx([0, 1, 2, 3])
    assert places["channels"] == pytest.approx([0, 2, 3])
    assert panels["blocks"].get_xlim() == panels["channels"].get_xlim()


def test_the_title_says_how_the_rates_came_about_in_lines_that_fit() -> None:
    assert blocks(REPORT).get_title() == "DLP\nWanda"
    recipe = {"method": "Wanda()", "allocation": "Search(" + "seed=0, " * 30}
    lines = blocks(replace(REPORT, recipe=recipe, search=SEARCH)).get_title().split("\n")
    assert "399 evaluations of a calibration window in 33 sweeps" in " ".join(lines)
    assert max(map(len, lines)) <= 100


def test_a_bar_is_the_loss_against_the_dense_model() -> None:
    axis = bars(perplexity(dense=14.3, pruned=18.8, recovered=15.8))
    assert [(bar.get_x(), round(bar.get_width(), 6)) for bar in axis.patches] == [(14.3, 0), (14.3, 4.5), (14.3, 1.5)]
    assert list(axis.get_lines()[0].get_xdata()) == [14.3, 14.3]
    assert [text.get_text() for text in axis.texts] == ["14.3", "18.8", "15.8"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["dense", "pruned", "recovered"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first at the top
    assert len({bar.get_facecolor() for bar in axis.patches}) == 3
    assert (axis.get_xscale(), axis.get_xlabel()) == ("linear", "bars begin at `dense`")
    left, right = axis.get_xlim()
    assert 13.8 < left < 14.3
    assert right > 18.8 + 0.3 * 4.5  # room for the number at the longest bar


def test_a_model_that_is_better_than_the_dense_one_is_left_of_it() -> None:
    axis = bars(perplexity(dense=20.0, pruned=21.0, recovered=18.0))
    assert [round(bar.get_width(), 6) for bar in axis.patches] == [0, 1, -2]
    assert axis.get_xlim()[0] < 17  # room for the number


def test_losses_of_another_order_have_a_logarithmic_axis() -> None:
    axis = bars(perplexity(dense=11.0, pruned=1e5, recovered=20.0))
    assert axis.get_xscale() == "log"
    assert axis.get_xlim()[1] > 1e6
    assert bars(perplexity(dense=11.0, pruned=110.0)).get_xscale() == "linear"


def test_without_a_dense_perplexity_the_first_is_the_reference() -> None:
    axis = bars(perplexity(pruned=60.0, recovered=30.0))
    assert [bar.get_x() for bar in axis.patches] == [60, 60]
    assert [bar.get_width() for bar in axis.patches] == [0, -30]
    assert axis.get_xlabel() == "bars begin at `pruned`"


def test_one_perplexity_or_none_has_no_axis() -> None:
    assert len(draw(perplexity(dense=20.0)).axes) == 2  # blocks and scores
    assert len(draw(SCORES).axes) == 2
    assert len(draw(REPORT).axes) == 3


def test_after_several_cuts_each_has_a_bar() -> None:
    cuts = [cut(0, after=40.0), cut(2), cut(4, before=50.0, after=60.0)]
    assert list(perplexities(replace(REPORT, cuts=cuts))) == ["dense", "cut at 0", "cut at 4", "recovered"]
    assert perplexities(replace(REPORT, cuts=cuts[:1])) == REPORT.perplexity


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.7e308, 1.0])
def test_a_perplexity_that_is_no_number_or_a_huge_one(value: float, tmp_path: Path) -> None:
    report = perplexity(dense=20.0, pruned=60.0, recovered=value)
    assert ("recovered" in perplexities(report)) == math.isfinite(value)
    save_figure(tmp_path / "blocks.png", report)
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")


def test_the_rates_of_parts_are_marked() -> None:
    axis = blocks(replace(SCORES, parts=[{"MLPWidth": 0.25}, {"MLPWidth": 0.6, "HeadGroups": 1.0}]))
    marked = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines() if line.get_linestyle() == "None"}
    assert marked["MLPWidth (left)"] == [0.25, 0.6]
    assert marked["HeadGroups (left)"] == [pytest.approx(math.nan, nan_ok=True), 1.0]
