"""The structure of a model with a narrower stream."""

import json

import pytest
import torch
from torch import Tensor

from lit_prune.allocate import LayerRedundancy, Uniform
from lit_prune.hidden import HiddenWidth
from lit_prune.hidden.size import HiddenSize
from lit_prune.models.structure import structures
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import Snapshot
from lit_prune.shrink import MLPWidth
from tests.conftest import lively_model, small_model

NARROW = Recipe(HiddenWidth(multiple=8), 0.25, Uniform())
CHANNELS = Recipe(MLPWidth(multiple=8), 0.5, LayerRedundancy(base=0.1))


@pytest.mark.parametrize("recipes", [[NARROW], [NARROW, CHANNELS], [CHANNELS, NARROW]], ids=len)
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_a_dense_model_is_rebuilt(recipes: list[Recipe], family: str, batches: list[Tensor]) -> None:
    model, fresh = lively_model(family), lively_model(family)
    for recipe in recipes:
        prune(model, batches, recipe)
    stored = json.loads(json.dumps(Snapshot.of(model).to_dict()))
    for _ in range(2):
        Snapshot.from_dict(stored).rebuild(fresh)
    assert type(fresh) is type(model)
    assert structures(fresh) == structures(model)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(batches[0]).logits, model(batches[0]).logits)


def test_description() -> None:
    described = HiddenSize(24, 32, 3).describe(small_model())
    assert described.facts == {"achieved": 0.25, "width": 24, "full": 32}
    assert described.outcome == "its residual stream has 24 of its 32 dimensions."
    assert described.sizes == (24, 24, 24)
