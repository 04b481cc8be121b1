"""The linears of the blocks are quantised and store their masks; everything else stays as it is."""

from typing import Any

import pytest
import torch

from lit_prune.models.quantised import dequantised, mask, quantised_linears
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import mark_quantised, quantise
from tests.conftest import WIDE, small_model


@pytest.mark.parametrize(("quantization", "bits"), [("nf4", 4), ("int8", 8)])
def test_linears_of_the_blocks_are_quantised_with_their_masks(
    quantization: Any, bits: int, batches: list[torch.Tensor]
) -> None:
    model = small_model(**WIDE)
    prune(model, batches, Recipe(sparsity=0.5))
    weight = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    head = model.lm_head.weight
    quantise(model, quantization, double_quant=False)
    assert len(list(quantised_linears(model))) == 3 * 7
    assert model.lm_head.weight is head
    linear = model.model.layers[1].mlp.up_proj
    assert torch.equal(mask(linear), weight != 0)
    assert (dequantised(linear)[weight == 0] == 0).all()
    error = (dequantised(linear) - weight).abs().max() / weight.abs().max()
    assert 0 < error < (0.01 if bits == 8 else 0.2)
    assert (model.is_loaded_in_4bit, model.is_loaded_in_8bit) == (bits == 4, bits == 8)


def test_a_model_without_masks_stores_none() -> None:
    model = small_model(**WIDE)
    quantise(model, "int8", double_quant=False)
    assert all(mask(module) is None for _, module in quantised_linears(model))


def test_a_model_in_full_precision_is_marked_as_such() -> None:
    model = small_model()
    model.is_loaded_in_4bit = True
    mark_quantised(model)
    assert not model.is_loaded_in_4bit
    assert not model.is_loaded_in_8bit
