"""Recipes: settings out of range, the blocks that are selected, the limits of their rates, and the record."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from lit_prune.callbacks import DynamicPruningCallback
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, OWL, Allocation, AlphaPruning, LayerRedundancy, Search, Uniform
from lit_prune.depth import Depth
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.experts import Experts
from lit_prune.hidden import HiddenWidth
from lit_prune.pipeline import prune
from lit_prune.pruning import ADMM, Magnitude, Method, MixedNofM, SparseGPT, Wanda
from lit_prune.recipe import Recipe, recipe_record
from lit_prune.reconstruct import Reconstruct
from lit_prune.shrink import HeadGroups, MLPWidth, Shrink
from lit_prune.slice import Slicing
from tests.conftest import small_model


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(InputError, match=rf"`pruning.sparsity` must be in \[0, 1\).*got {sparsity}"):
        Recipe(sparsity=sparsity)


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *((method, "llama") for method in (Wanda(), MLPWidth(multiple=8), HeadGroups(), Depth())),
        (Shrink([Depth(), MLPWidth(multiple=8)]), "llama"),
        (Shrink([MLPWidth(multiple=8), HeadGroups()]), "llama"),
        (Experts(), "mixtral"),
    ],
    ids=repr,
)
def test_every_method_cuts_the_blocks_at_the_path_that_is_given(method: Method, family: str) -> None:
    model = small_model(family)
    model.config.model_type = "of_my_own"
    model.model.extra = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(3))
    recipe = Recipe(method, 0.5, Uniform(), blocks="model.layers")
    with pytest.raises(InputError, match="`pruning.blocks` must be given for the family 'of_my_own'"):
        replace(recipe, blocks=None).check(model)
    pruned = prune(model, [torch.randint(1, 64, (2, 16)) for _ in range(2)], recipe)
    assert sum(pruned.rates) > 0


def test_a_search_runs_the_blocks_at_the_path_that_is_given() -> None:
    model = small_model()
    model.config.model_type = "of_my_own"
    model.model.extra = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(3))
    recipe = Recipe(Wanda(), 0.5, Search(Uniform(), evaluations=40), blocks="model.layers")
    pruned = prune(model, [torch.randint(1, 64, (2, 16)) for _ in range(2)], recipe)
    assert sum(pruned.rates) / 3 == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"method": Wanda}, r"`pruning.method` must be an object such as Wanda\(\), got the class Wanda\."),
        ({"method": "Wanda"}, r"`pruning.method` must be .* got 'Wanda'\."),
        ({"allocation": DLP}, r"`pruning.allocation` must be an object such as DLP\(\), got the class DLP\."),
        ({"reconstruction": Reconstruct}, r"`pruning.reconstruction` must be .* as Reconstruct\(\), got the class"),
    ],
)
def test_classes_and_names_instead_of_objects(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Recipe(sparsity=0.5, **fields)


def test_a_sparsity_of_nothing_is_refused_for_shapes_alone(model: PreTrainedModel) -> None:
    for method in (MLPWidth(multiple=8), Slicing(multiple=8), Shrink([Depth(), MLPWidth(multiple=8)])):
        with pytest.raises(InputError, match=r"`pruning.sparsity` must remove something, got 0\.0, which .* rounds"):
            Recipe(method, 0.0).check_removes(model)
    for allocation in (DLP(), LayerRedundancy()):
        with pytest.raises(InputError, match=r"must remove something, got 0\.0, which MLPWidth rounds"):
            Recipe(MLPWidth(multiple=8), 0.0, allocation).check_removes(model)
    whole = Recipe(Shrink([Depth(), MLPWidth(multiple=8)]), target_parameters=parameters(model))
    with pytest.raises(InputError, match=r"`pruning.target_parameters` must remove something, got "):
        whole.check_removes(model)
    Recipe(Wanda(), 0.0).check_removes(model)


def test_bounds_out_of_range() -> None:
    with pytest.raises(InputError, match="`pruning.min_rate` and `pruning.max_rate`"):
        Recipe(min_rate=0.5, max_rate=0.4)


@pytest.mark.parametrize(
    ("method", "allocation"),
    [(method, DLP()) for method in (Wanda(), Magnitude(), SparseGPT(), ADMM(), Slicing())]
    + [(method, Uniform()) for method in (MLPWidth(), HeadGroups(), Shrink([MLPWidth()]), Experts(), Depth())]
    + [(HiddenWidth(), Uniform())],
)
def test_the_default_allocation_is_that_of_the_method(method: Method, allocation: Allocation) -> None:
    recipe = Recipe(method, 0.25)
    assert recipe.allocation == allocation
    assert replace(recipe, sparsity=0.5).allocation == allocation
    assert Recipe(method, 0.25, OWL()).allocation == OWL()
    callback = DynamicPruningCallback(method)
    assert callback.fit_plan.recipe is not None
    assert callback.fit_plan.recipe.allocation == allocation


@pytest.mark.parametrize(
    ("recipe", "needs"),
    [
        (Recipe(Wanda(), 0.5, Uniform()), True),
        (Recipe(Magnitude(), 0.5, DLP()), True),
        (Recipe(Magnitude(), 0.5, LayerRedundancy()), True),
        (Recipe(Magnitude(), 0.5, AlphaPruning()), False),
        (Recipe(Slicing(), 0.25, Uniform()), True),  # it reads the stream itself
    ],
)
def test_text_is_needed_by_allocation_or_method(recipe: Recipe, needs: bool) -> None:
    assert recipe.needs_text is needs


def test_targets_and_ignore_select_linears(model: PreTrainedModel) -> None:
    blocks = Recipe(targets=["mlp.up_proj", "q_proj", "v_proj"], ignore=["v_proj"]).find(model)
    assert [list(block.linears) for block in blocks] == [["self_attn.q_proj", "mlp.up_proj"]] * 3


def test_limits_by_hand(model: PreTrainedModel) -> None:
    # of a block's 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 = 7680 weights a tenth is pruned in block 1 alone
    model.model.layers[1].mlp.up_proj.weight.data.view(-1)[:768] = 0
    recipe = Recipe(Wanda(), 0.4, Uniform(), min_rate=0.05, max_rate=0.8)
    limits = recipe.limits(model, recipe.find(model))
    assert limits.sizes == [7680] * 3
    assert limits.lower == [0.05, 0.1, 0.05]
    assert limits.upper == 0.8
    assert limits.target == 0.4
    assert limits.current_sparsity == pytest.approx(0.1 / 3)
    assert recipe.spread(limits, [1.0, 2, 3]) == pytest.approx([0.4] * 3)


def test_limits_are_rounded_into_the_pattern(model: PreTrainedModel) -> None:
    recipe = Recipe(Wanda(MixedNofM(8)), 0.4, Uniform(), min_rate=0.2, max_rate=0.7)
    limits = recipe.limits(model, recipe.find(model))
    assert limits.lower == [2 / 8] * 3
    assert limits.upper == 5 / 8


def test_a_check_returns_the_blocks_and_refuses_what_the_bounds_exclude(model: PreTrainedModel) -> None:
    assert [block.index for block in Recipe(sparsity=0.5).check(model)] == [0, 1, 2]
    with pytest.raises(InputError, match=r"`pruning.sparsity` must be between 0 and 0.4"):
        Recipe(sparsity=0.5, max_rate=0.4).check(model)


def test_a_sparsity_below_the_current_one_is_refused(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    prune(model, batches, Recipe(sparsity=0.6))
    Recipe(sparsity=0.6).check(model)
    with pytest.raises(
        InputError, match=r"must be at least the current sparsity, 0.[56]\d*: weights that are pruned.*; got 0.5"
    ):
        Recipe(sparsity=0.5).check(model)


def test_the_record_is_json_with_method_and_allocation_by_their_repr() -> None:
    record = recipe_record(Recipe(Magnitude(), 0.25, Uniform(), targets=("q_proj",), blocks="model.layers"))
    assert json.loads(json.dumps(record)) == record
    assert record["method"] == "Magnitude(pattern=Unstructured())"
    assert record["allocation"] == "Uniform()"
    assert (record["sparsity"], record["targets"], record["ignore"]) == (0.25, ["q_proj"], [])
    assert (record["blocks"], record["budget"]) == ("model.layers", "linears")


FEWER = {
    "width": (
        MLPWidth(multiple=8),
        "For fewer, Shrink removes other parts too, Depth blocks, and HiddenWidth dimensions.",
    ),
    "parts": (
        Shrink([MLPWidth(multiple=8)]),
        "For fewer, add to `Shrink.parts` Depth, which removes blocks, or HiddenWidth, which narrows",
    ),
    "depth": (Depth(), "For fewer, Shrink removes parts of blocks too"),
    "some": (
        Shrink([MLPWidth(multiple=8), Depth()]),
        "For fewer, add to `Shrink.parts` HiddenWidth, which ",
    ),
    "hidden": (
        HiddenWidth(multiple=8),
        "For fewer, Shrink removes blocks too",
    ),
}


@pytest.mark.parametrize(
    "method", [MLPWidth(multiple=8), HeadGroups(), Depth(), Shrink([Depth(), MLPWidth(multiple=8)])]
)
def test_a_target_above_the_size_of_the_model_is_refused_unless_a_cut_was_rounded_up_to_it(method: Method) -> None:
    model = small_model()
    full = parameters(model)
    larger = Recipe(method, allocation=Uniform(), target_parameters=full + 1)
    with pytest.raises(InputError, match=f"`pruning.target_parameters` must be between .* and {full:,} for "):
        larger.check(model)
    Recipe(method, allocation=Uniform(), target_parameters=full).check(model)
    prune(model, [torch.randint(1, 64, (2, 16)) for _ in range(2)], replace(larger, target_parameters=int(0.82 * full)))
    Recipe(method, allocation=Uniform(), target_parameters=parameters(model) + 1).check(model)


def test_slack_is_what_a_cut_of_the_same_parts_leaves(batches: list[torch.Tensor]) -> None:
    model = small_model()
    prune(model, batches, Recipe(HiddenWidth(multiple=8), 0.25))
    larger = Recipe(Shrink([Depth(), MLPWidth(multiple=8)]), target_parameters=parameters(model) + 1)
    with pytest.raises(InputError, match="`pruning.target_parameters` must be between"):
        larger.check(model)


@pytest.mark.parametrize("name", FEWER)
def test_a_target_that_a_method_does_not_reach_has_a_remedy(name: str, model: PreTrainedModel) -> None:
    method, remedy = FEWER[name]
    with pytest.raises(InputError, match=rf"`pruning.target_parameters` must be between .*, got 100\. {remedy}"):
        Recipe(method, target_parameters=100).check(model)
    with pytest.raises(InputError, match=r"`pruning.target_parameters` must be between .*, got 9,000,000\.$"):
        Recipe(method, target_parameters="9M").check(model)


def test_the_remedy_for_a_target_below_what_the_users_bounds_allow(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match=r"got 100\. For fewer, raise `pruning.max_rate`, which is 0.3\.$"):
        Recipe(MLPWidth(multiple=8), target_parameters=100, max_rate=0.3).check(model)


def test_what_a_remedy_names_reaches_fewer(batches: list[torch.Tensor]) -> None:
    """Each of the methods leaves a model that the others make smaller."""
    methods = [Shrink([MLPWidth(multiple=8), HeadGroups()]), Depth(), HiddenWidth(multiple=8)]
    for first, second in itertools.permutations(methods, 2):
        model = small_model(num_key_value_heads=4)
        prune(model, batches, Recipe(first, 0.5))
        before = model.num_parameters()
        prune(model, batches, Recipe(second, 0.5))
        assert model.num_parameters() < before


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        (MLPWidth(multiple=16), {"sparsity": 0.1}, "sparsity` must remove something, got 0.1, which MLPWidth rounds"),
        (MLPWidth(multiple=16), {"target_parameters": 25000}, "target_parameters` must remove something, got 25,000"),
        (Depth(), {"sparsity": 0.1}, r"which Depth rounds to nothing: remove more\."),
        (Shrink([MLPWidth(multiple=8), HeadGroups()]), {"sparsity": 0.02}, "which Shrink rounds to nothing"),
    ],
)
def test_a_cut_that_is_rounded_to_nothing(method: Method, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(method, **fields).check_removes(small_model())
    Recipe(method, 0.3).check_removes(small_model())
    if not isinstance(method, Depth):
        Recipe(method, 0.1, LayerRedundancy()).check_removes(small_model())  # some blocks may lose more


@pytest.mark.parametrize(
    ("method", "first", "less", "more"),
    [
        (MLPWidth(multiple=8), 0.5, 0.55, 0.6),
        (MLPWidth(multiple=32), 0.0, 0.1, 0.2),  # of 48 channels, 16 go to leave a multiple
        (Depth(), 1 / 3, 0.4, 0.6),
        (HiddenWidth(multiple=8), 0.25, 0.3, 0.4),
        (Shrink([MLPWidth(multiple=8), HeadGroups()]), 0.4, 0.41, 0.46),
    ],
)
def test_a_second_cut_counts_what_is_gone(
    method: Method, first: float, less: float, more: float, batches: list[torch.Tensor]
) -> None:
    model = small_model()
    if first:
        prune(model, batches, Recipe(method, first))
    with pytest.raises(InputError, match="rounds to nothing"):
        Recipe(method, less).check_removes(model)
    Recipe(method, more).check_removes(model)
    before = parameters(model)
    prune(model, batches, Recipe(method, more))
    assert parameters(model) < before


def test_equal_rates_after_others() -> None:
    model, batches = small_model(), list(torch.randint(1, 64, (4, 16)).split(2))
    prune(model, batches, Recipe(MLPWidth(multiple=16), 0.33, LayerRedundancy()))
    Recipe(MLPWidth(multiple=16), 0.44).check_removes(model)
