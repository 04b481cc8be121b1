import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from lit_prune.report.report import (
    _bars,
    _draw_earlier_cuts,
    _draw_perplexity,
    _draw_widths,
    _title,
    block_table,
    describe_protocol,
    model_card,
    picture,
    table,
    to_json,
    versions,
)

REPORT = {
    "perplexity": {"dense": 20.0, "pruned": 60.0, "recovered": 30.0},
    "protocol": {"data": "text", "windows": 3, "seq_length": 16, "tokens": 45, "dtype": "float32"},
    "sparsity": {
        "requested": 0.5,
        "budget": "linears",
        "target": 0.5,
        "achieved_linears": 0.4999,
        "achieved_all": 0.39,
        "missed": -0.0001,
    },
    "recipe": {"method": "Wanda()", "allocation": "DLP()"},
    "scores": [1.0, 2.0],
    "rates": [0.4, 0.6],
    "parameters": 1_000_000,
    "adapter": {"r": 8},
    "merged": False,
    "slice": None,
    "sliced": False,
    "adapter_parameters": 8000,
    "bytes": 4_000_000,
    "seconds": {"score": 1.0, "train": 2.0},
    "versions": versions(),
}


def shown(item: object) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(item)
    return console.export_text()


def test_the_table_tells_everything() -> None:
    text = shown(table(REPORT))
    for told in ("20.000", "60.000  (3.00 x dense)", "30.000  (1.50 x dense; 75% of the loss won back)"):
        assert told in text
    for told in ("text; 3 windows of 16 tokens, 45 predicted; float32", "0.5000", "0.4999", "0.3900", "train 2.0"):
        assert told in text


def test_a_model_that_was_not_dense_is_not_called_so(tmp_path: Path) -> None:
    perplexity = {"before": 20.0, "pruned": 60.0, "quantised": 66.0, "recovered": 30.0, "requantised": 40.0}
    report = {**REPORT, "perplexity": perplexity, "sparsity": {**REPORT["sparsity"], "found": 0.25}}
    text = shown(table(report))
    for told in ("perplexity, before", "66.000  (3.30 x before)", "40.000  (2.00 x before; 50% of the loss won back)"):
        assert told in text
    assert "dense" not in text
    assert "Before, 25.00% of the weights of the linears were zero." in model_card(report, "x")
    picture(tmp_path / "blocks.png", [1.0, 2.0], [0.4, 0.6], report)


def test_cuts_that_were_not_made_are_told() -> None:
    done = {"step": 0, "sparsity": 0.3, "perplexity": {"before": 20.0, "after": 60.0}}
    report = {**REPORT, "cuts": [done], "cuts_not_made": [{"step": 9, "sparsity": 0.5}]}
    text = shown(table(report))
    assert "0.3000, perplexity 20.000 to 60.000" in text
    assert "0.5000, not made" in text
    assert "not through, not made were the cuts before optimizer step 9 (50.00%)." in model_card(report, "x")
    assert "not made" not in model_card({**report, "cuts_not_made": []}, "x")


def test_what_was_requested_and_by_how_much_it_was_missed() -> None:
    assert "0.4999  (missed by -0.0001)" in shown(table(REPORT))
    exact = {**REPORT["sparsity"], "missed": 1e-6}
    assert "missed" not in shown(table({**REPORT, "sparsity": exact}))
    assert "sparsity requested, mean over blocks" in shown(table(REPORT))
    of_all = {**REPORT["sparsity"], "budget": "parameters"}
    assert "sparsity requested, share of all parameters" in shown(table({**REPORT, "sparsity": of_all}))
    assert "at a sparsity of 0.5 (share of all parameters)" in model_card({**REPORT, "sparsity": of_all}, "x")


def test_the_block_table() -> None:
    sparsity = {"requested": 0.5, "budget": "linears", "target": 0.5, "planned": 0.5}
    text = shown(block_table({**REPORT, "sparsity": sparsity}))
    assert "mean 0.5000, asked for 0.5000, mean over blocks" in text
    assert "missed" not in text
    missed = {"requested": 0.4, "budget": "parameters", "target": 0.51, "planned": 0.5}
    text = " ".join(shown(block_table({**REPORT, "sparsity": missed})).split())
    assert "mean 0.5000, asked for 0.4000, share of all parameters; missed by -0.0100" in text
    assert "0.4000" in text
    assert "█" * 24 in text


