import pytest

from lit_prune.errors import InputError
from lit_prune.schedule import Cubic, Cut, Linear, OneShot, Schedule, cuts, progress, shares


def test_one_cut_takes_all() -> None:
    assert cuts(0, 0.5) == (Cut(0, 0.5),)
    assert cuts([7], 0.5, OneShot()) == cuts(7, [0.5]) == cuts(7, 0.5, Cubic()) == (Cut(7, 0.5),)


def test_the_ramp_begins_one_interval_before_the_first_cut() -> None:
    assert progress([100, 200, 300]) == pytest.approx([1 / 3, 2 / 3, 1])
    assert progress([0, 10, 40]) == pytest.approx([20 / 60, 30 / 60, 1])  # intervals of 10 and 30: 20 in the mean


def test_linear_by_hand() -> None:
    assert [share for _, share in cuts([0, 200, 400], 0.6, Linear())] == pytest.approx([0.2, 0.4, 0.6])


def test_cubic_by_hand_and_by_default() -> None:
    # Zhu & Gupta 2017, equation 1, from 0 at step -200 on: 0.6 + (0 - 0.6) (1 - (t + 200) / 600)^3
    by_hand = [0.6 - 0.6 * (1 - (step + 200) / 600) ** 3 for step in (0, 200, 400)]
    found = cuts([0, 200, 400], 0.6, Cubic())
    assert [step for step, _ in found] == [0, 200, 400]
    assert [share for _, share in found] == pytest.approx(by_hand)
    assert by_hand == pytest.approx([0.6 * 19 / 27, 0.6 * 26 / 27, 0.6])
    assert found == cuts([0, 200, 400], 0.6)
    assert found[-1].sparsity == 0.6  # exactly


def test_targets_that_are_listed() -> None:
    assert cuts([1, 5], [0.3, 0.5]) == (Cut(1, 0.3), Cut(5, 0.5))


@pytest.mark.parametrize(
    "kind", [kind for kind in Schedule.__subclasses__() if kind.__module__.startswith("lit_prune.")]
)
def test_every_schedule_rises_to_1(kind: type[Schedule]) -> None:
    shares = [kind().share(part / 20) for part in range(1, 21)]
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((-1, 0.5), "`pruning.at_step` must be at least 0, got -1"),
        (([], 0.5), "`pruning.at_step` must be a step, or a list of at least one, got an empty list"),
        (([0, 5, 5], 0.5), r"`pruning.at_step` must list rising steps, got \[0, 5, 5\]"),
        ((0, 1.0), r"`pruning.sparsity` must be in \[0, 1\), the share to remove, got 1.0"),
        (
            ([0, 5], [0.5]),
            "`pruning.sparsity` must be one number, or one for each of the 2 steps of .*, got 1",
        ),
        (([0, 5], [0.5, 0.4]), "`pruning.sparsity` must rise from cut to cut, .* got 0.5, 0.4"),
        (([0, 5], 0.0), "`pruning.sparsity` must rise from cut to cut, .* got 0, 0"),
        (
            ([0, 5], [0.3, 0.5], Linear()),
            "`pruning.schedule` must be null if `pruning.sparsity` lists the target",
        ),
        (([0, 5], 0.5, OneShot()), "`pruning.schedule` must be Linear or Cubic for 2 cuts, got OneShot"),
    ],
)
def test_what_cannot_be(args: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cuts(*args)


def test_shares_of_a_sparsity_that_is_not_known_yet() -> None:
    assert shares(3) == (Cut(3, 1.0),)
    assert [cut.sparsity for cut in shares([0, 1, 2])] == pytest.approx([19 / 27, 26 / 27, 1])
    with pytest.raises(InputError, match="`pruning.at_step` must be at least 0"):
        shares(-1)
