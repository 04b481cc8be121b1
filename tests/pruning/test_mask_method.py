"""The contract of every mask method, and cuts that meet their target whatever the linears have lost before.

A new method is tested without being named.
"""

import inspect

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, Allocation, Uniform
from lit_prune.calibration.statistics import InputStatistics
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


def leaves(kind: type[MaskMethod]) -> list[type[MaskMethod]]:
    below = [leaf for child in kind.__subclasses__() for leaf in leaves(child)]
    return below + ([kind] if kind.__module__.startswith("lit_prune.") and not inspect.isabstract(kind) else [])


def pruned_by(method: MaskMethod, weight_OI: torch.Tensor, seen: InputStatistics, rate: float) -> torch.Tensor:
    return method.prune([weight_OI], seen, rate)[0]


def seen_by(x_PI: torch.Tensor) -> InputStatistics:
    return InputStatistics(x_PI.square().mean(0).sqrt(), x_PI.T @ x_PI / len(x_PI))


@pytest.mark.parametrize("leaf", leaves(MaskMethod))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.37, 0.5, 0.99])
def test_contract(leaf: type[MaskMethod], dtype: torch.dtype, rate: float) -> None:
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 21, generator=random).to(dtype) for rows in (13, 6)]
    seen = seen_by(torch.randn(40, 21, generator=random))
    before = [weight_OI.clone() for weight_OI in weights]
    pruned = leaf().prune(weights, seen, rate)
    assert all(torch.equal(now, then) for now, then in zip(weights, before, strict=True))
    for one, other, alone in zip(pruned, leaf().prune(weights, seen, rate), weights, strict=True):
        assert one.shape == alone.shape
        assert one.dtype == dtype
        assert one.isfinite().all()
        assert (one == 0).sum() == round(one.numel() * rate)
        assert torch.equal(one, other)
        torch.testing.assert_close(one, pruned_by(leaf(), alone, seen, rate))
    again = leaf().prune(pruned, seen, min(rate + 0.3, 1))
    for one, other in zip(pruned, again, strict=True):
        assert (other[one == 0] == 0).all()
        assert (other == 0).sum() == round(one.numel() * min(rate + 0.3, 1))
