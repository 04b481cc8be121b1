"""Exchanges of budget, by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from lit_prune.search.space import Point, Space


def space(sizes: Sequence[int], granularity: Sequence[int], **fields: Any) -> Space:
    count = len(sizes)
    return Space([0.5] * count, sizes, granularity, [0.0] * count, [0.99] * count, **fields)


def moved(where: Space, point: Point, wanted: dict[int, float]) -> Point:
    """Moved with no bounds but those of the space."""
    return where.moved(point, wanted, {block: _signed(where.room(point, block)) for block in wanted})


def _signed(room: tuple[int, int]) -> tuple[float, float]:
    return -room[0], room[1]


def test_rates_by_hand() -> None:
    assert space([100, 50], [1, 1]).rates((10, -10)) == pytest.approx([0.6, 0.3])


def test_what_has_nothing_left_to_give_is_at_its_bound() -> None:
    for start in (0.3, 1 / 3, 1 - 2 / 3):  # 0.3 - 0.2 - 0.1 is -2.8e-17, and 1 - 2 / 3 - 1 / 3 is 5.6e-17
        where = replace(space([30, 30], [1, 1]), start=[start, 0.99 - start])
        part = round(30 * start)
        half = replace(where, start=where.rates((-6, 6)))
        assert half.rates((6 - part, part - 6)) == where.rates((-part, part)) == [0.0, 0.99]


def test_the_nearest_change() -> None:
    where = space([100, 1000], [1, 30])
    assert where.nearest(where.origin, 0, 12.4) == 12
    assert where.nearest(where.origin, 0, -12.6) == -13
    assert where.nearest(where.origin, 0, 60) == 49  # 0.99 is the upper bound
    assert where.nearest(where.origin, 1, 7) == 30  # at least one unit
    assert where.nearest((0, 480), 1, 7) == 0  # where there is room for one
    assert where.room((-47, 0), 0) == (3, 96)


def test_changes_are_rounded_and_keep_the_sum() -> None:
    where = space([1000, 500, 600], [1, 1, 1])
    assert moved(where, where.origin, {0: 10.5, 1: -4.3, 2: -6.2}) == (10, -4, -6)
    assert moved(where, (5, -5, 0), {0: 1.0, 2: -1.0}) == (6, -5, -1)
    coarse = space([600, 600, 600], [30, 30, 30])
    assert moved(coarse, coarse.origin, {0: 50.0, 1: -10.0, 2: -40.0}) == (60, 0, -60)
    assert moved(where, where.origin, {}) == where.origin


def test_changes_keep_their_bounds() -> None:
    where = space([600] * 3, [30] * 3)
    bounds = {0: (-45.0, 45.0), 1: (-90.0, 0.0), 2: (0.0, 90.0)}
    assert where.moved(where.origin, {0: -45.0, 1: -45.0, 2: 90.0}, bounds) == (-30, -60, 90)
    assert where.moved(where.origin, {0: 45.0, 1: -45.0, 2: 0.0}, bounds) == (30, -30, 0)
    none = {0: (0.0, 0.0), 1: (-20.0, 20.0)}
    assert where.moved(where.origin, {0: 0.0, 1: 20.0}, none) == where.origin


def test_what_the_bounds_do_not_allow_another_block_takes() -> None:
    where = space([100, 100, 100], [1] * 3)
    assert moved(where, (49, -49, 0), {0: 0.9, 1: 0.2, 2: -1.1}) == (49, -48, -1)
    assert moved(where, (49, -49, 0), {0: 1.0, 1: -1.0}) == (49, -49, 0)  # nobody does


def test_coarse_units_first_and_fine_ones_make_up_for_them() -> None:
    """A group of 80 goes for 3 channels of 30, the next for 2, as the first gave 10 too much; then again for 3."""
    where = space([900, 800, 800], [30, 80, 80], balance=(-15.0, 15.0))
    assert where.exchangeable([0, 1, 2]) == [(0, 1, 2)]
    once = moved(where, where.origin, {0: 70.0, 1: -70.0})
    assert once == (90, -80, 0)
    assert moved(where, once, {0: 80.0, 2: -80.0}) == (150, -80, -80)
    assert moved(where, (150, -80, -80), {0: -70.0, 1: 70.0}) == (90, 0, -80)  # 60 come back for 80
    assert moved(where, once, {1: -70.0, 2: 70.0}) == (90, -160, 80)  # units of one size keep the sum
    assert not where.allows((30, -80, 0))
    assert not where.allows((30, 0, 0))


def test_units_that_do_not_fit_are_exchanged_among_themselves() -> None:
    assert space([800] * 3, [20, 30, 20]).exchangeable([0, 1, 2]) == [(0, 2), (1,)]
    assert space([800] * 3, [20, 60, 20]).exchangeable([0, 1, 2]) == [(0, 1, 2)]
    assert space([800] * 3, [20, 60, 50]).exchangeable([1, 2]) == [(2,), (1,)]  # nobody makes up for both
    where = space([800] * 2, [20, 60])
    assert moved(where, where.origin, {0: 50.0, 1: -50.0}) == (60, -60)
    apart = space([800] * 2, [20, 30])
    assert moved(apart, apart.origin, {0: 33.0, 1: -33.0}) == apart.origin  # 30 are no multiple of 20


def test_whether_anything_can_move() -> None:
    where = space([100, 100], [1, 60])
    assert not where.movable(where.origin)  # no unit of 60 in 49
    assert space([100, 100], [1, 40]).movable(where.origin)
    assert not space([100], [1]).movable((0,))


def test_a_start_off_budget() -> None:
    """0.5 of 900 and 800 in units of 60 and 80 is 850; at [600, 400] 150 too much are gone, 2.5 units of 60."""
    where = replace(space([900, 800], [60, 80]), start=[2 / 3, 0.5]).on_budget(0.5, 30.0)
    assert where.start == pytest.approx([480 / 900, 0.5])
    assert where.balance == pytest.approx((-60.0, 0.0))
    assert where.allows(where.origin)
    assert not where.allows((60, 0))
    exact = space([900, 800], [60, 80]).on_budget(0.5, 30.0)
    assert (list(exact.start), exact.balance) == ([0.5, 0.5], (-30.0, 30.0))
