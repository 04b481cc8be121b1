"""Whether the output of an MLP is added to the residual stream as it is."""

import pytest
import torch

from lit_prune.calibration.stream import Stream
from lit_prune.calibration.written import is_added, outputs_of
from lit_prune.models.families import find_blocks
from lit_prune.shrink.units.parts import mlp_of
from tests.conftest import lively_model

CPU = torch.device("cpu")
BATCHES = [{"input_ids": torch.arange(1, 9)[None]}]


@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("phi", True), ("gemma2", False)])
def test_what_an_mlp_writes(family: str, expected: bool) -> None:
    model = lively_model(family)
    blocks = find_blocks(model)
    stream = Stream(model, blocks, BATCHES, CPU)
    before = stream.hidden[0].clone()
    writer = blocks[0].linears[mlp_of(blocks[0].linears, model.config).writer]
    assert is_added(stream, blocks[0], writer) is expected
    assert torch.equal(stream.hidden[0], before)
    assert not writer.module._forward_hooks


def test_an_output_that_is_multiplied_is_not_added_as_it_is() -> None:
    model = lively_model("llama")
    blocks = find_blocks(model)
    writer = blocks[0].linears["mlp.down_proj"]
    hook = model.model.layers[0].mlp.register_forward_hook(lambda _module, _args, y: 0.5 * y)
    assert not is_added(Stream(model, blocks, BATCHES, CPU), blocks[0], writer)
    hook.remove()


@pytest.mark.parametrize(("family", "expected"), [("granite", False), ("llama", True)])
def test_a_factor_that_the_rounding_of_a_large_stream_hides(family: str, expected: bool) -> None:
    fields = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22} if family == "granite" else {}
    model = lively_model(family, **fields).to(torch.bfloat16)
    blocks = find_blocks(model)
    stream = Stream(model, blocks, BATCHES, CPU)
    assert is_added(stream, blocks[0], blocks[0].linears["mlp.down_proj"]) is expected


def test_collected_outputs_are_copies() -> None:
    model = lively_model("llama")
    blocks = find_blocks(model)
    stream, writer = Stream(model, blocks, BATCHES, CPU), blocks[0].linears["mlp.down_proj"]
    with outputs_of(writer, CPU) as outputs:
        stream.output(0, blocks[0])
        hook = model.model.layers[0].mlp.register_forward_hook(lambda _module, _args, y: y.zero_())
        stream.output(0, blocks[0])
        hook.remove()
    assert len(outputs) == 2
    assert torch.equal(outputs[0], outputs[1])
    assert outputs[0].abs().sum() > 0
