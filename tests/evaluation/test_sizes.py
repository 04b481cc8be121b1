"""Parameters, bytes and zeros: tied weights once, quantised ones as what they were and as what they take."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lit_prune.evaluation.sizes import full_bytes, parameters, pruned, size_bytes
from lit_prune.models.quantised import packed_bytes, quantised
from tests.conftest import small_model


def half_zero(width: int) -> nn.Linear:
    """Four outputs, and a bias; the first two rows are zero."""
    linear = nn.Linear(width, 4)
    linear.weight.data = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    linear.weight.data[:2] = 0
    linear.bias.data.fill_(1)
    return linear.requires_grad_(False)


def test_a_linear_by_hand() -> None:
    linear = half_zero(3)
    assert parameters(linear) == 4 * 3 + 4
    assert size_bytes(linear) == 4 * 16
    assert size_bytes(linear.to(torch.bfloat16)) == 2 * 16
    assert pruned(linear) == (6, 16)


def test_tied_weights_count_once(model: PreTrainedModel) -> None:
    apart = small_model(tie_word_embeddings=False)
    assert parameters(apart) - parameters(model) == 64 * 32
    assert size_bytes(model) == full_bytes(model) == 4 * parameters(model)
    assert pruned(model) == (32, parameters(model))  # the embedding of the padding token


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_linear(quantization: Any) -> None:
    class Quantised(nn.Sequential):
        dtype = torch.bfloat16

    linear = half_zero(64)
    packed = quantised(linear, quantization, False, masked=True)
    model: Any = Quantised(packed)
    assert parameters(model) == 4 * 64 + 4
    assert size_bytes(model) == packed_bytes(packed) + 4 * 4 < 4 * 4 * 64
    assert full_bytes(model) == 2 * 4 * 64 + 4 * 4
    assert pruned(model) == (2 * 64, 4 * 64 + 4)
