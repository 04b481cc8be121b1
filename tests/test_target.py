"""Targets: how sizes are written, the share that they amount to, and what cannot be reached.

The small Llama has 25,312 parameters. Each of its 3 MLPs has 48 channels with 3 * 32 weights, 13,824 in all; with 8
left in each block, 13,792 parameters remain.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.allocate import DLP, Uniform
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters, size_bytes
from lit_prune.export.formats import GGUF
from lit_prune.pipeline import prune, score
from lit_prune.pruning import Wanda
from lit_prune.recipe import Recipe
from lit_prune.shrink import HeadGroups, MLPWidth
from lit_prune.slice import Slicing
from lit_prune.target import StoredBytes, parse_bytes, parse_parameters
from tests.conftest import small_model

WIDTH = MLPWidth(multiple=8)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("100M", 10**8),
        ("1.2B", 12 * 10**8),
        ("100000000", 10**8),
        (10**8, 10**8),
        ("250k", 250_000),
        ("1e8", 10**8),
        ("1,969,344", 1_969_344),
        ("25,312", 25_312),
    ],
)
def test_numbers_of_parameters(text: int | str, number: int) -> None:
    assert parse_parameters(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("200MB", 2 * 10**8), ("1.5 GB", 15 * 10**8), ("200_000", 200_000), (7, 7), ("2MiB", 2**21), ("9 b", 9)],
)
def test_numbers_of_bytes(text: int | str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize(
    "text", ["many", "-3", "0", "100MB", "1.2.3", "M", "0.1", "3.2", "1e400M", "1,5M", "1,0000", "12,34"]
)
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(InputError, match=r"`pruning.target_parameters` must be a number such as 100M, 1.2B .*, got"):
        Recipe(WIDTH, target_parameters=text)


@pytest.mark.parametrize(
    ("fields", "sparsity"),
    [
        ({"target_parameters": 18_400}, 6_912 / 25_312),  # half of the channels
        ({"target_parameters": "25312"}, 0.0),
        ({"target_bytes": 18_400 * 4}, 6_912 / 25_312),  # float32
        ({"budget": "bytes", "sparsity": 0.25}, 0.25),
    ],
)
def test_by_hand(fields: dict[str, Any], sparsity: float) -> None:
    resolved = Recipe(WIDTH, allocation=Uniform(), **fields).resolved(small_model())
    assert resolved.sparsity == pytest.approx(sparsity)
    assert (resolved.budget, resolved.target, resolved.is_resolved) == ("parameters", None, True)
    assert resolved.resolved(small_model()) is resolved


def test_bytes_of_the_type_that_is_exported() -> None:
    """Half as many bytes per weight; and in 8 bits 34 for 32 weights, while the 7 norms of 32 stay in float32."""
    model, recipe = small_model(), Recipe(WIDTH, allocation=Uniform(), target_bytes=18_400 * 2)
    bfloat16 = StoredBytes.of(model, torch.bfloat16)
    assert (bfloat16.total, bfloat16.per_weight) == (25_312 * 2, 2)
    assert recipe.resolved(model, bfloat16).sparsity == pytest.approx(6_912 / 25_312)
    wider = small_model(intermediate_size=64)  # 4,608 parameters more; rows of 48 would stay in 16 bits
    q8 = GGUF("q8_0").stored_bytes(wider, wider.dtype)
    assert (q8.total, q8.per_weight) == ((29_920 - 224) * 34 / 32 + 224 * 4, 34 / 32)
    smaller = Recipe(MLPWidth(multiple=32), allocation=Uniform(), target_bytes=round(q8.total - 6_912 * 34 / 32))
    assert smaller.resolved(wider, q8).sparsity == pytest.approx(6_912 / 29_920)


def test_rows_that_a_format_stores_larger() -> None:
    model = small_model(intermediate_size=96)
    q8 = GGUF("q8_0").stored_bytes(model, model.dtype)
    given: dict[str, dict[str, Any]] = {
        "target_bytes": {"target_bytes": 30_000},
        "budget": {"budget": "bytes", "sparsity": 0.2},
    }
    for field, fields in given.items():
        with pytest.raises(InputError, match=rf"`multiple` of MLPWidth must leave sizes that 32 .* `pruning.{field}`"):
            Recipe(MLPWidth(multiple=8), allocation=Uniform(), **fields).resolved(model, q8)
        Recipe(MLPWidth(multiple=32), allocation=Uniform(), **fields).resolved(model, q8)
    Recipe(MLPWidth(multiple=8), allocation=Uniform(), target_parameters=30_000).resolved(model, q8)
    narrow = small_model()  # 48 channels
    stored = GGUF("q8_0").stored_bytes(narrow, narrow.dtype)
    with pytest.raises(InputError, match="`pruning.target_bytes` must not count bytes for .* rows of 48 weights"):
        Recipe(MLPWidth(multiple=32), target_bytes=20_000).resolved(narrow, stored)


@pytest.mark.parametrize("allocation", [Uniform(), DLP()], ids=str)
@pytest.mark.parametrize(("method", "unit"), [(MLPWidth(multiple=1), 96), (HeadGroups(), 0)], ids=str)
def test_what_comes_out(method: Any, unit: int, allocation: Any, batches: list[Tensor]) -> None:
    """A group has 2 of 4 heads of 8: 16 rows of q_proj, 16 columns of o_proj, 8 rows of k_proj and v_proj."""
    unit = unit or (16 + 16 + 8 + 8) * 32
    model = small_model()
    prune(model, batches, Recipe(method, allocation=allocation, target_parameters="22k"))
    assert abs(parameters(model) - 22_000) <= 3 * unit / 2
    if isinstance(allocation, DLP):  # the blocks differ, so that their sum is met to half a unit
        assert abs(parameters(model) - 22_000) <= unit / 2


def test_a_second_cut_goes_to_the_size_that_it_is_given(batches: list[Tensor]) -> None:
    model = small_model()
    for target in (22_000, 18_400):
        prune(model, batches, Recipe(MLPWidth(multiple=1), allocation=Uniform(), target_bytes=4 * target))
        assert abs(size_bytes(model) - 4 * target) <= 4 * 3 * 96 / 2
    assert score(model, batches, Recipe(WIDTH, allocation=Uniform(), target_parameters=18_400)).target == pytest.approx(
        0.5
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_parameters": 13_000},
            r"`pruning.target_parameters` must be between 13,792 and 25,312 for MLPWidth, as .*`multiple` and earlier "
            r"cuts allow for the channels of the MLP, which have 54.6% of all parameters, got 13,000. For fewer",
        ),
        ({"target_parameters": "1M"}, r"must be between 13,792 and 25,312 for MLPWidth, .*, got 1,000,000\.$"),
        ({"target_bytes": "1kB"}, r"`pruning.target_bytes` must be between 55,168 and 101,248 for .*, got 1,000"),
        ({"budget": "bytes", "sparsity": 0.9}, r"must be between 0 and 0.4551 of all bytes with `pruning.budget: byt"),
    ],
)
def test_what_cannot_be_reached(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(WIDTH, allocation=Uniform(), **fields).check(small_model())


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        (
            WIDTH,
            {"sparsity": 0.3, "target_bytes": 9},
            r"`pruning.sparsity` and `pruning.target_bytes` must not be given",
        ),
        (
            WIDTH,
            {"target_parameters": 9, "target_bytes": 9},
            "`pruning.target_parameters` and `pruning.target_bytes` m",
        ),
        (
            WIDTH,
            {"budget": "parameters", "target_bytes": 9},
            "`pruning.budget` must be left out with `pruning.target_b",
        ),
        (
            Wanda(),
            {"target_parameters": "1M"},
            "`pruning.target_parameters` must be left out for Wanda, got 1,000,000: ",
        ),
        (
            Wanda(),
            {"target_bytes": 9},
            "`pruning.target_bytes` must be left out for Wanda, got 9: it sets weights to z",
        ),
        (Wanda(), {"budget": "bytes"}, "`pruning.budget` must be linears for Wanda, got bytes: .* such as MLPWidth"),
        (Slicing(), {"target_parameters": 9}, "`pruning.target_parameters` must be left out for Slicing, whose rates"),
    ],
)
def test_what_does_not_go_together(method: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(method, **fields)


def test_without_a_target_half_goes() -> None:
    assert Recipe().sparsity == 0.5
    assert Recipe(sparsity=None).resolved(small_model()).sparsity == 0.5  # type: ignore[arg-type]
