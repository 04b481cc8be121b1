"""The masked product over a quantised weight: against the plain expression, and what it keeps in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.models.quantised import dequantised, mask, quantised_linears
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import merged_weight
from lit_prune.recover.layers.masked_quantised import QuantisedProduct
from tests.conftest import WIDE, small_model
from tests.recover.test_qlora import KINDS, healed, ids, recovering


@pytest.mark.parametrize("quantization", KINDS)
def test_gradients_are_those_of_the_dense_expression(quantization: Any) -> None:
    model = small_model(**WIDE)
    up = model.model.layers[0].mlp.up_proj
    prune(model, [ids()], Recipe())
    up.weight.data[:, :2] = 16  # beside which others are rounded to zero
    model = recovering(model, form="merged", quantization=quantization)
    layer = model.model.layers[0].mlp.up_proj
    weight_OI, keep_OI = dequantised(layer.base_layer), mask(layer.base_layer)
    assert (weight_OI[keep_OI] == 0).any()  # which are trained all the same
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    a, b, scale = layer.adapter()
    ours = QuantisedProduct.apply(x, a, b, scale, layer.base_layer)
    plain = x @ ((weight_OI + scale * b @ a) * keep_OI).T
    torch.testing.assert_close(ours, plain)
    found = torch.autograd.grad(ours.square().sum(), (x, a, b))
    for one, other in zip(found, torch.autograd.grad(plain.square().sum(), (x, a, b)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    assert (merged_weight(layer)[(weight_OI == 0) & keep_OI] != 0).all()
    assert (merged_weight(layer)[~keep_OI] == 0).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_a_weights_size_is_kept_for_the_backward_pass(checkpointing: bool) -> None:
    model = healed(form="merged")
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    shapes = {(module.out_features, module.in_features) for _, module in quantised_linears(model)}
    shapes |= {shape[::-1] for shape in shapes}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
        loss = model(ids()[:1, :4], labels=ids()[:1, :4]).loss
    loss.backward()
    head = model.lm_head.weight
    assert not [t.shape for t in saved if tuple(t.shape) in shapes and t.data_ptr() != head.data_ptr()]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_dropout_of_a_masked_adapter_is_off_in_evaluation() -> None:
    model = healed(form="merged", dropout=0.5)
    x = torch.ones(1, 64)
    layer = model.model.layers[0].mlp.up_proj
    assert not torch.equal(layer(x), layer(x))
    model.eval()
    assert torch.equal(layer(x), layer(x))


def test_pefts_own_merge_is_refused() -> None:
    layer = healed(form="merged").model.layers[0].mlp.up_proj
    with pytest.raises(TypeError, match="a masked adapter over a quantised weight can be merged by the export only"):
        layer.merge()