def test_a_search_is_told(tmp_path: Path) -> None:
    search = {"evaluations": 399, "generations": 33, "windows": 2, "loss_start": 4.25, "loss_end": 3.75}
    report = {**REPORT, "search": search, "sparsity": {**REPORT["sparsity"], "planned": 0.5}}
    told = "399 evaluations of a calibration window in 33 generations; loss 4.2500 at the start, 3.7500 at the end"
    assert told in " ".join(shown(block_table(report)).split())
    assert told in " ".join(shown(table(report)).replace("│", " ").split())
    lines = _title({**report, "recipe": {"method": "Wanda()", "allocation": "Search(" + "seed=0, " * 30}}).split("\n")
    assert told in " ".join(lines)
    assert max(map(len, lines)) <= 100
    picture(tmp_path / "blocks.png", [1.0, 2.0], [0.4, 0.6], report)


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    # the line across the rates is what their mean was to be, not what was requested of all parameters
    picture(tmp_path / "blocks.png", [1.0, 2.0], [0.4, 0.6], {**REPORT, "sparsity": {"target": 0.5}})
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_several_cuts_tells_them_apart(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    cuts = [{"step": step, "rates": [0.1, 0.2], "perplexity": {"after": 1e5}} for step in range(6)]
    axis, perplexity = Figure().subplots(1, 2)
    _draw_earlier_cuts(axis, cuts)
    assert len({line.get_color() for line in axis.get_lines()}) == 6
    _draw_perplexity(perplexity, {"dense": 11.0, "pruned": 1e5})
    assert perplexity.get_xscale() == "log"
    assert [bar.get_width() for bar in perplexity.patches] == [10, 1e5 - 1]
    assert perplexity.get_xlim()[1] > 1e6  # room for the number at the longest bar
    picture(tmp_path / "blocks.png", [1.0, 2.0], [0.4, 0.6], {**REPORT, "cuts": cuts})


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.7e308, 1.0])
def test_the_picture_of_a_perplexity_that_is_no_number_or_a_huge_one(value: float, tmp_path: Path) -> None:
    report = {**REPORT, "perplexity": {"dense": 20.0, "pruned": 60.0, "recovered": value}}
    assert ("recovered" in _bars(report)) == math.isfinite(value)
    picture(tmp_path / "blocks.png", [1.0, 2.0], [0.4, 0.6], report)
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")


def test_a_cut_that_was_not_measured_has_no_bar() -> None:
    cuts = [{"step": 0, "perplexity": {}}, {"step": 4, "perplexity": {"before": 50.0, "after": 60.0}}]
    assert list(_bars({**REPORT, "cuts": cuts})) == ["dense", "cut at 4", "recovered"]


def test_the_card_says_what_was_done_and_what_it_cost() -> None:
    card = model_card(REPORT, "some/model")
    for told in ("some/model", "Wanda()", "DLP()", "49.99%", "39.00%", "| recovered | 30.000 |", "not merged"):
        assert told in card
    assert describe_protocol(REPORT["protocol"]) in card
    assert card.startswith("---\n")
    assert "not merged" not in model_card({**REPORT, "adapter": None}, "x")


def test_the_card_is_one_that_the_hub_reads() -> None:
    card = ModelCard(model_card(REPORT, "some/model"))
    assert card.data.tags == ["pruning", "sparse", "lit-prune"]
    assert card.data.library_name == "transformers"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"recovery": "LoRA()"}, "Healed by LoRA(). The folder holds the pruned weights and, beside them, the adapter"),
        ({"recovery": "MaskedLoRA()", "merged": True}, "an adapter was trained, and is merged into the weights, which"),
        ({"recovery": "FullFineTuning()", "adapter": None}, "its own weights were trained, and those that were pruned"),
        (
            {"recovery": None, "merged": True, "recipe": None},
            "Healed: an adapter was trained, and is merged into the w",
        ),
    ],
)
def test_the_card_says_what_was_trained_and_where_that_is(fields: dict[str, Any], told: str) -> None:
    assert told in model_card({**REPORT, **fields}, "x")


def test_the_card_of_a_model_that_was_not_healed() -> None:
    assert "Healed" not in model_card({**REPORT, "recovery": None, "adapter": None}, "x")


