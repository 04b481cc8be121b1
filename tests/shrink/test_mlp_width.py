"""MLPWidth against the formula, on a block of a model."""

import torch
from torch import Tensor

from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.shrink import MLPWidth
from tests.conftest import inputs_by_linear, lively_model
from tests.shrink.given import Given


@torch.no_grad()
def test_the_channels_and_the_weights_of_the_first_block(batches: list[Tensor]) -> None:
    dense, model = lively_model("llama"), lively_model("llama")
    inputs = inputs_by_linear(dense, find_blocks(dense)[0], batches)
    x_PI = inputs["mlp.down_proj"].double()
    weight_IO = dense.model.layers[0].mlp.down_proj.weight.double().T
    gram_II = x_PI.T @ x_PI / len(x_PI)
    gram_II += 0.01 * gram_II.diagonal().mean() * torch.eye(48)
    prune(model, batches, Recipe(MLPWidth(multiple=1, rounds=1), 12 / 144, Given((0.25, 0, 0))))
    cost_I = weight_IO.square().sum(1) / torch.linalg.inv(gram_II).diagonal()
    kept = cost_I.argsort()[12:].sort().values
    mlp, before = model.model.layers[0].mlp, dense.model.layers[0].mlp
    assert torch.equal(mlp.gate_proj.weight, before.gate_proj.weight[kept])
    assert torch.equal(mlp.up_proj.weight, before.up_proj.weight[kept])
    expected_SO = torch.linalg.solve(gram_II[kept][:, kept], (gram_II @ weight_IO)[kept])
    torch.testing.assert_close(mlp.down_proj.weight.double(), expected_SO.T, rtol=1e-4, atol=1e-5)
    assert [mlp.intermediate_size, mlp.down_proj.in_features, mlp.up_proj.out_features] == [36, 36, 36]


@torch.no_grad()
def test_the_second_block_sees_the_first_one_shrunk(batches: list[Tensor]) -> None:
    model = lively_model("llama")
    prune(model, batches, Recipe(MLPWidth(multiple=8), 0.5, Given((0.75, 0.25, 0.5))))
    alone = lively_model("llama")
    prune(alone, batches, Recipe(MLPWidth(multiple=8), 0.25 / 3 + 1e-3, Given((0, 0.25, 0))))
    one, other = (shrunk.model.layers[1].mlp.down_proj.weight for shrunk in (model, alone))
    assert one.shape == other.shape
    assert not torch.allclose(one, other)
