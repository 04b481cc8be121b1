"""Moves of budget, by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from lit_prune.search.space import Space


def space(sizes: Sequence[int], granularity: Sequence[int], step: float = 0.02, **fields: Any) -> Space:
    count = len(sizes)
    return Space([0.5] * count, sizes, granularity, [0.0] * count, [0.99] * count, step, **fields)


def test_rates_by_hand() -> None:
    assert space([100, 50], [1, 1]).rates((10, -10)) == pytest.approx([0.6, 0.3])


def test_a_move_takes_what_both_blocks_can_give() -> None:
    where = space([1000, 500, 600], [1, 1, 75])
    assert where.moved(where.origin, (0,), (1,)) == (-10, 10, 0)  # 0.02 of the smaller block, 500
    assert where.moved(where.origin, (0,), (1,), 0.5) == (-5, 5, 0)
    assert where.moved(where.origin, (0,), (2,)) == (-75, 0, 75)
    coarse = space([800, 800], [20, 30], step=0.2)
    assert coarse.moved(coarse.origin, (0,), (1,)) == (-180, 180)  # 3 times 60, near 160


def test_a_move_between_groups_is_spread_by_size() -> None:
    where = space([1000, 500, 600, 300], [1] * 4, step=0.1)
    assert where.moved(where.origin, (0, 1), (2, 3)) == (-60, -30, 60, 30)  # 0.1 of 900
    full = space([1000, 500, 600, 300], [1] * 4, step=0.1, balance=(-1.0, 1.0))
    assert full.moved((0, 0, 270, 0), (0, 1), (2, 3)) == (0, 0, 270, 0)  # the sum would leave its bounds


def test_what_one_block_cannot_take_goes_to_the_next() -> None:
    where = space([100, 100, 100, 100], [1] * 4, step=0.2)
    assert where.moved((-47, 0, 0, 47), (1, 2), (3, 0)) == (-9, -20, -20, 49)  # of 20 and 20 only 2 and 38


def test_a_move_between_parts_with_units_of_different_sizes() -> None:
    """A group of 80 goes for 3 channels of 30, the next for 2, as the first gave 10 too much; then again for 3."""
    where = space([900, 800, 800], [30, 80, 80], balance=(-15.0, 15.0))
    once = where.moved(where.origin, (1,), (0,))
    assert once == (90, -80, 0)
    assert where.moved(once, (2,), (0,)) == (150, -80, -80)
    assert where.moved((150, -80, -80), (0,), (1,)) == (90, 0, -80)  # 60 come back for 80, as 10 were missing
    assert where.moved(once, (1,), (2,)) == (90, -160, 80)  # units of one size keep the sum
    assert not where.allows((30, -80, 0))
    assert not where.allows((30, 0, 0))


def test_a_start_off_budget() -> None:
    """0.5 of 900 and 800 in units of 60 and 80 is 850; at [600, 400] 150 too much are gone, 2.5 units of 60."""
    where = replace(space([900, 800], [60, 80]), start=[2 / 3, 0.5]).on_budget(0.5, 30.0)
    assert where.start == pytest.approx([480 / 900, 0.5])
    assert where.balance == pytest.approx((-60.0, 0.0))
    assert where.allows(where.origin)
    assert not where.allows((60, 0))
    exact = space([900, 800], [60, 80]).on_budget(0.5, 30.0)
    assert (list(exact.start), exact.balance) == ([0.5, 0.5], (-30.0, 30.0))


def test_bounds() -> None:
    where = space([100, 100], [1, 1], step=0.6)
    assert where.moved(where.origin, (0,), (1,)) == (-49, 49)  # 50 can be taken, 49 given
    assert not where.allows((60, -60))
