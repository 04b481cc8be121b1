"""Units that are zero instead of removed."""

import torch

from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.models.families import find_blocks
from lit_prune.shrink.trial import ZeroedUnits
from lit_prune.shrink.units.obs import drop_units
from lit_prune.shrink.units.parts import mlp_of
from tests.conftest import small_model


def test_the_columns_of_removed_units_are_zero() -> None:
    """Without compensation, the first 36 of 48 channels stay if the inputs of the last 12 are always 0."""
    model = small_model()
    blocks = find_blocks(model)
    parts = [mlp_of(block.linears, model.config) for block in blocks]
    zeroed = ZeroedUnits(
        blocks,
        parts,
        [48] * 3,
        multiple=4,
        remove=lambda weight_IO, gram_II, part, kept: drop_units(
            weight_IO.float(), gram_II, part.columns_UK, part.units - kept
        ),
    )
    gram_II = torch.diag((torch.arange(48) < 36).float())
    (writer,) = zeroed.blocks[1].linears
    assert writer == "mlp.down_proj"
    assert zeroed.split(1, 0.25) == {writer: 0.25}
    before_OI = blocks[1].linears[writer].weight_OI.clone()
    statistics = BlockStatistics(grams={writer: gram_II})
    weight_OI = zeroed.weights(zeroed.blocks[1], statistics, {writer: 0.25})[writer]
    assert torch.equal(weight_OI[:, :36], before_OI[:, :36])
    assert not weight_OI[:, 36:].any()
    assert torch.equal(blocks[1].linears[writer].weight_OI, before_OI)
