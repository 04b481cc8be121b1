import io
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from lit_prune.evaluation.tasks import HarnessSettings, TaskResults
from lit_prune.report.report import TaskReport
from lit_prune.report.sections import Sparsity, TargetSize
from lit_prune.report.table import block_table, table, task_rows, task_table
from lit_prune.schedule import Cut
from tests.report.reports import FOUND, LOSSES, REPORT, SCORES, SEARCH, SHAPE, SLICED, cut, perplexity, sparsity

TASKS = TaskResults(
    "lm-eval 0.4",
    HarnessSettings(),
    {"arc": {"acc": 0.5, "acc_stderr": 0.0211, "samples": 9, "shots": 0, "version": 1}},
    1.5,
)


def text(item: Any) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(item)
    return console.export_text()


def rows(item: Any) -> dict[str, str]:
    """The rows of a table without a header, label to text."""
    cells = ([cell.strip() for cell in line.split("│")] for line in text(item).splitlines() if line.count("│") == 3)
    found: dict[str, str] = {}
    for _, label, value, _ in cells:
        last = label or list(found)[-1]  # a line that is folded
        found[last] = f"{found.get(last, '')} {value}".strip()
    return found


def test_the_rows_of_a_run() -> None:
    assert rows(table(REPORT)) == {
        "perplexity, dense": "20.000",
        "perplexity, pruned": "60.000  (3.00 x dense)",
        "perplexity, recovered": "30.000  (1.50 x dense; 75% of the loss recovered)",
        "perplexity measured on": "text; 3 windows of 16 tokens, 45 predicted; float32",
        "sparsity requested, mean over blocks": "0.5000",
        "sparsity achieved over the linears": "0.4999  (missed by -0.0001)",
        "sparsity achieved over all parameters": "0.3900",
        "parameters": "1,000,000 and 8,000 of the adapter, 4.0 MB in float32, zeros stored",
        "seconds": "score 1.0, train 2.0",
    }


def test_what_was_not_measured_has_no_row() -> None:
    unmeasured = rows(table(replace(REPORT, perplexity={"dense": None, "pruned": math.inf}, protocol=None)))
    assert "perplexity, dense" not in unmeasured
    assert unmeasured["perplexity, pruned"] == "not finite"
    assert "perplexity measured on" not in unmeasured


def test_a_model_that_was_not_dense_is_not_called_so() -> None:
    report = sparsity(perplexity(before=20.0, pruned=60.0), before=0.25)
    assert "dense" not in text(table(report))
    assert rows(table(report))["sparsity before this run, over the linears"] == "0.2500"
    shape = replace(SHAPE, reference="before")
    again = table(replace(SLICED, perplexity={"before": 20.0, "pruned": 60.0}, shape=shape))
    assert "dense" not in text(again)
    assert rows(again)["memory when opened"] == "4.0 MB, before 3.0 MB  (+33.3%)"
    assert rows(again)["tokens per second, prefill"] == "150, before 100  (1.50 x before; CPU, 2 threads)"


def test_what_a_sparsity_is_a_share_of() -> None:
    report = sparsity(REPORT, budget="parameters", missed=1e-6)
    assert rows(table(report))["sparsity requested, share of all parameters"] == "0.5000"
    assert "missed" not in text(table(report))


def test_a_model_without_masks_has_no_sparsity() -> None:
    dense = replace(REPORT, sparsity=Sparsity(requested=None, achieved_linears=0.0, achieved_all=0.05))
    assert not [label for label in rows(table(dense)) if "sparsity" in label]


def test_one_cut_at_the_start_has_no_row() -> None:
    assert "cut at" not in text(table(replace(REPORT, cuts=[cut(0, before=20.0, after=60.0)])))


def test_every_other_cut_has_a_row() -> None:
    cuts = [cut(0, 0.3, before=20.0, after=60.0), cut(4, 0.4), cut(8, before=2e6, after=math.inf)]
    shown = rows(table(replace(REPORT, cuts=cuts, cuts_not_made=[Cut(9, 0.6)])))
    assert {label: value for label, value in shown.items() if "cut" in label} == {
        "cut at step 0": "0.3000, perplexity 20.000 to 60.000",
        "cut at step 4": "0.4000",
        "cut at step 8": "0.5000, perplexity 2.00e+06 to not finite",
        "cut at step 9": "0.6000, not made",
    }


def test_a_cut_that_was_not_made_shows_the_one_at_the_start() -> None:
    shown = rows(table(replace(REPORT, cuts=[cut(0, 0.3)], cuts_not_made=[Cut(9, 0.6)])))
    assert shown["cut at step 0"] == "0.3000"


def test_a_search_has_a_row() -> None:
    assert rows(table(replace(REPORT, search=SEARCH)))["search of the rates"].startswith("399 evaluations of a")


def test_what_an_earlier_cut_has_changed_is_said_to_be_of_it() -> None:
    shown = rows(table(replace(REPORT, structures=[SHAPE.structure])))
    assert shown["widths of the blocks"] == "40 to 56 of 64, by an earlier cut"


