"""Contract of every allocation, and the budget; a new one is tested without being named."""

import math
import random

import pytest
import torch

from lit_prune.allocate import DLP, Allocation, LayerRedundancy, Plan, Uniform, allocate
from lit_prune.allocate.base import mean_rate, weighted_mean
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.errors import InputError
from tests.allocate.blocks import rates

LEAVES = [leaf for leaf in Allocation.__subclasses__() if leaf.__module__.startswith("lit_prune.") and leaf is not Plan]


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("seed", range(20))
def test_contract(leaf: type[Allocation], seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 12)
    scores = [draw.uniform(0.01, 1) ** draw.choice([1, 5]) for _ in range(count)]
    sizes = [draw.randint(1, 1000) for _ in range(count)]
    least, most = draw.uniform(0, 0.2), draw.uniform(0.9, 0.99)
    for sparsity in (least + 0.01, 0.5, 0.7, 0.89):
        found = allocate(leaf(), scores, sparsity, sizes=sizes, min_rate=least, max_rate=most)
        assert weighted_mean(found, sizes) == pytest.approx(sparsity, abs=1e-6)
        assert all(least - 1e-9 <= rate <= most + 1e-9 for rate in found)
        assert found == allocate(leaf(), scores, sparsity, sizes=sizes, min_rate=least, max_rate=most)


@pytest.mark.parametrize("leaf", LEAVES)
def test_equal_scores_and_a_single_block_give_the_uniform_rate(leaf: type[Allocation]) -> None:
    assert rates(leaf(), [0.4] * 5, 0.3) == pytest.approx([0.3] * 5)
    assert rates(leaf(), [0.4], 0.3) == pytest.approx([0.3])


def test_a_later_cut_never_gives_back() -> None:
    found = rates(DLP(), [1, 2, 5], 0.6, present=[0.7, 0.2, 0.2])
    assert found[0] >= 0.7
    assert weighted_mean(found, [1] * 3) == pytest.approx(0.6, abs=1e-6)


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(InputError, match=r"`pruning.sparsity` must be between 0 and 0.4.*got 0.5"):
        rates(Uniform(), [1, 1], 0.5, max_rate=0.4)
    with pytest.raises(InputError, match=r"between 0.6 and 0.99"):
        rates(Uniform(), [1, 1], 0.5, present=[0.9, 0.3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DLP(alpha=0.6), r"`DLP.alpha` must be in \[0, 0.5\], got 0.6"),
        (lambda: LayerRedundancy(base=1.0), r"`LayerRedundancy.base` must be in \[0, 1\) or null, got 1.0"),
    ],
)
def test_settings_out_of_range(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_score_is_one_finite_number_and_touches_nothing(leaf: type[Allocation], share: float) -> None:
    random = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(12, 16, generator=random, dtype=torch.bfloat16) for name in ("a", "b")}
    for weight in weights.values():
        weight[torch.rand(12, 16, generator=random) < share] = 0
    before = {name: weight.clone() for name, weight in weights.items()}
    observed = BlockStatistics({name: torch.rand(16, generator=random) for name in weights}, cosine=0.9)
    found = leaf().score(weights, observed)
    assert isinstance(found, float)
    assert math.isfinite(found)
    assert found == leaf().score(weights, observed)
    assert all(torch.equal(before[name], weight) for name, weight in weights.items())


def test_the_mean_rate_of_linears_by_hand() -> None:
    assert mean_rate({"a": 0.5, "b": 0.2}, {"b": 20, "a": 10}) == pytest.approx(0.3)
