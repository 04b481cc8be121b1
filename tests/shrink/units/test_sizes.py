"""Numbers of units from rates, and the structure of a shrunk model."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.allocate import LayerRedundancy, Uniform
from lit_prune.errors import InputError
from lit_prune.models.structure import describe, structures
from lit_prune.pipeline import prune
from lit_prune.pruning import Method
from lit_prune.recipe import Recipe
from lit_prune.recover import Snapshot
from lit_prune.shrink import HeadGroups, MLPWidth
from lit_prune.shrink.mlp_width import MLPWidths
from lit_prune.shrink.units.sizes import check_multiple, rates_from_units, units_from_rates, units_left
from tests.conftest import small_model

RECIPES = [
    Recipe(MLPWidth(multiple=8), 0.5, Uniform()),
    Recipe(MLPWidth(multiple=8), 0.5, LayerRedundancy(base=0.1)),
    Recipe(HeadGroups(), 0.5, Uniform()),
    Recipe(HeadGroups(), 0.5, LayerRedundancy(base=0.1)),
]


def four_groups(family: str) -> PreTrainedModel:
    return small_model(family, num_key_value_heads=4)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.method}-{recipe.allocation}")
def test_a_dense_model_is_rebuilt(recipe: Recipe, family: str, batches: list[Tensor]) -> None:
    model = four_groups(family)
    prune(model, batches, recipe)
    stored, fresh = json.loads(json.dumps(Snapshot.of(model).to_dict())), four_groups(family)
    for _ in range(2):
        Snapshot.from_dict(stored).rebuild(fresh)
    assert type(fresh) is type(model)
    assert structures(fresh) == structures(model)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(batches[0]).logits, model(batches[0]).logits)


def test_two_methods_are_rebuilt_in_either_order(batches: list[Tensor]) -> None:
    methods: list[Method] = [MLPWidth(multiple=8), HeadGroups()]
    for order in (methods, methods[::-1]):
        model, fresh = four_groups("llama"), four_groups("llama")
        for method in order:
            prune(model, batches, Recipe(method, 0.5, LayerRedundancy(base=0.1)))
        Snapshot.of(model).rebuild(fresh)
        fresh.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(fresh(batches[0]).logits, model(batches[0]).logits)
        assert [described.name for described in describe(model)] == [
            type(method).sizes_class.name  # type: ignore[attr-defined]
            for method in order
        ]


def test_description() -> None:
    sizes = MLPWidths([8, 24, 40], [48, 48, 48], {"intermediate_size": 1}, {}, "model.layers")
    described = sizes.describe(small_model("shrunk_llama", block_sizes={"intermediate_size": [8, 24, 40]}))
    assert described.achieved == 0.5
    assert described.facts == {"achieved": 0.5, "units": [8, 24, 40], "full": [48, 48, 48]}
    assert described.outcome == "the blocks have 8 to 40 of their 48 channels of the MLP, 50.00% less in the mean."
    assert described.loading.startswith("import lit_prune")
    assert described.sizes == (8, 24, 40)
    equal = MLPWidths([24] * 3, [48] * 3, {"intermediate_size": 1}, {}, "model.layers").describe(small_model())
    assert equal.rows["channels of the MLP of the blocks"] == "24 of 48, the same in every block"
    assert equal.loading == ""


def test_by_hand() -> None:
    assert units_from_rates([0.3, 0.4], [32, 32], 8) == [24, 16]
    assert units_from_rates([0.25, 0.25], [48, 48], 8) == [32, 32]  # 36 is as near to 40
    assert units_from_rates([0.25, 0.25], [48, 48], 1) == [36, 36]
    assert rates_from_units([24, 32, 2], [32, 32, 3]) == [0.25, 0, 1 / 3]  # 1 - 2 / 3 is another float


def test_blocks_that_have_fewer_units_keep_no_more_than_these() -> None:
    """24 and 28.8 units are 16 and 32 in multiples of 16; a block with 24 left can keep them all."""
    assert units_from_rates([0.5, 0.4], [48, 48], 16) == [16, 32]
    assert units_from_rates([0.5, 0.4], [48, 48], 16, [24, 48]) == [24, 32]
    assert units_left([0.25, 0.5], [32, 48]) == [24, 24]


@given(st.lists(st.floats(0.0, 0.8), min_size=2, max_size=8), st.floats(0.0, 0.8))
def test_a_second_mean_is_met_to_half_a_larger_multiple(first: list[float], rate: float) -> None:
    full = [256] * len(first)
    present = units_from_rates(first, full, 8)
    lower = rates_from_units(present, full)
    units = units_from_rates([max(rate, low) for low in lower], full, 32, present)
    exact = sum(min((1 - rate) * 256, has) for has in present)
    assert all(number == has or (number < has and number % 32 == 0) for number, has in zip(units, present, strict=True))
    possible = all(has >= 32 for has in present)
    equal = len({*present}) == 1
    assert not possible or abs(sum(units) - exact) <= 16 * (len(first) if equal else 1) + 1e-6


def test_equal_rates_give_equal_numbers() -> None:
    assert units_from_rates([0.3] * 4, [32] * 4, 8) == [24] * 4
    assert units_from_rates([0.45] * 4, [32] * 4, 8) == [16] * 4


def test_a_block_that_loses_nothing_keeps_all_even_if_that_is_no_multiple() -> None:
    assert units_from_rates([0.0, 0.5], [50, 50], 32) == [50, 32]
    assert units_from_rates([0.0, 0.0], [50, 50], 32) == [50, 50]


def test_at_least_one_multiple_stays() -> None:
    assert units_from_rates([0.99, 0.0], [64, 64], 16)[0] == 16
    assert units_from_rates([0.9, 0.9], [20, 20], 32) == [20, 20]


@given(
    st.lists(st.floats(0.0, 0.8), min_size=2, max_size=8),
    st.sampled_from([1, 8, 32]),
)
def test_the_mean_is_met_to_half_a_multiple(rates: list[float], multiple: int) -> None:
    full = [256] * len(rates)
    units = units_from_rates(rates, full, multiple)
    assert all(number % multiple == 0 and multiple <= number <= 256 for number in units)
    exact = sum((1 - rate) * 256 for rate in rates)
    blocks = len(rates) if len({round(rate, 9) for rate in rates}) == 1 else 1
    assert abs(sum(units) - exact) <= multiple / 2 * blocks + 1e-6
    assert units_from_rates(rates_from_units(units, full), full, multiple) == units


@pytest.mark.parametrize("multiple", [4, 8])
def test_no_block_gets_more_than_it_had(multiple: int) -> None:
    units = [40, 24, 48, 16]
    assert units_from_rates(rates_from_units(units, [48] * 4), [48] * 4, multiple) == units


@pytest.mark.parametrize("multiple", [48, 1000])
def test_a_multiple_that_leaves_nothing_to_remove(multiple: int) -> None:
    message = (
        rf"`MLPWidth.multiple` must be less than 48, the number of channels, got {multiple}: .* Choose a smaller one"
    )
    with pytest.raises(InputError, match=message):
        check_multiple("MLPWidth", multiple, 48, "channels")
    check_multiple("MLPWidth", 47, 48, "channels")
    check_multiple("HeadGroups", 1, 1, "groups")  # the only one: no other multiple would help
