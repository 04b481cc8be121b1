"""The modules that read and write the stream."""

import pytest
import torch

from lit_prune.evaluation.sizes import parameters
from lit_prune.hidden.stream_width import (
    LAYOUTS,
    head_dim,
    keep_dimensions,
    layout_of,
    narrow_ends,
    narrow_layer,
    parameters_of_a_dimension,
    set_width,
    stream_fields,
)
from lit_prune.models.load import new_model
from tests.conftest import small_model

KEPT = torch.tensor([0, 2, 3, *range(8, 29)])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", LAYOUTS)
def test_the_shapes_are_those_of_a_narrow_model(family: str, *, tied: bool) -> None:
    model = small_model(family, tie_word_embeddings=tied)
    dense, each = small_model(family, tie_word_embeddings=tied), parameters_of_a_dimension(model)
    layout = layout_of(model)
    for index, layer in enumerate(model.model.layers):
        narrow_layer(layer, layout, KEPT, model.config, index)
    narrow_ends(model, layout, KEPT)
    set_width(model, 24)
    assert parameters(dense) - parameters(model) == 8 * each
    like = new_model(model.config.to_dict())
    assert {name: weight.shape for name, weight in model.state_dict().items()} == {
        name: weight.shape for name, weight in like.state_dict().items()
    }
    for module, other in zip(model.modules(), like.modules(), strict=True):
        sizes = [{name: value for name, value in vars(one).items() if type(value) is int} for one in (module, other)]
        assert sizes[0] == sizes[1], type(module)
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight[:, KEPT])
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, dense.model.layers[1].mlp.down_proj.weight[KEPT])


def test_a_bias_goes_with_the_rows() -> None:
    linear = torch.nn.Linear(2, 3)
    bias = linear.bias.clone()
    keep_dimensions(linear, torch.tensor([0]), 1)
    assert torch.equal(linear.bias, bias)
    keep_dimensions(linear, torch.tensor([0, 2]), 0)
    assert torch.equal(linear.bias, bias[[0, 2]])
    assert (linear.in_features, linear.out_features) == (1, 2)


def test_fields() -> None:
    config = small_model("llama").config
    assert head_dim(config) == 8
    assert stream_fields(config, 24) == {"hidden_size": 24, "head_dim": 8}