def test_the_share_that_an_earlier_run_was_asked_for_is_said_to_be_of_it() -> None:
    shown = rows(table(replace(SLICED, baseline={"recipe": SLICED.recipe})))
    assert shown["sparsity requested, mean over blocks"] == "0.2500, by an earlier cut"


def test_another_shape_has_its_own_rows_and_its_speed() -> None:
    shown = rows(table(SLICED))
    assert shown["sparsity requested, mean over blocks"] == "0.2500"
    assert shown["widths of the blocks"] == "40 to 56 of 64"
    assert shown["memory when opened"] == "4.0 MB, dense 3.0 MB  (+33.3%)"
    assert shown["tokens per second, prefill"] == "150, dense 100  (1.50 x dense; CPU, 2 threads)"
    assert shown["tokens per second, decode"] == "9, dense 10  (0.90 x dense; CPU, 2 threads)"
    assert not any("sparsity achieved" in label for label in shown)
    assert "zeros" not in text(table(SLICED))


@pytest.mark.parametrize("field", ["before", "pruned"])
def test_a_speed_that_was_not_measured_has_no_row(field: str) -> None:
    size = replace(getattr(SHAPE, field), speed=None)
    assert "tokens per second" not in text(table(replace(SLICED, shape=replace(SHAPE, **{field: size}))))
    assert "tokens per second" not in text(table(replace(SLICED, shape=replace(SHAPE, **{field: None}))))


def test_the_tasks_of_a_run_and_of_a_model_alone() -> None:
    line = "acc 0.5000 ± 0.0211; 9 questions, 0 shots"
    assert task_rows(None) == {}
    assert rows(table(replace(REPORT, tasks=TASKS)))["task arc"] == line
    alone = task_table(TaskReport(model="some/model", dtype="float32", tasks=TASKS, versions={}))
    assert rows(alone) == {"arc": line}
    assert "some/model, lm-eval 0.4" in text(alone)


def test_the_blocks() -> None:
    shown = text(block_table(SCORES))
    first, second = (line for line in shown.splitlines() if "█" in line)
    assert first.split()[1:6:2] == ["0", "1", "0.4000"]
    assert [first.count("█"), second.count("█")] == [16, 24]
    assert "mean 0.5000, requested 0.5000 (mean over blocks)" in shown
    assert "missed" not in shown


def test_the_parts_of_the_blocks_have_columns() -> None:
    shown = text(block_table(replace(SCORES, parts=[{"MLPWidth": 0.25, "HeadGroups": 1.0}, {"MLPWidth": 0.6}])))
    first, second = (line.replace("│", " | ") for line in shown.splitlines() if "█" in line)
    assert re.search(r"MLPWidth\W+HeadGroups\W+rate", shown)
    assert first.split()[1:10:2] == ["0", "1", "0.2500", "1.0000", "0.4000"]
    assert second.split()[1:6:2] + second.split()[7:9] == ["1", "2", "0.6000", "|", "0.6000"]


def test_the_mean_of_the_blocks_that_misses_the_target() -> None:
    report = sparsity(replace(SCORES, search=SEARCH), requested=0.4, budget="parameters", target=0.51)
    caption = " ".join(text(block_table(report)).split())
    told = "mean 0.5000, requested 0.4000 (share of all parameters), which is a mean of 0.5100; missed by -0.0100; "
    assert told in caption


def test_the_type_of_weights_that_were_rounded() -> None:
    assert rows(table(replace(REPORT, dtype="bfloat16")))["data type"] == "bfloat16, float32 in memory"
    assert "data type" not in rows(table(REPORT))


def test_a_reconstruction_has_a_row() -> None:
    assert "reconstruction" not in rows(table(REPORT))
    row = rows(table(replace(REPORT, reconstruction=LOSSES)))["reconstruction"]
    assert row.startswith("mean loss of a block 0.5000 to 0.4000")


def test_a_perplexity_that_was_asked_for() -> None:
    shown = rows(table(replace(REPORT, target_perplexity=FOUND)))
    assert "sparsity found, mean over blocks" in shown
    assert "sparsity requested, mean over blocks" not in shown
    assert shown["perplexity requested"] == (
        "at most 30; a sparsity of 0.2500 has 24.000, the next of 3 that were tried is 0.3750: not finite"
    )
    assert shown["sparsities tried"] == "0.2500: 24.000, 0.3750: not finite, 0.5000: 60.000"


def test_a_size_that_was_asked_for() -> None:
    shown = rows(table(replace(SLICED, target=TargetSize("parameters", 100_000_000, 99_500_000))))
    assert shown["size requested"] == "100,000,000 parameters; 99,500,000 came out  (-0.50%)"
    assert "sparsity requested, share of all bytes" in rows(
        table(replace(SLICED, shape=replace(SHAPE, budget="bytes")))
    )
