"""The stream through the blocks gives what a plain forward gives."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_prune.calibration.stream import Stream
from lit_prune.errors import InputError
from lit_prune.models.families import find_blocks
from lit_prune.shrink.part_method import attention_of
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


def test_modules_run_once_per_batch_and_the_output_is_the_same(
    any_model: PreTrainedModel, batches: list[torch.Tensor]
) -> None:
    blocks, counts = find_blocks(any_model), [0, 0]
    stream = Stream(any_model, blocks, dicts(batches), CPU)
    plain = [stream.output(index, blocks[0]) for index in range(len(batches))]
    attention = attention_of(blocks[0])
    inside = next(each for each in attention[0].modules() if isinstance(each, torch.nn.Linear | Conv1D))
    hook = inside.register_forward_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))
    with stream.once(attention):
        for _ in range(3):
            for index, expected in enumerate(plain):
                torch.testing.assert_close(stream.output(index, blocks[0]), expected)
        counts[1], other = counts[0], stream.copy()
        other.hidden = [hidden + 1 for hidden in other.hidden]
        assert not torch.equal(other.output(0, blocks[0]), plain[0])  # another stream has other inputs
    hook.remove()
    assert counts == [len(batches) + 1, len(batches)]
    assert all("forward" not in vars(module) for module in attention)


class TwoTensors(torch.nn.Module):
    """An attention whose second output other blocks may read."""

    def __init__(self, attention: torch.nn.Module) -> None:
        super().__init__()
        self.attention, self.calls = attention, 0

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        first, _ = self.attention(*args, **kwargs)
        return first, first.sum(-1)


def test_a_module_with_two_outputs_runs_every_time(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    stream, layer = Stream(model, find_blocks(model), dicts(batches), CPU), model.model.layers[0]
    layer.self_attn = two = TwoTensors(layer.self_attn)
    with stream.once([two]):
        for _ in range(2):
            stream.run(find_blocks(model)[0], advance=False)
    assert two.calls == 2 * len(batches)


def _add_one(tensor: torch.Tensor) -> None:
    tensor.add_(1)


def test_a_block_may_change_what_a_module_returned(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    block = find_blocks(model)[0]
    stream, attention = Stream(model, find_blocks(model), dicts(batches), CPU), attention_of(block)
    attention[0].register_forward_hook(lambda _module, _args, output: _add_one(output[0]))
    plain = stream.output(0, block)
    with stream.once(attention):
        for _ in range(3):
            assert torch.equal(stream.output(0, block), plain)
