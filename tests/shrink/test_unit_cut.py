"""The removal of units of one block, and what it is calculated from."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.calibration.stream import Stream
from lit_prune.models import structure
from lit_prune.models.families import find_blocks
from lit_prune.shrink.mlp_width import MLPWidths
from lit_prune.shrink.unit_cut import UnitCut, UnitRemoval
from tests.conftest import inputs_by_linear, lively_model

CPU = torch.device("cpu")
REMOVAL = UnitRemoval(rounds=4, damping=0.01, compensate=True)


def begun(family: str, batches: list[Tensor], units: list[int], **given: Any) -> tuple[Any, UnitCut, Stream]:
    model = lively_model(family)
    blocks = find_blocks(model)
    parts = [MLPWidths.find(block.linears, model.config) for block in blocks]
    settings = {"removal": REMOVAL, "sizes_class": MLPWidths, "full": [48] * 3, "compares": False} | given
    cut = UnitCut(model, blocks, parts, units, **settings)
    return model, cut, Stream(model, blocks, [{"input_ids": batch} for batch in batches], CPU)


@torch.no_grad()
def test_what_is_observed(batches: list[Tensor]) -> None:
    model, cut, stream = begun("llama", batches, [48] * 3)
    block, part = cut.blocks[0], cut.parts[0]
    x_PI = inputs_by_linear(model, block, batches)["mlp.down_proj"]
    weight_IO, gram_II = REMOVAL.observed(stream, block, part, None)
    assert torch.equal(weight_IO, block.linears["mlp.down_proj"].weight_OI.T)
    torch.testing.assert_close(gram_II, x_PI.T @ x_PI / len(x_PI))
    targets = [stream.output(index, block) for index in range(len(batches))]
    same = REMOVAL.statistics(stream, block, part, targets)  # without an error there is nothing to make up for
    torch.testing.assert_close(same.corrected["mlp.down_proj"], block.linears["mlp.down_proj"].weight_OI)
    torch.testing.assert_close(same.grams["mlp.down_proj"], gram_II)
    twice = [target_BTD + x_BTD for target_BTD, x_BTD in zip(targets, stream.hidden, strict=True)]
    other = REMOVAL.statistics(stream, block, part, twice)
    assert not torch.allclose(other.corrected["mlp.down_proj"], same.corrected["mlp.down_proj"])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_block_is_cut_and_another_one_stays(family: str, batches: list[Tensor]) -> None:
    """Phi has biases, of which that of the writer takes part in the compensation."""
    model, cut, stream = begun(family, batches, [40, 48, 24])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert cut.cut(cut.blocks[1], model.config, stream, None) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    config = cut.cut(cut.blocks[0], model.config, stream, None)
    assert config is not None
    assert config.intermediate_size == 40
    writer = cut.blocks[0].linears[cut.parts[0].writer].module
    assert writer.weight.shape[1] == writer.in_features == 40  # type: ignore[union-attr]
    name = next(name for name in before if name.endswith(f"0.{cut.parts[0].writer}.weight"))
    assert torch.equal(model.state_dict()[name.replace(".0.", ".1.")], before[name.replace(".0.", ".1.")])
    if family == "phi":
        assert not torch.equal(
            model.state_dict()[name.replace("weight", "bias")], before[name.replace("weight", "bias")]
        )


def test_what_is_recorded(batches: list[Tensor]) -> None:
    model, cut, stream = begun("llama", batches, [40, 48, 24])
    for block in cut.blocks:
        cut.cut(block, model.config, stream, None)
    assert cut.finish() == pytest.approx([1 / 6, 0, 1 / 2])
    (found,) = structure.structures(model)
    assert isinstance(found, MLPWidths)
    assert list(found.units) == [40, 48, 24]
    assert model.config.block_sizes == {"intermediate_size": [40, 48, 24]}
