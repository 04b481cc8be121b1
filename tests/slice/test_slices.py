"""The structure of a sliced model gives a dense one its widths, and says what a report shows of them."""

from __future__ import annotations

import pytest
import torch

from lit_prune.models.remote_code.modeling_sliced import SlicedCausalLM
from lit_prune.slice.slices import Slices
from tests.conftest import small_model

SLICES = Slices([24, 16, 32, 32], untied_head=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_dense_model_takes_the_widths_and_a_sliced_one_stays(device: str) -> None:
    model = small_model().to(device)
    for _ in range(2):
        SLICES.rebuild(model)
    assert isinstance(model, SlicedCausalLM)
    assert [layer.mlp.up_proj.in_features for layer in model.model.layers] == [24, 16, 32]
    assert model.model.layers[0].mlp_shortcut.shape == (24, 16)
    assert model.device == torch.device(device)


def test_described_by_hand() -> None:
    model = small_model()
    SLICES.rebuild(model)
    described = SLICES.describe(model)
    shortcuts = 24 * 24 + 24 * 16 + 16 * 16 + 16 * 32 + 32 * 32 + 32 * 32
    assert described.facts == {
        "achieved": 0.25,
        "hidden_size": 32,
        "sizes": [24, 16, 32],
        "head_size": 32,
        "shortcut_parameters": shortcuts,
        "untied_head": True,
    }
    assert described.added_parameters == shortcuts
    assert described.rows == {
        "dimensions of the residual stream removed, mean over blocks": "0.2500",
        "widths of the blocks": "16 to 32 of 32",
    }
    assert described.outcome.startswith("the residual stream has 16 to 32 of its 32 dimensions, 25.00% less in the ")
    assert (described.sizes, described.full, described.achieved) == ((24, 16, 32), 32, 0.25)
