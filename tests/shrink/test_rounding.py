"""Numbers of units from rates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_prune.shrink.rounding import rates_from_units, units_from_rates


def test_by_hand() -> None:
    assert units_from_rates([0.3, 0.4], [32, 32], 8) == [24, 16]
    assert units_from_rates([0.25, 0.25], [48, 48], 8) == [32, 32]  # 36 is as near to 40
    assert units_from_rates([0.25, 0.25], [48, 48], 1) == [36, 36]
    assert rates_from_units([24, 32], [32, 32]) == [0.25, 0]


def test_equal_rates_give_equal_numbers() -> None:
    assert units_from_rates([0.3] * 4, [32] * 4, 8) == [24] * 4
    assert units_from_rates([0.45] * 4, [32] * 4, 8) == [16] * 4


def test_a_block_that_loses_nothing_keeps_all_even_if_that_is_no_multiple() -> None:
    assert units_from_rates([0.0, 0.5], [50, 50], 32) == [50, 32]
    assert units_from_rates([0.0, 0.0], [50, 50], 32) == [50, 50]


def test_at_least_one_multiple_stays() -> None:
    assert units_from_rates([0.99, 0.0], [64, 64], 16)[0] == 16
    assert units_from_rates([0.9, 0.9], [20, 20], 32) == [20, 20]


@given(
    st.lists(st.floats(0.0, 0.8), min_size=2, max_size=8),
    st.sampled_from([1, 8, 32]),
)
def test_the_mean_is_met_to_half_a_multiple(rates: list[float], multiple: int) -> None:
    full = [256] * len(rates)
    units = units_from_rates(rates, full, multiple)
    assert all(number % multiple == 0 and multiple <= number <= 256 for number in units)
    exact = sum((1 - rate) * 256 for rate in rates)
    blocks = len(rates) if len({round(rate, 9) for rate in rates}) == 1 else 1
    assert abs(sum(units) - exact) <= multiple / 2 * blocks + 1e-6
    assert units_from_rates(rates_from_units(units, full), full, multiple) == units


@pytest.mark.parametrize("multiple", [4, 8])
def test_no_block_gets_more_than_it_had(multiple: int) -> None:
    units = [40, 24, 48, 16]
    assert units_from_rates(rates_from_units(units, [48] * 4), [48] * 4, multiple) == units
