"""Sweeps against losses whose optimum is known, and what they must keep to whatever the loss."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_prune.search.space import Point, Space
from lit_prune.search.sweeps import Curve, Loss, Sweeps, least_sum

BEST = [0.3, 0.7, 0.5, 0.6, 0.4, 0.5, 0.8, 0.2]


def space(start: Sequence[float] = (0.5,) * 8, **fields: Any) -> Space:
    count = len(start)
    given = {
        "sizes": [1000] * count,
        "granularity": [1] * count,
        "lower": [0.0] * count,
        "upper": [0.99] * count,
    }
    return Space(start, **(given | fields))


def bowl(where: Space, coupling: float = 0.0) -> Loss:
    """A loss that is least, 0, at BEST; each window has weights of its own, and neighbours may add to each other."""

    def loss(point: Point, windows: Sequence[int]) -> float:
        errors = [rate - best for rate, best in zip(where.rates(point), BEST, strict=False)]
        squares = [error**2 for error in errors]
        sums = [(error + other) ** 2 for error, other in pairwise(errors)]
        weights = [1 + 0.2 * math.sin(block + 3 * window) for window in windows for block in range(len(errors))]
        total = sum(weight * square for weight, square in zip(weights, squares * len(windows), strict=True))
        return total / len(windows) + coupling * sum(sums)

    return loss


def after(sweeps: int, where: Space, loss: Loss, most: int = 64, **settings: Any) -> Sweeps:
    found = Sweeps(where, **({"step": 0.1, "windows": 2, "available": 16, "loss": loss, "seed": 0} | settings))
    for _ in range(sweeps):
        assert found.sweep(most)
    return found


def test_curves_by_hand() -> None:
    """1 - 2 x + 3 x^2 at -2 and 1, without its constant; then with one side, with none, and with an infinite one."""
    curve = Curve.through(-2, 1, lambda x: -2 * x + 3 * x * x)
    assert (curve.slope, curve.curvature) == pytest.approx((-2, 6))
    assert Curve.through(0, 4, lambda x: 2.0) == Curve(0.5, 0.0, 0.0, 4)
    assert Curve.through(-4, 0, lambda x: 2.0) == Curve(-0.5, 0.0, -4, 0.0)
    assert Curve.through(0, 0, lambda x: 1.0) == Curve(0.0, 0.0, 0.0, 0.0)
    assert Curve.through(-2, 4, lambda x: math.inf if x > 0 else 1.0) == Curve(-0.5, 0.0, -2, 0.0)


def test_the_least_sum_by_hand() -> None:
    assert least_sum({4: Curve(0, 1, -9, 9), 7: Curve(2, 1, -9, 9)}) == pytest.approx({4: 1, 7: -1})
    assert least_sum({4: Curve(0, 1, -9, 9), 7: Curve(2, 1, -0.25, 9)}) == pytest.approx({4: 0.25, 7: -0.25})
    assert least_sum({4: Curve(0, 1, 0, 0), 7: Curve(2, 1, -9, 9)}) == pytest.approx({4: 0, 7: 0})
    steeper = least_sum({0: Curve(0, 1, -9, 9), 1: Curve(0, 3, -9, 9), 2: Curve(-2, 1, -9, 9)})
    assert steeper == pytest.approx({0: -6 / 7, 1: -2 / 7, 2: 8 / 7})
    assert least_sum({}) == {}


@pytest.mark.parametrize("size", [1_000, 200_000_000])
def test_one_sweep_comes_near_the_best_and_a_few_reach_it(size: int) -> None:
    where = space(sizes=[size] * 8)
    assert where.rates(after(1, where, bowl(where)).best) == pytest.approx(BEST, abs=0.05)
    assert where.rates(after(6, where, bowl(where, 0.3)).best) == pytest.approx(BEST, abs=0.02)


def test_what_a_sweep_measures() -> None:
    """Each of 3 blocks up and down on two windows, with the start; then three candidates on two others."""
    seen: list[tuple[Point, tuple[int, ...]]] = []
    where = space((0.5, 0.5, 0.95))

    def loss(point: Point, windows: Sequence[int]) -> float:
        seen.append((point, tuple(windows)))
        return bowl(where)(point, windows)

    found = after(1, where, loss)
    first = seen[0][1]
    swept = {point for point, windows in seen if windows == first}
    ups = {(100, 0, 0), (0, 100, 0), (0, 0, 40)}  # 0.99 is the upper bound
    downs = {(-100, 0, 0), (0, -100, 0), (0, 0, -100)}
    assert swept == {(0, 0, 0)} | ups | downs
    (second,) = {windows for _, windows in seen if windows != first}
    compared = {point for point, windows in seen if windows == second}
    assert len(compared) == 4
    assert not set(first) & set(second)
    assert compared >= {(0, 0, 0), found.best}


def test_rates_that_are_worse_on_other_windows_are_not_taken_and_the_next_ones_are_nearer() -> None:
    where, compared = space(), []

    def loss(point: Point, windows: Sequence[int]) -> float:
        if sum(part != 0 for part in point) < 2:
            return bowl(where)(point, windows)
        compared.append(max(map(abs, point)))
        return 1.0

    found = after(2, where, loss)
    assert found.best == where.origin
    assert found.reach == pytest.approx([3 / 16] * 8)
    assert max(compared[-3:]) <= max(compared[:3]) / 2


@pytest.mark.parametrize(("most", "reach"), [(100, 1.5), (200, 3.0)])
def test_the_reach_follows_the_best_candidate(most: int, reach: float) -> None:
    """Candidates are 75, 150 and 300 away; beyond ``most`` they are worse."""
    where = space((0.5,) * 2)

    def loss(point: Point, windows: Sequence[int]) -> float:
        return 1 + point[0] / 1000 if abs(point[0]) <= most or point[1] == 0 else 2.0

    found = after(1, where, loss)
    assert found.best == {100: (-75, 75), 200: (-150, 150)}[most]
    assert found.reach == [reach] * 2


def test_what_was_not_swept_keeps_its_reach() -> None:

    def loss(point: Point, windows: Sequence[int]) -> float:
        return 1e9 if sum(part != 0 for part in point) > 1 else float(sum(point) * point.index(max(point)))

    assert sorted(after(1, space(), loss, most=3).reach) == [0.75] * 3 + [3.0] * 5
    assert after(9, space(), loss).reach == [0.05] * 8  # and no less


def test_a_block_without_a_slope_does_not_go_to_its_bounds() -> None:
    """Block 2 changes nothing; without a least curvature it would take all that the others want to give."""
    where = space((0.6, 0.6, 0.5))

    def loss(point: Point, windows: Sequence[int]) -> float:
        return sum((rate - best) ** 2 for rate, best in zip(where.rates(point)[:2], [0.5, 0.5], strict=True))

    assert where.rates(after(1, where, loss).best) == pytest.approx([0.55, 0.55, 0.6], abs=0.021)


def test_blocks_that_bend_down_do_not_go_as_far_as_they_can() -> None:
    """Six of eight, of which some have a slope; the median of all curvatures would be negative."""
    where = space()

    def loss(point: Point, windows: Sequence[int]) -> float:
        errors = [rate - 0.5 for rate in where.rates(point)]
        return sum((error - 0.1) ** 2 for error in errors[:2]) - sum(error**2 / 20 for error in errors[2:])

    found = after(1, where, loss)
    assert found.best[:2] == pytest.approx((75, 75), abs=25)
    assert max(map(abs, found.best[2:])) < 50


def test_an_infinite_loss_is_a_bound() -> None:
    where = space((0.5,) * 3)

    def loss(point: Point, windows: Sequence[int]) -> float:
        return math.inf if point[0] > 0 else float(-point[0] + point[1] + 2 * point[2])

    found = after(1, where, loss)
    assert found.best[0] == 0
    assert found.best[1] == -found.best[2] > 0


def test_more_blocks_than_a_sweep_takes_have_their_turns() -> None:
    where, swept = space(), set()

    def loss(point: Point, windows: Sequence[int]) -> float:
        changed = [block for block, part in enumerate(point) if part]
        swept.update(changed)
        return 1.0 if len(changed) > 1 else 0.0

    found = after(1, where, loss, most=3)
    assert len(swept) == 3
    for _ in range(2):
        assert found.sweep(3)
    assert swept == set(range(8))
    odd = after(1, space(), lambda point, windows: 0.0, most=7)
    (last,) = odd._waiting
    assert last in odd._next(7)  # with others, but not left out
    pairs = after(1, space(), lambda point, windows: 0.0, most=3, together=[[(0, 1), (2, 3), (4, 5), (6, 7)]])
    (last,) = pairs._due
    assert sorted(block for group in pairs._next(8) for block in group) == list(range(8))  # and none of them twice
    whole = after(20, where, bowl(where), most=3)
    assert where.rates(whole.best) == pytest.approx(BEST, abs=0.03)


def test_families_and_some_single_blocks_take_turns() -> None:
    halves = [(0, 1, 2, 3), (4, 5, 6, 7)]
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7)]
    found = Sweeps(space(), 0.1, 2, 4, lambda point, windows: 0.0, 0, [halves, pairs])
    turns = [found._next(4) for _ in range(6)]
    assert turns[:2] == turns[3:5] == [halves, pairs]
    assert sorted(turns[2] + turns[5]) == [(block,) for block in range(8)]


def test_the_first_sweep_changes_groups_together() -> None:
    """By what they have room for; then come the single ones."""
    where, seen = space((0.5, 0.5, 0.4, 0.9), sizes=[1000, 500, 1000, 1000]), set()

    def loss(point: Point, windows: Sequence[int]) -> float:
        seen.add(point)
        return float(point[2] + point[3] - point[0] - point[1])

    found = after(1, where, loss, together=[[(0, 1), (2, 3)]])
    assert {(100, 50, 0, 0), (-100, -50, 0, 0), (0, 0, 100, 90), (0, 0, -100, -100)} <= seen
    assert found.best == (300, 150, -225, -225)
    assert found.sweep()
    assert (300, 100, -225, -225) in seen
    steep = after(1, where, lambda point, windows: float(point[0]), together=[[(0, 1), (2, 3)]])
    assert steep.best == (-260, -130, 300, 90)  # 0.99 is the upper bound, and block 2 takes the more


@pytest.mark.parametrize("blocks", [1, 2])
def test_where_there_is_nowhere_to_go(blocks: int) -> None:
    fixed = space([0.5] * blocks, lower=[0.5] * blocks, upper=[0.5] * blocks)
    found = Sweeps(fixed, 0.1, 2, 4, lambda point, windows: 0.0, 0)
    assert not found.sweep()
    assert found.best == fixed.origin


def test_one_window() -> None:
    where = space((0.5, 0.5))
    found = after(4, where, lambda point, windows: (where.rates(point)[0] - 0.3) ** 2, available=1)
    assert where.rates(found.best) == pytest.approx([0.3, 0.7], abs=0.01)


def test_the_same_seed_gives_the_same_search_and_another_one_another() -> None:
    loss = bowl(space(), 0.3)
    assert after(1, space(), loss).best == after(1, space(), loss).best
    assert after(1, space(), loss).best != after(1, space(), loss, seed=1).best


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    count = draw(st.integers(2, 8))
    each = {"min_size": count, "max_size": count}
    grain = draw(st.sampled_from([1, 8, 50]))
    grains = [grain * factor for factor in draw(st.lists(st.sampled_from([1, 1, 2, 3]), **each))]
    sizes = [grain * size for grain, size in zip(grains, draw(st.lists(st.integers(4, 400), **each)), strict=True)]
    lower, upper = draw(st.sampled_from([0.0, 0.2])), draw(st.sampled_from([0.8, 0.99]))
    start = draw(st.lists(st.floats(lower, upper), **each))
    balance = draw(st.sampled_from([(0.0, 0.0), (-min(grains) / 2, min(grains) / 2)]))
    return Space(start, sizes, grains, [lower] * count, [upper] * count, balance)


@given(
    where=spaces(),
    seed=st.integers(0, 9),
    step=st.sampled_from([0.01, 0.1]),
    most=st.integers(2, 8),
    together=st.booleans(),
    broken=st.sampled_from([math.inf, 2.0]),
)
def test_budget_granularity_and_bounds_are_kept(
    where: Space, seed: int, step: float, most: int, together: bool, broken: float
) -> None:
    drawn: list[Point] = []

    def loss(point: Point, windows: Sequence[int]) -> float:
        drawn.append(point)
        rates = where.rates(point)
        return broken if rates[0] > 0.9 else rates[0] - rates[-1] + sum(rate**2 for rate in rates)

    pairs = [tuple(range(len(where.start)))[first : first + 2] for first in range(0, len(where.start), 2)]
    found = Sweeps(where, step, 2, 4, loss, seed, [pairs] if together else [])
    taken = [found.best]
    for _ in range(4):
        found.sweep(most)
        taken.append(found.best)
    for point in drawn:
        assert all(part % grain == 0 for part, grain in zip(point, where.granularity, strict=True))
        bounds = zip(where.rates(point), where.lower, where.upper, strict=True)
        assert all(low - 1e-9 <= rate <= high + 1e-9 for rate, low, high in bounds)
    assert all(where.allows(point) for point in taken)
    if not any(where.balance):
        assert {sum(point) for point in taken} == {0}
