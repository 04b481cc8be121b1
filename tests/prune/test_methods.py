"""The hand-worked cases, and what every method must do; a new one is tested without being named."""

import inspect

import pytest
import torch

from lit_prune.calibration.statistics import InputStatistics
from lit_prune.prune import Magnitude, MaskMethod, Wanda

WEIGHT = torch.tensor([[1.0, -2.0, 3.0], [4.0, -5.0, 6.0]])


def leaves(kind: type[MaskMethod]) -> list[type[MaskMethod]]:
    below = [leaf for child in kind.__subclasses__() for leaf in leaves(child)]
    return below + ([kind] if kind.__module__.startswith("lit_prune.") and not inspect.isabstract(kind) else [])


def prune(method: MaskMethod, weight_OI: torch.Tensor, seen: InputStatistics, rate: float) -> torch.Tensor:
    return method.prune([weight_OI], seen, rate)[0]


def seen_by(x_PI: torch.Tensor) -> InputStatistics:
    return InputStatistics(x_PI.square().mean(0).sqrt(), x_PI.T @ x_PI / len(x_PI))


def test_magnitude_by_hand() -> None:
    assert prune(Magnitude(), WEIGHT, InputStatistics(), 0.5).tolist() == [[0, 0, 0], [4, -5, 6]]


def test_wanda_by_hand() -> None:
    # scores |W| * norm = [[9, 2, 3], [36, 5, 6]]; one a row goes (2 and 5), then 3, which is below 6
    pruned = prune(Wanda(), WEIGHT, InputStatistics(torch.tensor([9.0, 1.0, 1.0])), 0.5)
    assert pruned.tolist() == [[1, 0, 0], [4, 0, 6]]


def test_wanda_looks_at_activations_and_magnitude_does_not() -> None:
    seen = InputStatistics(torch.tensor([0.01, 1.0, 1.0]))
    assert prune(Wanda(), WEIGHT, seen, 1 / 3)[1, 0] == 0
    assert prune(Magnitude(), WEIGHT, seen, 1 / 3)[1, 0] == 4


def test_wanda_of_an_input_that_was_never_seen_goes_by_the_weights() -> None:
    assert prune(Wanda(), WEIGHT.flip(1), InputStatistics(torch.zeros(3)), 1 / 3).tolist() == [[3, -2, 0], [6, -5, 0]]


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
