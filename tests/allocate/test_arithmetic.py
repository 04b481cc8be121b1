"""Arithmetic by hand, and the choice of its difference by trials."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_prune.allocate import Arithmetic, Search
from lit_prune.allocate.arithmetic import largest_difference, progression, rounded
from lit_prune.allocate.base import Refined, weighted_mean
from lit_prune.allocate.budget import Limits
from lit_prune.errors import InputError
from lit_prune.pipeline import prune, score
from lit_prune.pruning import Magnitude, MixedNofM, SparseGPT, Wanda
from lit_prune.recipe import Recipe
from tests.allocate.blocks import rates
from tests.conftest import lively_model, small_model
from tests.search.bowl import opened

LIMITS = Limits([1000] * 5, [0.0] * 5, 0.99, 0.4)
KEY = {"weights": "a" * 64}


class Slope:
    """A trial without a model: the loss is least where the last rate exceeds the first by 0.4."""

    granularity = (1,) * 5
    tokens = (10, 20, 30)

    def __init__(self, stop: int | None = None) -> None:
        self.seen: list[tuple[list[float], int]] = []
        self.stop = stop

    def loss(self, rates: Sequence[float], window: int) -> float:
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen.append((list(rates), window))
        return (1 + window) * (rates[-1] - rates[0] - 0.4) ** 2


def refine(trial: Slope, key: dict[str, Any] = KEY, **settings: Any) -> Refined:
    return Arithmetic(**settings).refine([0.4] * 5, LIMITS, trials=opened(trial), key=key)


def test_by_hand() -> None:
    assert rates(Arithmetic(0.1), [1.0] * 3, 0.5) == pytest.approx([0.4, 0.5, 0.6])
    assert rates(Arithmetic(0.1), [1.0] * 4, 0.5) == pytest.approx([0.35, 0.45, 0.55, 0.65])
    assert largest_difference(0.6, 3) == pytest.approx(0.4)  # 0.2, 0.6, 1
    assert largest_difference(0.3, 3) == pytest.approx(0.3)  # 0, 0.3, 0.6
    assert largest_difference(0.3, 1) == 0


def test_rounded_by_hand() -> None:
    assert rounded([0.24, 0.56], [10, 10], [2, 2]) == [0.2, 0.6]
    assert rounded([0.24, 0.56], [100, 100], [1, 1]) == [0.24, 0.56]
    assert rounded([0.95, 0.05], [8, 8], [1, 1]) == [7 / 8, 1 / 8]  # nothing is rounded up to losing all


def test_the_mean_is_met_though_the_last_rates_are_bounded() -> None:
    limits = Limits([1000, 2000, 1000], [0.0, 0.0, 0.0], 0.8, 0.6)
    found = progression(0.4, limits, [1, 1, 1])
    assert found[2] == 0.8
    assert found[1] - found[0] == pytest.approx(0.4, abs=1e-3)
    assert weighted_mean(found, limits.sizes) == pytest.approx(0.6, abs=2e-4)


def test_the_difference_with_the_least_loss_is_chosen() -> None:
    trial = Slope()
    found = refine(trial)  # differences 0, 0.025, ... 0.2
    assert found.rates == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    assert len(trial.seen) == found.details["evaluations"] == 18
    assert found.details["windows"] == 2
    assert found.details["loss_end"] == pytest.approx(0, abs=1e-12)
    windows = [window for rates, window in trial.seen if rates == [0.4] * 5]
    losses, tokens = [(1 + window) * 0.16 for window in windows], [Slope.tokens[window] for window in windows]
    assert found.details["loss_start"] == pytest.approx(weighted_mean(losses, tokens))


def test_an_interrupted_choice_goes_on(tmp_path: Path) -> None:
    state, last = str(tmp_path / "state.json"), Slope()
    with pytest.raises(KeyboardInterrupt):
        refine(Slope(7), state=state)
    assert refine(last, state=state) == refine(Slope())
    assert len(last.seen) == 11
    with pytest.raises(InputError, match="`Arithmetic.state` must be of the same search, .* other weights"):
        refine(Slope(), {"weights": "b" * 64}, state=state)
    with pytest.raises(InputError, match="`Arithmetic.state` must be of the same search, .* `trials` 9, now 5"):
        Arithmetic(trials=5, state=state).check(LIMITS.sizes, 0.4, LIMITS.lower, 0.99)


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT(), Wanda(MixedNofM(8))], ids=str)
def test_a_model(method: Magnitude | Wanda | SparseGPT, batches: list[torch.Tensor]) -> None:
    model = lively_model("llama")
    pruned = prune(model, batches, Recipe(method, 0.5, Arithmetic(trials=3)))
    assert pruned.rates == sorted(pruned.rates)
    assert pruned.sparsity == pytest.approx(0.5, abs=1e-3 if method.pattern == Magnitude().pattern else 1 / 48)
    assert pruned.search["loss_end"] <= pruned.search["loss_start"]
    assert pruned.achieved == pytest.approx(pruned.rates, abs=1e-3)


def test_a_loss_that_is_never_finite() -> None:
    trial = Slope()
    trial.loss = lambda rates, window: float("inf")  # type: ignore[method-assign]
    with pytest.raises(InputError, match="the loss under all rates that Arithmetic tried is NaN or infinity"):
        refine(trial)


def test_with_a_difference_nothing_is_tried(batches: list[torch.Tensor]) -> None:
    assert not Arithmetic(0.1).searches
    assert Arithmetic(0.0).is_uniform()
    assert score(small_model(), batches, Recipe(Wanda(), 0.5, Arithmetic(0.1))).search == {}
    Search(Arithmetic(0.1))
    with pytest.raises(InputError, match="`Search.start` must be an allocation that does not search itself"):
        Search(Arithmetic())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"difference": -0.1}, "difference` must be at least 0, or null, got -0.1"),
        ({"trials": 1}, "trials` must be at least 2, got 1"),
        ({"windows": 0}, "windows` must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"`Arithmetic.{message}"):
        Arithmetic(**settings)


def test_a_difference_that_is_too_large() -> None:
    with pytest.raises(InputError, match="`Arithmetic.difference` must be at most 0.3 for 3 blocks at a mean of 0.7"):
        Arithmetic(0.31).check([1, 1, 1], 0.7, [0, 0, 0], 0.99)
