"""The distance of the input and the output of runs of blocks, against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_prune.calibration.stream import Stream
from lit_prune.depth.distance import distances
from lit_prune.models.families import find_blocks
from tests.conftest import lively_model


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2])
def test_distances_by_the_formula(length: int, batches: list[Tensor]) -> None:
    model = lively_model("llama")
    mask_BT = torch.ones_like(batches[0])
    mask_BT[0, :5] = 0
    dicts = [{"input_ids": batches[0], "attention_mask": mask_BT}, {"input_ids": batches[1]}]
    blocks = find_blocks(model)
    found = distances(Stream(model, blocks, dicts, model.device), blocks, length)

    seen: list[list[Tensor]] = [[], [], [], []]  # the unmasked positions in front of every block, and at the end
    hooks = [model.model.layers[0].register_forward_pre_hook(lambda _m, args: seen[0].append(args[0]))]
    for number, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_hook(lambda _m, _a, y, number=number: seen[number + 1].append(y)))
    for batch in dicts:
        model(**batch, use_cache=False)
    at = [torch.cat([x[0][mask_BT.bool()], x[1].flatten(0, 1)]) for x in seen]
    expected = [
        1 - float(F.cosine_similarity(at[begin], at[begin + length], dim=-1).mean()) for begin in range(4 - length)
    ]
    assert found == pytest.approx(expected, abs=1e-6)
    assert min(expected) > 0.01
