"""The tables of the docs are those that benchmarks/tables.py writes from the measured results."""

from pathlib import Path

import pytest

from benchmarks import tables

DOCS = Path(__file__).parent.parent / "docs"
WITH_TABLES = [page for page in sorted(DOCS.glob("*.md")) if "<!-- table:" in page.read_text()]


@pytest.mark.parametrize("page", WITH_TABLES, ids=lambda page: page.stem)
def test_a_page_has_the_measured_tables(page: Path) -> None:
    assert tables.render(page.read_text()) == page.read_text(), "run `python benchmarks/tables.py`"


def test_every_table_stands_on_a_page() -> None:
    text = "".join(page.read_text() for page in WITH_TABLES)
    unmeasured = ("gpu", "shrinking healed", "reconstruction allocations", "reconstruction recoveries")
    measured = [name for name in tables.TABLES if name not in unmeasured]
    assert [name for name in measured if f"<!-- table: {name} -->\n|" not in text] == []
    assert all(f"<!-- table: {name} -->\n" in text for name in unmeasured)


def test_a_table_is_replaced_between_its_marks() -> None:
    page = "Before.\n<!-- table: searched -->\nold\n<!-- end -->\nAfter.\n"
    written = tables.render(page)
    assert "old" not in written
    assert written.startswith("Before.\n<!-- table: searched -->\n|  | from | before | Search | ")
    assert written.endswith("|\n<!-- end -->\nAfter.\n")


def test_the_smallest_is_bold_and_none_is_empty() -> None:
    assert tables.least_bold([3.0, None, 2.0]) == ["3.00", "", "**2.00**"]
    assert tables.least_bold([None]) == [""]
    assert tables.table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"


def test_a_table_without_lines_says_so() -> None:
    assert tables.table(["a", "b"], []) == "Not measured yet.\n"
    assert tables.reconstruction_recoveries([]) == tables.shrinking_healed([]) == "Not measured yet.\n"


def test_the_table_of_a_search_has_its_start() -> None:
    rows = [
        {"case": "Wanda, DLP, 0.7", "perplexity": 328.333},
        {"case": "Wanda, Search of blocks from DLP, 0.7", "perplexity": 200.0},
    ]
    assert tables.searched(rows).splitlines()[-1] == "| Wanda at 0.7 | DLP | 328.33 | **200.00** |  |"


def test_the_tables_of_shrunk_models_have_their_settings() -> None:
    sizes = {"parameters": 114.6e6, "bytes": 229.2e6}
    rows = [
        {"case": "Depth and MLPWidth by Uniform, -15%", "perplexity": 40.0, "multiple": 3.0, **sizes},
        {"case": "Depth by Uniform, -15%, neighbours, refitted", "perplexity": 50.0, "multiple": 2.0, **sizes},
        {"case": "Depth by Uniform, -15%, refitted, 100 steps of LoRA", "pruned": 52.4, "perplexity": 30.0},
        {"case": "Shrink by Search, -10%, 100 steps of distillation", "pruned": 28.0, "perplexity": 25.0},
        {"case": "MLPWidth by Search from DLP, -15%", "perplexity": 30.0, "multiple": 9.0, **sizes},
        {"case": "dense, 100 steps of LoRA", "before": 22.0, "perplexity": 17.5},
    ]
    rows[3]["precision"] = "32-true"
    assert tables.shrinking(rows).splitlines()[2:] == [
        "| -15% | MLPWidth | Search from DLP | 114.6 | 229.2 | 30.00 | 9.0 |",
        "| -15% | Depth and MLPWidth | Uniform | 114.6 | 229.2 | 40.00 | 3.0 |",
        "| -15% | Depth, neighbours, refitted | Uniform | 114.6 | 229.2 | 50.00 | 2.0 |",
    ]
    assert tables.shrinking_healed(rows).splitlines()[2:] == [
        "| dense |  |  | LoRA | bf16-mixed | 22.00 | 17.50 |",
        "| -10% | Shrink | Search | distillation | 32-true | 28.00 | 25.00 |",
        "| -15% | Depth, refitted | Uniform | LoRA | bf16-mixed | 52.40 | 30.00 |",
    ]
