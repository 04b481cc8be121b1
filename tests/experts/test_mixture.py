"""The mixture of a block, and its experts that stay."""

import pytest
import torch
from torch import nn

from lit_prune.experts.mixture import (
    NoMixture,
    count_experts,
    expert_fields,
    keep_experts,
    mixture_of,
    parameters_of_an_expert,
)
from tests.conftest import blocks_of, small_model
from tests.experts.models import mixture_model

AXES = {
    "mixtral": {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
    "gpt_oss": {
        *("mlp.router.weight", "mlp.router.bias", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        *("mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"),
    },
    "deepseek_v3": {
        *("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
        *("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    },
}


def last_block(family: str) -> tuple[nn.Module, object]:
    model = mixture_model(family)
    return list(blocks_of(model))[-1], model.config


@pytest.mark.parametrize("family", AXES)
def test_every_tensor_of_the_experts_is_found_and_sliced(family: str) -> None:
    layer, config = last_block(family)
    mixture = mixture_of(layer, config, 2)
    assert mixture is not None
    assert mixture.count == count_experts(layer) == 6
    assert mixture.axes == dict.fromkeys(AXES[family], 0)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    keep_experts(layer, mixture, [0, 3, 4], config, 2)
    assert mixture.count == 3
    for name, tensor in layer.state_dict().items():
        expected = before[name][[0, 3, 4]] if name in AXES[family] else before[name]
        assert torch.equal(tensor, expected), name
    assert {vars(module)["num_experts"] for module in layer.modules() if "num_experts" in vars(module)} == {3}


def test_parameters_of_an_expert() -> None:
    layer, config = last_block("mixtral")
    mixture = mixture_of(layer, config, 2)
    assert mixture is not None
    assert parameters_of_an_expert(layer, mixture) == 3 * 32 * 48 + 32  # gate, up, down; a row of the router


def test_a_block_without_experts() -> None:
    model = mixture_model("qwen3_moe")
    layer = list(blocks_of(model))[1]
    assert mixture_of(layer, model.config, 1) is None
    assert count_experts(layer) == 0


def test_aliases_of_the_number() -> None:
    assert expert_fields(mixture_model("deepseek_v3").config, 6) == ["num_local_experts", "n_routed_experts"]
    assert expert_fields(small_model("llama").config, 6) == []


def test_a_config_that_says_something_else() -> None:
    layer, config = last_block("mixtral")
    config.num_local_experts = 5  # type: ignore[attr-defined]
    with pytest.raises(NoMixture, match="do not have the shapes that its config says"):
        mixture_of(layer, config, 2)
