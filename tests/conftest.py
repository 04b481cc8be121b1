"""Small models built from configs, and text, for all tests."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may look for a hub

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel

from lit_prune.load import load_model, new_model

settings.register_profile("lit_prune", deadline=None, derandomize=True, database=None)
settings.load_profile("lit_prune")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8, "head_dim": 8},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": {"head_dim": 8},
}


def small_model(family: str = "llama", **fields: object) -> PreTrainedModel:
    """A fresh model of three blocks whose weights differ from block to block."""
    torch.manual_seed(0)
    model = new_model({"model_type": family, **SMALL, **FAMILIES[family], **fields}).eval()
    for index, layer in enumerate(model.model.layers):
        for parameter in layer.parameters():
            parameter.data.mul_(1 + index)
    return model


@pytest.fixture(params=FAMILIES)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return small_model(request.param)


@pytest.fixture
def model() -> PreTrainedModel:
    return small_model()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(torch.randint(1, 64, (6, 16), generator=torch.Generator().manual_seed(1)).split(2))


@pytest.fixture
def embedded() -> PreTrainedModel:
    return load_model("embedded", "float32")
