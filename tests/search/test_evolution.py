"""The search for better rates against losses whose optimum is known, and what it must keep to whatever the loss."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_prune.allocate.base import weighted_mean
from lit_prune.search import evolution
from lit_prune.search.evolution import Evolution, Rounds
from lit_prune.search.space import Point, Space

ROUNDS = Rounds(offspring=8, survivors=2, first=1, final=2)
BEST = [0.3, 0.7, 0.5, 0.6, 0.4, 0.5, 0.8, 0.2]


def space(start: Sequence[float] = (0.5,) * 8, **fields: object) -> Space:
    count = len(start)
    given = {
        "sizes": [1000] * count,
        "granularity": [1] * count,
        "lower": [0.0] * count,
        "upper": [0.99] * count,
        "step": 0.02,
    }
    return Space(start, **(given | fields))  # type: ignore[arg-type]


def bowl(where: Space) -> evolution.Loss:
    """A loss that is least, 0, at BEST; each window weighs the blocks in another way."""

    def loss(moved: Point, windows: Sequence[int]) -> float:
        errors = [(rate - best) ** 2 for rate, best in zip(where.rates(moved), BEST, strict=True)]
        weighted = [
            (1 + 0.2 * math.sin(block + 3 * window)) * errors[block] for window in windows for block in range(8)
        ]
        return sum(weighted) / len(windows)

    return loss


def after(generations: int, where: Space, loss: evolution.Loss, seed: int = 0) -> Evolution:
    evolution = Evolution(where, ROUNDS, 16, loss, seed)
    for _ in range(generations):
        assert evolution.generation()
    return evolution


def test_it_finds_the_best_rates() -> None:
    found = after(60, space(), bowl(space()))
    assert space().rates(found.best) == pytest.approx(BEST, abs=0.05)


def test_what_it_learns_of_the_blocks_makes_it_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    where, windows = space(), list(range(16))
    loss = bowl(where)
    learned = [loss(after(12, where, loss, seed).best, windows) for seed in range(10)]
    monkeypatch.setattr(evolution, "CONTENDERS", 1)  # blocks are drawn evenly
    blind = [loss(after(12, where, loss, seed).best, windows) for seed in range(10)]
    assert sum(learned) < 0.7 * sum(blind)


def test_costs_by_hand() -> None:
    children: list[Point] = []
    rises = iter([0.4, math.inf])

    def loss(moved: Point, windows: Sequence[int]) -> float:
        if moved == (0, 0):
            return 0.0
        if not children or len(windows) == 1:
            children.append(moved)
        return next(rises) if len(windows) == 1 else 1.0

    evolution = Evolution(space([0.5, 0.5]), Rounds(offspring=1, survivors=1, first=1, final=2), 4, loss, 0)
    evolution.generation()
    taken_from = children[0].index(-20)  # one step to the other block; half of 0.4 along (1, -1) / 2
    expected = [0.1, 0.1]
    expected[taken_from] = -0.1
    assert list(evolution.costs.values()) == pytest.approx(expected)
    evolution.generation()  # whose loss is infinite, and corrects nothing
    assert list(evolution.costs.values()) == pytest.approx(expected)


def test_moves_go_from_costly_blocks_to_cheap_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[Point] = []

    def loss(moved: Point, windows: Sequence[int]) -> float:
        if moved == space().origin:
            return 0.0
        if len(windows) == 1:
            children.append(moved)
        return math.inf  # from which nothing is learnt

    evolution = Evolution(space(), Rounds(offspring=1, survivors=1, first=1, final=2), 4, loss, 0)
    monkeypatch.setattr(evolution, "_cost", lambda group: float(group[0]))
    for _ in range(300):
        evolution.generation()
    moved = [sum(parts) for parts in zip(*children, strict=True)]
    assert moved[0] > moved[2] > 0 > moved[5] > moved[7]
    assert moved[6] != 0  # it explores: not the costliest block alone is pruned less


def test_the_parent_is_measured_on_the_windows_of_its_rivals() -> None:
    seen: list[tuple[Point, tuple[int, ...]]] = []

    def loss(moved: Point, windows: Sequence[int]) -> float:
        seen.append((moved, tuple(windows)))
        return float(sum(moved[:4]))

    evolution = Evolution(space(), ROUNDS, 16, loss, 0)
    for _ in range(5):
        seen.clear()
        parent = evolution.best
        evolution.generation()
        few = [moved for moved, windows in seen if len(windows) == 1]
        many = [moved for moved, windows in seen if len(windows) == 2]
        assert len({windows for _, windows in seen}) == 2
        assert all(windows[:1] == seen[0][1] for _, windows in seen)
        assert parent in few
        assert parent in many
        assert len(few) == 1 + ROUNDS.offspring
        assert len(many) == 2 + ROUNDS.survivors  # and the combination of all that are better
        assert evolution.best in many


def test_what_is_worse_on_more_windows_does_not_survive() -> None:
    def loss(moved: Point, windows: Sequence[int]) -> float:
        return 0.0 if moved == space().origin else (-1.0 if len(windows) == 1 else 1.0)

    assert after(5, space(), loss).best == space().origin


def test_the_same_seed_gives_the_same_search_and_another_one_another() -> None:
    loss = bowl(space())
    assert after(5, space(), loss).best == after(5, space(), loss).best
    assert after(5, space(), loss).best != after(5, space(), loss, seed=1).best


@pytest.mark.parametrize("blocks", [1, 2])
def test_where_there_is_nowhere_to_go(blocks: int) -> None:
    fixed = space([0.5] * blocks, lower=[0.5] * blocks, upper=[0.5] * blocks)
    evolution = Evolution(fixed, ROUNDS, 4, lambda moved, windows: 0.0, 0)
    assert not evolution.generation()
    assert evolution.best == fixed.origin


def test_two_blocks_and_one_window() -> None:
    where = space([0.5, 0.5])
    evolution = Evolution(where, ROUNDS, 1, lambda moved, windows: abs(where.rates(moved)[0] - 0.3), 0)
    for _ in range(40):
        evolution.generation()
    assert where.rates(evolution.best) == pytest.approx([0.3, 0.7])


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    count = draw(st.integers(2, 8))
    each = {"min_size": count, "max_size": count}
    grain = draw(st.sampled_from([1, 8, 50]))
    sizes = [grain * size for size in draw(st.lists(st.integers(4, 400), **each))]
    lower, upper = draw(st.sampled_from([0.0, 0.2])), draw(st.sampled_from([0.8, 0.99]))
    start = draw(st.lists(st.floats(lower, upper), **each))
    return Space(start, sizes, [grain] * count, [lower] * count, [upper] * count, draw(st.sampled_from([0.01, 0.1])))


@given(where=spaces(), seed=st.integers(0, 9))
def test_budget_granularity_and_bounds_are_kept(where: Space, seed: int) -> None:
    drawn: list[Point] = []

    def loss(moved: Point, windows: Sequence[int]) -> float:
        drawn.append(moved)
        return float(moved[0] - moved[-1])

    evolution = Evolution(where, ROUNDS, 4, loss, seed)
    for _ in range(6):
        evolution.generation()
    budget = weighted_mean(where.start, where.sizes)
    for moved in drawn:
        assert sum(moved) == 0
        assert all(part % grain == 0 for part, grain in zip(moved, where.granularity, strict=True))
        rates = where.rates(moved)
        assert weighted_mean(rates, where.sizes) == pytest.approx(budget, abs=1e-12)
        bounds = zip(rates, where.lower, where.upper, strict=True)
        assert all(low - 1e-9 <= rate <= high + 1e-9 for rate, low, high in bounds)


def test_what_a_generation_takes() -> None:
    assert Rounds(offspring=8, survivors=2, first=1, final=4).evaluations == 8 + 2 * 3 + 4 + 4
    assert Rounds(offspring=1, survivors=1, first=1, final=4).evaluations == 1 + 3 + 4  # nothing to combine
    assert Rounds(8, 2, 4, 8).within(2) == Rounds(8, 2, 2, 2)


def test_the_number_of_moves_is_limited() -> None:
    evolution = Evolution(space(), ROUNDS, 16, lambda moved, windows: float(sum(map(abs, moved))), 0, moves=1)
    for _ in range(50):
        assert sum(part != 0 for part in evolution._child()) in (0, 2)


def with_offspring(points: list[Point], loss: evolution.Loss, monkeypatch: pytest.MonkeyPatch) -> Evolution:
    found = Evolution(space([0.5] * 4), Rounds(offspring=3, survivors=1, first=1, final=2), 4, loss, 0)
    monkeypatch.setattr(found, "_offspring", lambda: points)
    found.generation()
    return found


def test_better_candidates_are_combined_and_steps_grow_and_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less in blocks 0 and 2 is better; the third candidate, which is worse, takes no part."""
    points = [(-20, 20, 0, 0), (0, 0, -20, 20), (20, -20, 0, 0)]
    found = with_offspring(points, lambda moved, windows: float(moved[0] + moved[2]), monkeypatch)
    assert found.best == (-20, 20, -20, 20)
    assert found.scale == 1.0
    worse = with_offspring(points, lambda moved, windows: float(any(moved)), monkeypatch)
    assert worse.best == worse.space.origin
    assert worse.scale == pytest.approx(0.6)
    worse.loss = lambda moved, windows: -float(any(moved))
    worse.generation()
    assert worse.scale == pytest.approx(0.72)


def test_costs_of_groups_by_hand() -> None:
    """Groups get d = (-2, 2) and their blocks -1 and 1 each, |d|^2 = 12: half of a rise of 1.2 is 0.05 a step."""
    pairs, singles = [(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)]
    found = Evolution(space([0.5] * 4), ROUNDS, 4, lambda moved, windows: 0.0, 0, [pairs, singles])
    found._learn((-20, -20, 20, 20), 1.2)
    assert list(found.costs.values()) == pytest.approx([-0.1, 0.1, -0.05, -0.05, 0.05, 0.05])
    assert found._cost((0, 1)) == pytest.approx(-0.15)


def test_moves_between_groups() -> None:
    found = Evolution(space([0.5] * 4), ROUNDS, 4, lambda moved, windows: 0.0, 0, [[(0, 1), (2, 3)]], moves=1)
    assert {found._child() for _ in range(20)} == {(-20, -20, 20, 20), (20, 20, -20, -20)}  # 0.02 of 2,000
