"""The structure of a shrunk model."""

import json

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.allocate import LayerRedundancy, Uniform
from lit_prune.models.structure import describe, structures
from lit_prune.pipeline import prune
from lit_prune.pruning import Method
from lit_prune.recipe import Recipe
from lit_prune.recover import Snapshot
from lit_prune.shrink import HeadGroups, MLPWidth
from lit_prune.shrink.mlp_width import MLPWidths
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
    described = sizes.describe(small_model())
    assert described.achieved == 0.5
    assert described.facts == {"achieved": 0.5, "units": [8, 24, 40], "full": [48, 48, 48]}
    assert described.outcome == "the blocks have 8 to 40 of their 48 channels of the MLP, 50.00% less in the mean."
    assert described.loading.startswith("import lit_prune")
    assert described.sizes == (8, 24, 40)
    equal = MLPWidths([24] * 3, [48] * 3, {"intermediate_size": 1}, {}, "model.layers").describe(small_model())
    assert equal.rows["channels of the MLP of the blocks"] == "24 of 48, the same in every block"
    assert equal.loading == ""
