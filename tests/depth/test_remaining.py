"""The structure of a model that has lost blocks."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lit_prune.allocate import LayerRedundancy, Uniform
from lit_prune.depth import Depth
from lit_prune.depth.remaining import RemainingBlocks, runs_of, spans
from lit_prune.experts import Experts
from lit_prune.hidden import HiddenWidth
from lit_prune.models.structure import describe, structures
from lit_prune.pipeline import prune
from lit_prune.pruning import Method
from lit_prune.recipe import Recipe
from lit_prune.recover import Snapshot
from lit_prune.shrink import MLPWidth
from tests.conftest import small_model
from tests.experts.models import mixture_model


def test_spans() -> None:
    assert spans([3, 7, 8, 9]) == "3, 7 to 9"
    assert spans([1, 2, 4]) == "1, 2, 4"
    assert runs_of([3, 7, 8]) == [[3], [7, 8]]


def test_description() -> None:
    described = RemainingBlocks([0, 1, 5], 6, "model.layers").describe(small_model())
    assert described.facts == {"achieved": 0.5, "blocks": 6, "removed": [2, 3, 4], "remaining": [0, 1, 5]}
    assert described.outcome == "3 of 6 blocks remain; removed are 2 to 4."
    assert described.rows == {
        "blocks removed, share": "0.5000",
        "blocks that remain": "3 of 6, without 2 to 4",
    }
    assert described.sizes == (1, 1, 0, 0, 0, 1)
    assert described.loading == ""


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_dense_model_is_rebuilt(family: str, batches: list[Tensor]) -> None:
    model, fresh = small_model(family), small_model(family)
    prune(model, batches, Recipe(Depth(), 1 / 3, Uniform()))
    stored = json.loads(json.dumps(Snapshot.of(model).to_dict()))
    for _ in range(2):
        Snapshot.from_dict(stored).rebuild(fresh)
    assert structures(fresh) == structures(model)
    assert fresh.config.to_dict() == model.config.to_dict()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(batches[0]).logits, model(batches[0]).logits)


@pytest.mark.parametrize("depth_first", [True, False])
def test_blocks_and_channels_in_either_order(depth_first: bool, batches: list[Tensor]) -> None:
    """The sizes of the blocks that remain are recorded for these alone, and can be reduced again."""
    methods: list[Method] = [Depth(), MLPWidth(multiple=8)]
    names = ["RemainingBlocks", "MLPWidths"]
    model, fresh = small_model(), small_model()
    for method in methods if depth_first else methods[::-1]:
        prune(model, batches, Recipe(method, 1 / 3, LayerRedundancy(base=0.1)))
    # the last one is that of the last cut, which is reported
    assert [type(found).__name__ for found in structures(model)] == (names if depth_first else names[::-1])
    Snapshot.of(model).rebuild(fresh)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert type(fresh) is type(model)
    assert torch.equal(fresh(batches[0]).logits, model(batches[0]).logits)
    prune(model, batches, Recipe(MLPWidth(multiple=8), 0.5, Uniform()))
    assert type(model) is LlamaForCausalLM
    assert model.config.intermediate_size == 24
    described = {found.name: found.sizes for found in describe(model)}
    assert described["depth"].count(0) == 1
    assert described["mlp_width"] == (24, 24)


def test_a_model_that_was_cut_before_is_rebuilt_with_fewer_blocks(batches: list[Tensor]) -> None:
    model, first = small_model(num_hidden_layers=6), small_model(num_hidden_layers=6)
    for one in (model, first):
        prune(one, batches, Recipe(Depth(), 1 / 3, Uniform()))
    prune(model, batches, Recipe(Depth(), 2 / 3, Uniform()))
    Snapshot.of(model).rebuild(first)
    first.load_state_dict(model.state_dict(), strict=True)
    assert first.config.to_dict() == model.config.to_dict()
    assert torch.equal(first(batches[0]).logits, model(batches[0]).logits)


def test_other_structures_describe_the_remaining_blocks(batches: list[Tensor]) -> None:
    model, mixtures = small_model(), mixture_model()
    prune(model, batches, Recipe(HiddenWidth(multiple=8), 0.25, Uniform()))
    prune(mixtures, batches, Recipe(Experts(), 1 / 3, Uniform()))
    for one, sizes in ((model, (24, 24)), (mixtures, (4, 4))):
        prune(one, batches, Recipe(Depth(), 1 / 3, Uniform()))
        assert describe(one)[0].sizes == sizes
