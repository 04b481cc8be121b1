"""Small models with mixtures of six experts."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from tests.conftest import lively_model

MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"n_routed_experts": 6},  # the first block is not a mixture
    "deepseek_v3": {"n_routed_experts": 6, "topk_group": 2},  # three in each of two groups; a bias in a buffer
    "gpt_oss": {"num_local_experts": 6},  # stored transposed, with biases
    "llama4_text": {"num_local_experts": 6},  # the router's weight multiplies the input
    "mixtral": {"num_local_experts": 6},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 6},  # a router that is an nn.Linear
    "qwen2_moe": {"num_experts": 6},  # a shared expert
    "qwen3_moe": {"num_experts": 6},  # the middle block is not a mixture
    "qwen3_next": {"num_experts": 6},
}


def mixture_model(family: str = "mixtral", **fields: Any) -> PreTrainedModel:
    """A model of three blocks whose mixtures have six experts."""
    return lively_model(family, **{**MIXTURES[family], **fields})
