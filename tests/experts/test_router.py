"""The number of experts that a router needs."""

import pytest
from transformers import DeepseekV3Config, MixtralConfig

from lit_prune.experts.router import fewest_experts, groups_of_router, picked_experts
from tests.conftest import blocks_of, small_model
from tests.experts.models import mixture_model


@pytest.mark.parametrize(("family", "picked"), [("mixtral", 2), ("llama4_text", 1), ("llama", 0)])
def test_picked(family: str, picked: int) -> None:
    model = small_model(family) if family == "llama" else mixture_model(family)
    assert [picked_experts(layer) for layer in blocks_of(model)] == [picked] * 3


def test_the_fewest() -> None:
    config = DeepseekV3Config(n_group=8, topk_group=4)
    assert groups_of_router(config) == 8
    assert fewest_experts(config, 8, 8) == 16  # two in each group
    assert fewest_experts(config, 12, 8) == 24  # three in each of the four groups that are picked
    assert groups_of_router(MixtralConfig()) == 1
    assert fewest_experts(MixtralConfig(), 2, 1) == 2
    assert fewest_experts(MixtralConfig(), 2, 8) == 8
