"""Whatever the scores, sizes and bounds: rates keep to the bounds and to the budget, or an error says what they can."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_prune.allocate import Allocation, Plan, allocate
from lit_prune.allocate.base import meet_budget, weighted_mean
from lit_prune.errors import InputError

LEAVES = [leaf for leaf in Allocation.__subclasses__() if leaf.__module__.startswith("lit_prune.") and leaf is not Plan]
shares = st.floats(0, 1)


@dataclass(frozen=True)
class Case:
    scores: list[float]
    sizes: list[int]
    present: list[float]
    sparsity: float
    min_rate: float
    max_rate: float


@st.composite
def cases(draw: st.DrawFn) -> Case:
    blocks = draw(st.integers(1, 12))
    each = {"min_size": blocks, "max_size": blocks}
    return Case(
        scores=draw(st.lists(st.floats(1e-3, 1e3), **each)),
        sizes=draw(st.lists(st.integers(1, 10**9), **each)),
        present=draw(st.one_of(st.just([0.0] * blocks), st.lists(shares, **each))),
        sparsity=draw(st.floats(0, 0.99)),
        min_rate=draw(st.sampled_from([0.0, 0.1, 0.5])),
        max_rate=draw(st.sampled_from([0.99, 0.9, 0.6])),
    )


@pytest.mark.parametrize("leaf", LEAVES)
@given(case=cases())
def test_rates_keep_to_bounds_and_budget(leaf: type[Allocation], case: Case) -> None:
    allocation = leaf()
    floor = max(case.min_rate, allocation.floor(case.sparsity))
    lower = [max(floor, zero) for zero in case.present]
    upper = [max(case.max_rate, low) for low in lower]
    least, most = weighted_mean(lower, case.sizes), weighted_mean(upper, case.sizes)

    def rates() -> list[float]:
        return allocate(
            allocation,
            case.scores,
            case.sparsity,
            sizes=case.sizes,
            present=case.present,
            min_rate=case.min_rate,
            max_rate=case.max_rate,
        )

    if not least - 1e-6 <= case.sparsity <= most + 1e-6:
        with pytest.raises(InputError, match="`pruning.sparsity` must be between"):
            rates()
        return
    found = rates()
    assert weighted_mean(found, case.sizes) == pytest.approx(case.sparsity, abs=2e-6)
    assert all(low <= rate <= up for low, rate, up in zip(lower, found, upper, strict=True))


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.9, 0.98, 0.99])
def test_the_defaults_hold_at_any_sparsity(leaf: type[Allocation], sparsity: float) -> None:
    found = allocate(leaf(), [1, 2, 5, 9], sparsity, sizes=[3, 1, 2, 5])
    assert weighted_mean(found, [3, 1, 2, 5]) == pytest.approx(sparsity, abs=1e-6)
    assert all(0 <= rate <= 0.99 for rate in found)


def test_the_budget_by_hand() -> None:
    added = meet_budget(lambda by: [0.2 + by, 1.2 + by], 0.7, sizes=[1, 1], lower=[0, 0], upper=0.9)
    assert added == pytest.approx([0.5, 0.9])
    scaled = meet_budget(lambda by: [0.2 * (1 + by), 1.2 * (1 + by)], 0.5, sizes=[1, 1], lower=[0, 0], upper=0.9)
    assert scaled == pytest.approx([0.2 * 5 / 7, 1.2 * 5 / 7])  # a factor of 5/7


def test_the_budget_of_a_factor_far_away() -> None:
    found = meet_budget(lambda by: [1e-6 * max(1 + by, 0)] * 2, 0.5, sizes=[1, 1], lower=[0, 0], upper=0.9)
    assert found == pytest.approx([0.5, 0.5])
