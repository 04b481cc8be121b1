"""Contract of every method; a new one is tested without being named."""

import inspect

import pytest
import torch

from lit_prune.calibration.statistics import InputStatistics
from lit_prune.pruning import MaskMethod


def leaves(kind: type[MaskMethod]) -> list[type[MaskMethod]]:
    below = [leaf for child in kind.__subclasses__() for leaf in leaves(child)]
    return below + ([kind] if kind.__module__.startswith("lit_prune.") and not inspect.isabstract(kind) else [])


def prune(method: MaskMethod, weight_OI: torch.Tensor, seen: InputStatistics, rate: float) -> torch.Tensor:
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
        torch.testing.assert_close(one, prune(leaf(), alone, seen, rate))
    again = leaf().prune(pruned, seen, min(rate + 0.3, 1))
    for one, other in zip(pruned, again, strict=True):
        assert (other[one == 0] == 0).all()
        assert (other == 0).sum() == round(one.numel() * min(rate + 0.3, 1))
