"""A cut meets its target, whatever the linears of a block have lost before."""

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, Allocation, Uniform
from lit_prune.models.families import Block, find_blocks
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude, MaskMethod, SparseGPT, Wanda
from lit_prune.recipe import Recipe

MLP = ["gate_proj", "up_proj", "down_proj"]


def shares(block: Block) -> dict[str, float]:
    return {name.rsplit(".", 1)[-1]: linear.pruned / linear.size for name, linear in block.linears.items()}


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()], ids=str)
@pytest.mark.parametrize("allocation", [Uniform(), DLP()], ids=str)
def test_linears_that_were_pruned_further_before_leave_less_to_the_others(
    model: PreTrainedModel, batches: list[torch.Tensor], method: MaskMethod, allocation: Allocation
) -> None:
    prune(model, batches, Recipe(Magnitude(), 0.7, Uniform(), targets=MLP))
    pruned = prune(model, batches, Recipe(method, 0.6, allocation))
    assert pruned.sparsity == pytest.approx(0.6, abs=1e-3)
    assert pruned.achieved == pytest.approx(pruned.rates, abs=1e-3)
    for block in find_blocks(model):
        rates = shares(block)
        assert all(rates[name] >= 0.7 - 1e-3 for name in MLP)
        others = [rate for name, rate in rates.items() if name not in MLP]
        assert max(others) - min(others) < 2e-3  # they share evenly what is missing


def test_by_hand(model: PreTrainedModel) -> None:
    """MLPs are 3 * 32 * 48 = 4608 of 7680 weights of a block: 0.6 of these is 0.7 * 4608 + 0.45 * 3072."""
    prune(model, [], Recipe(Magnitude(), 0.7, Uniform(), targets=MLP))
    prune(model, [], Recipe(Magnitude(), 0.6, Uniform()))
    rates = shares(find_blocks(model)[0])
    assert rates["up_proj"] == pytest.approx(0.7, abs=1e-3)
    assert rates["q_proj"] == pytest.approx(0.45, abs=1e-3)
