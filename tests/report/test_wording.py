import math
from dataclasses import replace

import pytest

from lit_prune.allocate import Search, Uniform
from lit_prune.pruning import SparseGPT
from lit_prune.report.sections import Quantised
from lit_prune.report.wording import (
    describe_budget,
    describe_change,
    describe_miss,
    describe_protocol,
    describe_reconstruction,
    describe_search,
    describe_settings,
    describe_size,
    reference,
    short,
)
from lit_prune.shrink import HeadGroups, MLPWidth, Shrink
from tests.report.reports import LOSSES, PROTOCOL, REPORT, SEARCH, SHAPE, SLICED


@pytest.mark.parametrize(
    ("value", "text"),
    [(21.5, "21.500"), (999_999.0, "999999.000"), (1.5e158, "1.50e+158"), (math.inf, "not finite")],
)
def test_a_number_in_few_letters(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(
    ("recovered", "text"),
    [
        (30.0, "1.50 x dense; 75% of the loss recovered"),
        (20.0, "1.00 x dense; 100% of the loss recovered"),
        (60.0, "3.00 x dense; 0% of the loss recovered"),
        (18.0, "0.90 x dense; better than dense"),
        (90.0, "4.50 x dense; 1.50 x pruned"),
        (6e157, "3.00e+156 x dense; 1.00e+156 x pruned"),
        (math.inf, ""),
        (math.nan, ""),
    ],
)
def test_how_a_recovery_went(recovered: float, text: str) -> None:
    values = {"dense": 20.0, "pruned": 60.0, "recovered": recovered}
    assert describe_change(values, "recovered") == text


@pytest.mark.parametrize(
    ("pruned", "recovered", "text"),
    [
        (20.1, 20.05, "1.00 x dense"),  # half of nothing
        (20.1, 18.0, "0.90 x dense; better than dense"),
        (20.4, 20.2, "1.01 x dense; 50% of the loss recovered"),
        (19.0, 19.5, "0.97 x dense; better than dense"),
        (19.0, 21.0, "1.05 x dense; 1.11 x pruned"),
        (math.inf, 30.0, "1.50 x dense"),
        (None, 30.0, "1.50 x dense"),
    ],
)
def test_a_loss_that_is_too_small_or_unknown_is_not_divided(pruned: float | None, recovered: float, text: str) -> None:
    assert describe_change({"dense": 20.0, "pruned": pruned, "recovered": recovered}, "recovered") == text


def test_a_cut_wins_nothing_back() -> None:
    values = {"dense": 20.0, "pruned": 60.0, "quantised": 30.0, "requantised": 40.0}
    assert describe_change(values, "dense") == ""
    assert describe_change(values, "pruned") == "3.00 x dense"
    assert describe_change(values, "quantised") == "1.50 x dense"
    assert describe_change(values, "requantised") == "2.00 x dense; 50% of the loss recovered"


def test_a_model_that_was_not_dense_is_compared_with_what_it_was() -> None:
    assert describe_change({"before": 20.0, "pruned": 60.0}, "pruned") == "3.00 x before"
    assert reference({"dense": math.nan, "pruned": 60.0}) is None
    assert describe_change({"dense": math.nan, "pruned": 60.0}, "pruned") == ""


def test_a_protocol_and_a_search_in_one_line() -> None:
    assert describe_protocol(PROTOCOL) == "text; 3 windows of 16 tokens, 45 predicted; float32"
    assert describe_search(SEARCH) == (
        "399 evaluations of a calibration window in 33 sweeps; loss 4.2500 at the start, 3.7500 at the end, on 2 "
        "of the windows"
    )
    assert "loss 4.2500 at the start (MLPWidth first), 3.7500" in describe_search(
        replace(SEARCH, start="MLPWidth first")
    )


def test_the_losses_of_a_reconstruction_in_one_line() -> None:
    rest = "to 0.4000 on training windows, 0.6000 to 0.5000 on held-out windows"
    assert describe_reconstruction(LOSSES) == f"mean loss of a block 0.5000 {rest}; block 1 kept the weights of the cut"
    assert describe_reconstruction(LOSSES[:1]).endswith("0.5000 to 0.3000 on held-out windows")


def test_a_budget_and_by_how_much_it_was_missed() -> None:
    assert describe_budget("parameters") == "share of all parameters"
    assert describe_budget("linears") == "mean over blocks"
    assert describe_miss(-0.0001) == "missed by -0.0001"
    assert describe_miss(4e-5) == describe_miss(None) == ""


def test_the_size_of_what_is_exported() -> None:
    assert describe_size(REPORT) == "1,000,000 and 8,000 of the adapter, 4.0 MB in float32, zeros stored"
    assert describe_size(replace(REPORT, merged=True)) == "1,000,000, 4.0 MB in float32, zeros stored"
    quantised = Quantised("nf4", True, "adapter", 9_000_000)
    half = replace(REPORT, merged=False, adapter={"r": 8}, dtype="bfloat16")
    assert "of the adapter, 4.0 MB in bfloat16 and float32, zeros stored" in describe_size(half)
    assert "4.0 MB in nf4, bfloat16 and float32, 9.0" in describe_size(replace(half, quantised=quantised))
    packed = "1,000,000, 4.0 MB in nf4 and float32, 9.0 MB before nf4"
    assert describe_size(replace(REPORT, merged=True, quantised=quantised)) == packed
    whole = replace(quantised, form="merged")
    assert describe_size(replace(REPORT, merged=True, quantised=whole)) == "1,000,000, 4.0 MB in float32, zeros stored"


def test_the_size_of_another_shape_stands_beside_the_dense_one() -> None:
    dense = ", 3.3 MB in float32, dense 1,000,000, 3.0 MB"
    sliced = replace(SLICED, bytes=3_300_000)
    assert describe_size(sliced) == f"1,100,000{dense}  (+10.0%): bigger than the dense model"
    again = replace(sliced, shape=replace(SHAPE, reference="before"))
    assert describe_size(again).endswith(", before 1,000,000, 3.0 MB  (+10.0%): bigger than before")
    assert describe_size(replace(SLICED, parameters=900_000, bytes=2_700_000)) == (
        "900,000, 2.7 MB in float32, dense 1,000,000, 3.0 MB  (-10.0%)"
    )
    eighth = replace(SLICED, parameters=900_000, bytes=700_000, dtype="q8_0")
    assert describe_size(eighth).endswith(", dense 1,000,000, 3.0 MB  (-10.0% of the parameters, -76.7% of the bytes)")
    assert describe_size(replace(SLICED, shape=replace(SHAPE, before=None))) == "1,100,000, 4.0 MB in float32"


@pytest.mark.parametrize(
    ("text", "shorter"),
    [
        (repr(Shrink([MLPWidth(multiple=8), HeadGroups()])), "Shrink(parts=[MLPWidth(multiple=8), HeadGroups])"),
        (repr(Shrink([MLPWidth()], [2.0])), "Shrink(parts=[MLPWidth], weights=[2.0])"),
        (repr(Search(Uniform(), evaluations=90)), "Search(start=Uniform, evaluations=90)"),
        ("Plan(path='a.yaml')", "Plan(path='a.yaml')"),
        (repr(SparseGPT()), "SparseGPT"),
        ("Theirs(multiple=64)", "Theirs(multiple=64)"),
        ("<their.Method object at 0x7f>", "<their.Method object at 0x7f>"),
        ("Theirs(x y)", "Theirs(x y)"),
        ("f(1) - f(2)", "f(1) - f(2)"),
        ("my-method", "my-method"),
    ],
)
def test_settings_that_have_their_default_are_left_out(text: str, shorter: str) -> None:
    assert describe_settings(text) == shorter
