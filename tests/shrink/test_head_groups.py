"""HeadGroups against the formula, on a block of a model."""

import torch
from torch import Tensor

from lit_prune.allocate import Uniform
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.shrink import HeadGroups
from tests.conftest import inputs_by_linear, lively_model
from tests.shrink.given import Given


@torch.no_grad()
def test_the_group_that_costs_least_goes(batches: list[Tensor]) -> None:
    dense, model = lively_model("llama"), lively_model("llama")
    x_PI = inputs_by_linear(dense, find_blocks(dense)[0], batches)["self_attn.o_proj"].double()
    weight_IO = dense.model.layers[0].self_attn.o_proj.weight.double().T
    gram_II = x_PI.T @ x_PI / len(x_PI)
    gram_II += 0.01 * gram_II.diagonal().mean() * torch.eye(32)
    inverse_II = torch.linalg.inv(gram_II)
    groups = [slice(0, 16), slice(16, 32)]
    costs = [weight_IO[u].T @ torch.linalg.inv(inverse_II[u, u]) @ weight_IO[u] for u in groups]
    kept = max((0, 1), key=lambda group: float(costs[group].trace()))
    prune(model, batches, Recipe(HeadGroups(), 1 / 6, Given((0.5, 0, 0))))
    attention, before = model.model.layers[0].self_attn, dense.model.layers[0].self_attn
    assert torch.equal(attention.q_proj.weight, before.q_proj.weight[groups[kept]])
    assert torch.equal(attention.v_proj.weight, before.v_proj.weight[8 * kept : 8 * kept + 8])
    expected_SO = torch.linalg.solve(gram_II[groups[kept], groups[kept]], (gram_II @ weight_IO)[groups[kept]])
    torch.testing.assert_close(attention.o_proj.weight.double(), expected_SO.T, rtol=1e-4, atol=1e-5)


def test_the_config_of_equal_groups(batches: list[Tensor]) -> None:
    model = lively_model("llama")
    prune(model, batches, Recipe(HeadGroups(), 0.5, Uniform()))
    config = model.config
    assert [config.num_attention_heads, config.num_key_value_heads, config.head_dim] == [2, 1, 8]
    assert model(batches[0], use_cache=True).past_key_values.layers[0].keys.shape[1] == 1
