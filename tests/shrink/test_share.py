"""The rates of several parts, by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from lit_prune.shrink.share import PartRates, split, split_first
from lit_prune.shrink.units.sizes import rates_from_units, units_from_rates, units_left


def part(units: int, removable: int, multiple: int = 1, given: Sequence[int] | None = None, **fields: Any) -> PartRates:
    def rounded(rates: Sequence[float], sizes: Sequence[int], current: Sequence[float]) -> list[float]:
        return rates_from_units(units_from_rates(rates, sizes, multiple, units_left(current, sizes)), sizes)

    settings: dict[str, Any] = {
        "removable": given or [removable] * 2,
        "current": [0.0] * 2,
        "most": 1 - multiple / units,
        "weight": 1.0,
        "step": multiple / 2 / units,
        "sizes": [units] * 2,
        "rounded": rounded,
    }
    return PartRates(**settings | fields)


def test_all_parts_lose_the_same_share() -> None:
    assert split([0.5, 0.25], [part(100, 300), part(100, 100)]) == [[0.5, 0.25], [0.5, 0.25]]


def test_weights() -> None:
    """Twice the rate in a part with 100 of 400 parameters: (2 * 100 + 300) t = 0.25 * 400, t = 0.2."""
    first, second = split([0.25, 0.25], [part(100, 300), part(100, 100, weight=2.0)])
    assert (first, second) == (pytest.approx([0.2, 0.2]), pytest.approx([0.4, 0.4]))


def test_a_fine_part_makes_up_for_the_rounding_of_a_coarse_one() -> None:
    """0.4 of 3 groups is one, 33.3 of 100 parameters instead of 40: 6.7 more of 300 are 0.0222 of the channels."""
    groups, channels = split([0.4, 0.4], [part(3, 100), part(900, 300)])
    assert groups == pytest.approx([1 / 3, 1 / 3])
    assert channels == pytest.approx([0.4 + 1 / 45, 0.4 + 1 / 45], abs=1e-3)


def test_a_part_that_has_lost_all_that_it_can_leaves_the_rest_to_the_others() -> None:
    """One of two groups is the most, 50 of 100; of 0.7 * 400 = 280, 230 of 300 are left to the channels."""
    groups, channels = split([0.7, 0.7], [part(2, 100), part(900, 300)])
    assert groups == [0.5, 0.5]
    assert channels == pytest.approx([230 / 300] * 2, abs=1e-3)


def test_what_is_gone_counts() -> None:
    """The channels have lost 0.6, 180 of 300; of 0.5 * 400 = 200, 20 of 100 are left to the groups."""
    groups, channels = split([0.5, 0.5], [part(10, 100), part(100, 300, current=[0.6, 0.6])])
    assert groups == pytest.approx([0.2, 0.2])
    assert channels == [0.6, 0.6]


def test_one_part_first() -> None:
    """0.3 * 400 = 120: the channels, 300, can lose that; of the groups, 100, two of three go at most."""
    parts = [part(3, 100), part(300, 300)]
    assert split_first(1, [0.3, 0.3], parts) == [[0.0] * 2, pytest.approx([0.4] * 2)]
    groups, channels = split_first(0, [0.3, 0.3], parts) or ([], [])
    assert groups == pytest.approx([2 / 3] * 2)
    assert channels == pytest.approx([(120 - 200 / 3) / 300] * 2, abs=2e-3)


def test_a_part_that_is_first_is_rounded_down() -> None:
    """0.145 * 400 = 58 are 1.74 of 3 groups: two would be more than what is to go."""
    groups, channels = split_first(0, [0.145] * 2, [part(3, 100), part(300, 300)]) or ([], [])
    assert groups == pytest.approx([1 / 3] * 2)
    assert channels == pytest.approx([(58 - 100 / 3) / 300] * 2, abs=2e-3)
    assert (split_first(0, [0.125] * 2, [part(4, 100), part(30, 300)]) or [[]])[0] == [0.5] * 2


def test_a_part_that_is_first_is_rounded_down_block_by_block() -> None:
    """Of 16 units in three blocks: 0.1 is 1.6 units of 4 in the first part, which is 400 of 1600 parameters."""
    coarse, fine = part(4, 400, given=[400] * 3), part(1200, 1200, given=[1200] * 3)
    blocks = {"current": [0.0] * 3}
    three = [replace(coarse, sizes=[4] * 3, **blocks), replace(fine, sizes=[1200] * 3, **blocks)]
    units = split_first(0, [0.0625, 0.1, 0.1875], three)
    assert units is not None
    assert units[0] == [0.25, 0.25, 0.75]
    assert units[1][0] == pytest.approx(0.0, abs=0.03)


def test_parts_with_equal_steps() -> None:
    """One of four units of either is 100 parameters; 0.3 of 800 are 240, so that two units of the first go."""
    parts = [part(4, 400), part(4, 400)]
    for first in (0, 1):
        found = split_first(first, [0.3] * 2, parts)
        assert found is not None
        assert (found[first], found[1 - first]) == ([0.5] * 2, [0.0] * 2)


def test_bounds_hold_for_the_part_that_is_first_and_for_the_others() -> None:
    parts = [part(100, 100), part(300, 300)]
    groups, channels = split_first(1, [0.3] * 2, [own.within(0.1, 0.99) for own in parts]) or ([], [])
    assert (groups, channels) == (pytest.approx([0.1] * 2), pytest.approx([110 / 300] * 2, abs=4e-3))
    groups, channels = split_first(1, [0.3] * 2, [own.within(0.0, 0.35) for own in parts]) or ([], [])
    assert (groups, channels) == (pytest.approx([0.15] * 2), pytest.approx([0.35] * 2, abs=4e-3))


@pytest.mark.parametrize(("least", "most"), [(0.31, 0.99), (0.0, 0.29)])
def test_bounds_that_rates_are_beyond(least: float, most: float) -> None:
    parts = [part(100, 100).within(least, most), part(300, 300).within(least, most)]
    assert split_first(0, [0.3] * 2, parts) is None


def test_a_bound_between_the_steps_of_a_part() -> None:
    """Two of four groups are 50 of 100, and at most 180 of 300 channels: 230 of the 240 that 0.6 are."""
    parts = [part(4, 100).within(0.0, 0.6), part(300, 300).within(0.0, 0.6)]
    assert split_first(1, [0.6] * 2, parts) is None
    assert split_first(1, [0.57] * 2, parts) is not None


def test_a_block_without_any_part() -> None:
    parts = [part(10, 0, given=[100, 0]), part(10, 0, given=[100, 0])]
    assert split([0.5, 0.5], parts) == [pytest.approx([0.5, 0]), pytest.approx([0.5, 0])]
