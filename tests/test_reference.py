"""The weights that lit_prune removes, compared with the reference implementations in benchmarks/reference.py."""

import pytest
import torch

from benchmarks import reference
from lit_prune.allocate import DLP, Uniform
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude, MaskMethod, SparseGPT, Wanda
from lit_prune.recipe import Recipe
from tests.conftest import small_model


@pytest.mark.parametrize("sparsity", [0.5, 0.73])
@pytest.mark.parametrize("allocation", [Uniform(), DLP()], ids=str)
@pytest.mark.parametrize(
    "method", [Magnitude(), Wanda(propagate="pruned"), SparseGPT()], ids=lambda m: type(m).__name__
)
def test_same_masks_and_weights(
    method: MaskMethod, allocation: DLP | Uniform, sparsity: float, batches: list[torch.Tensor]
) -> None:
    ours, theirs = small_model(), small_model()
    prune(ours, batches, Recipe(method, sparsity, allocation))
    dlp = isinstance(allocation, DLP)
    reference.prune(theirs, [{"input_ids": rows} for rows in batches], type(method).__name__, sparsity, dlp=dlp)
    for mine, other in zip(find_blocks(ours), find_blocks(theirs), strict=True):
        for name, linear in mine.linears.items():
            assert torch.equal(linear.weight_OI == 0, other.linears[name].weight_OI == 0), name
            torch.testing.assert_close(linear.weight_OI, other.linears[name].weight_OI, rtol=1e-3, atol=1e-5)