SLICED = {
    **REPORT,
    "merged": True,
    "sliced": True,
    "parameters": 1_100_000,
    "slice": {
        "requested": 0.25,
        "achieved": 0.2512,
        "hidden_size": 64,
        "sizes": [56, 40],
        "head_size": 64,
        "shortcut_parameters": 5000,
        "untied_head": True,
        "dense": {"parameters": 1_000_000, "bytes": 3_000_000, "speed": {"prefill": 100.0, "decode": 10.0}},
        "pruned": {"parameters": 1_100_000, "bytes": 4_000_000, "speed": {"prefill": 150.0, "decode": 9.0}},
    },
}


def test_slices_are_told_with_what_they_cost() -> None:
    text = " ".join(shown(table(SLICED)).replace("│", " ").split())
    for told in ("slice achieved, mean over blocks 0.2512", "40 to 56 of 64", "150.0, dense 100.0 (1.50 x dense)"):
        assert told in text
    for told in ("9.0, dense 10.0 (0.90 x dense)", "1,100,000, 4.0 MB, dense 1,000,000, 3.0 MB (+10.0%): bigger than"):
        assert told in text
    assert "adapter" not in text
    assert "zeros" not in text
    smaller = {**SLICED, "parameters": 900_000}
    assert "(-10.0%)" in shown(table(smaller))
    assert "bigger" not in shown(table(smaller))
    unmeasured = {**SLICED, "slice": {**SLICED["slice"], "pruned": {"parameters": 1, "bytes": 1, "speed": None}}}
    assert "tokens a second" not in shown(table(unmeasured))


def test_the_picture_of_slices_has_the_widths(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    _draw_widths(axis, SLICED["slice"])
    assert [bar.get_height() for bar in axis.patches] == [56, 40, 8, 24]
    picture(tmp_path / "blocks.png", [1.0, 2.0], [0.1, 0.4], SLICED)
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_of_a_sliced_model() -> None:
    card = model_card(SLICED, "some/model")
    for told in (
        "40 to 56 of its 64 dimensions, 25.12% less",
        "merged into the weights",
        "import lit_prune  # or pass",
    ):
        assert told in card
    assert "zero" not in card
    assert "import lit_prune" not in model_card(REPORT, "x")
    assert "import lit_prune" in model_card({**REPORT, "sliced": True}, "sliced in an earlier run")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (60.0, "60.000  (3.00 x dense; 0% of the loss won back)"),
        (90.0, "90.000  (4.50 x dense; 1.50 x pruned)"),
        (6e157, "6.00e+157  (3.00e+156 x dense; 1.00e+156 x pruned)"),
        (math.inf, "not finite"),
        (math.nan, "not finite"),
    ],
)
def test_a_run_that_lost_more_than_the_cut_did_has_won_nothing_back(value: float, told: str) -> None:
    report = {**REPORT, "perplexity": {"dense": 20.0, "pruned": 60.0, "recovered": value}}
    row = next(line for line in shown(table(report)).splitlines() if "perplexity, recovered" in line)
    assert row.strip("│ ").removeprefix("perplexity, recovered").strip("│ ") == told
    assert f"| recovered | {told.partition('  ')[0]} |" in model_card(report, "x")


def test_what_is_compared_with_a_perplexity_that_is_no_number() -> None:
    cut = {"step": 4, "sparsity": 0.5, "perplexity": {"before": 2e6, "after": math.inf}}
    report = {**REPORT, "perplexity": {"dense": 20.0, "pruned": math.inf, "recovered": 30.0}, "cuts": [cut]}
    text = shown(table(report))
    assert "30.000  (1.50 x dense) " in text
    assert "0.5000, perplexity 2.00e+06 to not finite" in text
    text = shown(table({**report, "perplexity": {"dense": math.nan, "recovered": 30.0}}))
    assert "x dense" not in text


def test_what_json_has_no_number_for_is_null() -> None:
    text = to_json({"perplexity": {"dense": 20.0, "recovered": math.nan}, "cuts": [{"rates": (0.5, math.inf)}]})
    assert json.loads(text) == {"perplexity": {"dense": 20.0, "recovered": None}, "cuts": [{"rates": [0.5, None]}]}


def test_json_round_trips() -> None:
    assert json.loads(to_json(REPORT)) == json.loads(json.dumps(REPORT))
