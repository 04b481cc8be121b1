"""The moments of inputs and errors against plain forwards of the dense model and of one with a changed block."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.calibration.errors import ErrorMoments, observe_errors
from lit_prune.calibration.stream import Stream
from lit_prune.models.families import find_blocks
from tests.calibration.plain_forward import hidden_by_block
from tests.conftest import inputs_by_linear, lively_model

CPU = torch.device("cpu")
WRITER = "mlp.down_proj"


def moments_of_second_block(
    dense: PreTrainedModel, changed: PreTrainedModel, batches: list[dict[str, Tensor]], constant: bool = False
) -> tuple[ErrorMoments, ErrorMoments]:
    blocks = find_blocks(changed)
    targets, stream = Stream(dense, find_blocks(dense), batches, CPU), Stream(changed, blocks, batches, CPU)
    for block in find_blocks(dense)[:2]:
        targets.run(block)
    stream.run(blocks[0])
    before = [hidden.clone() for hidden in stream.hidden]
    found = observe_errors(stream, blocks[1], blocks[1].linears[WRITER], targets.hidden, constant=constant)
    assert all(torch.equal(a, b) for a, b in zip(before, stream.hidden, strict=True))
    return found


def changed_model() -> PreTrainedModel:
    changed = lively_model("llama")
    changed.model.layers[0].mlp.down_proj.weight.data[:, :24] = 0
    return changed


@torch.no_grad()
@pytest.mark.parametrize("constant", [False, True])
def test_every_other_batch_is_in_one_half(batches: list[Tensor], constant: bool) -> None:
    dense, changed = lively_model("llama"), changed_model()
    dicts = [{"input_ids": batch} for batch in batches]
    halves = moments_of_second_block(dense, changed, dicts, constant)
    for number, half in enumerate(halves):
        some = dicts[number::2]
        x_PI = inputs_by_linear(changed, find_blocks(changed)[1], batches[number::2])[WRITER]
        if constant:
            x_PI = torch.cat([x_PI, torch.ones(len(x_PI), 1)], dim=1)
        errors = [hidden_by_block(dense, batch)[1][1] - hidden_by_block(changed, batch)[1][1] for batch in some]
        error_PD = torch.cat([error_BTD.flatten(0, 1) for error_BTD in errors])
        assert half.tokens == len(error_PD) == len(x_PI)
        torch.testing.assert_close(half.gram_II, x_PI.T @ x_PI, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(half.cross_ID, x_PI.T @ error_PD, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_does_not_count(batches: list[Tensor]) -> None:
    dense, changed = lively_model("llama"), changed_model()
    short = [{"input_ids": batch[:, :10]} for batch in batches]
    mask = torch.ones_like(batches[0]).index_fill(1, torch.arange(10, batches[0].shape[1]), 0)
    padded = [{"input_ids": batch, "attention_mask": mask} for batch in batches]
    for one, other in zip(
        moments_of_second_block(dense, changed, short), moments_of_second_block(dense, changed, padded), strict=True
    ):
        assert one.tokens == other.tokens
        torch.testing.assert_close(one.gram_II, other.gram_II, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.cross_ID, other.cross_ID, rtol=1e-4, atol=1e-4)


def test_the_sum_of_two() -> None:
    one = ErrorMoments(torch.tensor([[1.0]]), torch.tensor([[2.0]]), 3)
    both = one + ErrorMoments(torch.tensor([[10.0]]), torch.tensor([[20.0]]), 30)
    assert (both.gram_II.item(), both.cross_ID.item(), both.tokens) == (11, 22, 33)
