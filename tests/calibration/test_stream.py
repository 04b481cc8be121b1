"""The stream through the blocks gives what a plain forward gives."""

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.calibration.stream import Stream
from lit_prune.errors import InputError
from lit_prune.models.families import find_blocks
from tests.calibration.plain_forward import hidden_by_block
from tests.conftest import small_model

CPU = torch.device("cpu")


def dicts(batches: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": batch} for batch in batches]


def test_streaming_gives_what_a_plain_forward_gives(any_model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    blocks = find_blocks(any_model)
    stream = Stream(any_model, blocks, dicts(batches), CPU)
    for block in blocks:
        stream.run(block)
    for hidden, batch in zip(stream.hidden, dicts(batches), strict=True):
        torch.testing.assert_close(hidden, hidden_by_block(any_model, batch)[-1][1])


def test_blocks_are_called_as_before_afterwards(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    before = model(batches[0]).logits
    Stream(model, find_blocks(model), dicts(batches), CPU)
    assert torch.equal(model(batches[0]).logits, before)


def test_without_advancing_the_stream_stands_still(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    blocks = find_blocks(model)
    stream = Stream(model, blocks, dicts(batches), CPU)
    before = [hidden.clone() for hidden in stream.hidden]
    stream.run(blocks[0], advance=False)
    assert all(torch.equal(a, b) for a, b in zip(before, stream.hidden, strict=True))


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3_text"])
def test_masks_and_rotary_embeddings_of_all_layer_types_are_kept(family: str) -> None:
    model = small_model(family)
    long = torch.randint(1, 64, (1, 32), generator=torch.Generator().manual_seed(0))  # longer than the window of 8
    blocks = find_blocks(model)
    stream = Stream(model, blocks, [{"input_ids": long}], CPU)
    for block in blocks:
        stream.run(block)
    torch.testing.assert_close(stream.hidden[0], hidden_by_block(model, {"input_ids": long})[-1][1])


def test_arguments_of_equal_batches_are_stored_once(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    stream = Stream(model, find_blocks(model), dicts(batches), CPU)
    embeddings = {id(kwargs["position_embeddings"][0]) for batch in stream.arguments for _, kwargs in batch}
    assert len(embeddings) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_name_the_block(model: PreTrainedModel, batches: list[torch.Tensor], bad: float) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = bad
    blocks = find_blocks(model)
    stream = Stream(model, blocks, dicts(batches), CPU)
    stream.run(blocks[0])
    with pytest.raises(InputError, match="block 1 gives NaN or infinity on calibration batch 0"):
        stream.run(blocks[1])
