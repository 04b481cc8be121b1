"""The activation of dimensions."""

import pytest
import torch
from torch import Tensor

from lit_prune.calibration.stream import Stream
from lit_prune.hidden.activation import last_outputs, mean_activation, most_active
from lit_prune.hidden.stream_width import layout_of
from lit_prune.models.families import find_blocks
from tests.conftest import lively_model


@torch.no_grad()
def test_the_mean_over_tokens_and_norms(batches: list[Tensor]) -> None:
    model = lively_model("llama")
    blocks, mask = find_blocks(model), torch.ones_like(batches[0])
    mask[0, 9:] = 0
    stream = Stream(model, blocks, [{"input_ids": batches[0], "attention_mask": mask}], torch.device("cpu"))
    found_D = mean_activation(stream, blocks, layout_of(model), torch.device("cpu"))
    norms = {
        f"{index} {name}": getattr(layer, name)
        for index, layer in enumerate(model.model.layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    with last_outputs(norms) as outputs:
        model(batches[0], attention_mask=mask)
    expected_D = torch.cat([output[mask.bool()] for output in outputs.values()]).abs().mean(0)
    assert len(outputs) == 6
    torch.testing.assert_close(found_D.float(), expected_D)


def test_the_most_active() -> None:
    assert most_active(torch.tensor([3.0, 1.0, 2.0, 2.0]), 3).tolist() == [0, 2, 3]
    assert most_active(torch.tensor([3.0, 1.0, 2.0, 2.0]), 2).tolist() == [0, 2]


def test_hooks_go_with_the_context() -> None:
    norm = torch.nn.LayerNorm(2)
    with pytest.raises(ZeroDivisionError), last_outputs({"norm": norm}):
        raise ZeroDivisionError
    assert not norm._forward_hooks
