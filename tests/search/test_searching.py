"""A search in progress: its limits, its state, and what it says at its end."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from lit_prune.allocate import Search, Uniform
from lit_prune.allocate.base import weighted_mean
from lit_prune.allocate.budget import Limits
from lit_prune.search import searching as searches
from tests.search.bowl import BEST, LIMITS, Bowl, opened, refine


def test_it_comes_near_the_best_and_tells() -> None:
    trial = Bowl()
    found = refine(trial)
    error = sum((rate - best) ** 2 for rate, best in zip(found.rates, BEST, strict=True))
    assert error < 1e-3  # 0.1 at the start
    assert weighted_mean(found.rates, LIMITS.sizes) == pytest.approx(0.5, abs=1e-12)
    told = found.details
    assert told["evaluations"] == len(trial.seen) <= 200
    assert told["sweeps"] > 4
    assert told["windows"] == 4
    assert told["loss_end"] < told["loss_start"] / 100
    ends = [window for rates, window in trial.seen if rates == [0.5] * 6][:4]
    tokens = [trial.tokens[window] for window in ends]
    losses = [Bowl().loss([0.5] * 6, window) for window in ends]
    assert told["loss_start"] == pytest.approx(weighted_mean(losses, tokens))  # a window counts by its tokens


def test_nothing_is_measured_twice() -> None:
    trial = Bowl()
    refine(trial)
    assert len({(tuple(rates), window) for rates, window in trial.seen}) == len(trial.seen)


@pytest.mark.parametrize("evaluations", [26, 27, 41, 60])
def test_the_limit_of_evaluations(evaluations: int) -> None:
    """With 26 evaluations for 6 blocks a sweep takes two of them."""
    trial = Bowl()
    found = refine(trial, evaluations=evaluations)
    assert found.details["evaluations"] == len(trial.seen)
    assert evaluations - 22 <= len(trial.seen) <= evaluations  # no sweep over two blocks fits in the rest
    assert found.details["loss_end"] < found.details["loss_start"]


def test_kl_compares_some_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    def divergence(rates: Sequence[float], window: int, tokens: int | None) -> float:
        asked.add(tokens)
        return 1.0

    trial = Bowl()
    monkeypatch.setattr(trial, "divergence", divergence)
    refine(trial)
    refine(trial, tokens=None)
    assert asked == {256, None}
    assert not trial.seen
    refine(trial, loss="cross_entropy")
    assert trial.seen


def test_the_limit_of_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Bowl()
    monkeypatch.setattr(searches.time, "monotonic", lambda: 6.0 * len(trial.seen))  # ten evaluations a minute
    found = refine(trial, minutes=5)
    assert 50 <= len(trial.seen) <= 58  # the closing comparison comes on top
    assert found.details["loss_end"] < found.details["loss_start"]


def test_a_floor_of_the_start_and_a_lower_bound_above_the_upper_are_kept(tmp_path: Path) -> None:
    trial, search = Bowl(), Search(Uniform(), evaluations=100)
    limits = Limits([1000] * 6, [0.45] * 5 + [0.5], 0.48, 0.5)
    search.refine([0.5] + [0.46] * 4 + [0.5], limits, trials=opened(trial), key={})
    assert all(0.45 - 1e-9 <= rate <= 0.5 + 1e-9 for rates, _ in trial.seen for rate in rates)
    assert all(rates[5] == 0.5 for rates, _ in trial.seen)


def test_a_search_that_found_nothing_better_gives_back_its_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = Bowl()
    closing = random.Random("0, comparison").sample(range(4), 2)
    own = trial.loss

    def loss(rates: Sequence[float], window: int) -> float:  # all others are worse on the windows of the comparison
        return own(rates, window) + (window in closing and rates != [0.5] * 6)

    monkeypatch.setattr(trial, "loss", loss)
    found = refine(trial, windows=1, evaluations=60)
    assert len(trial.seen) > 20
    assert found.rates == [0.5] * 6
    assert found.details["loss_end"] == found.details["loss_start"]
    assert f"{START}: no exchange of budget lowered the loss" in logged(capsys)


START = "Search found no better rates and returns those of its start"


def logged(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_few_evaluations_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep over 6 blocks on two windows takes 34, and the comparison 8."""
    refine(Bowl(), evaluations=42)
    assert "evaluations" not in logged(capsys)
    refine(Bowl(), evaluations=41)
    assert "41 evaluations do not suffice for a sweep over all 6 blocks" in (told := logged(capsys))
    assert "pass `--pruning.allocation.evaluations 42` or more" in told
    assert START not in told
    flat = Bowl()
    monkeypatch.setattr(flat, "loss", lambda rates, window: 1.0)
    for evaluations, reason in (
        (41, "there were too few evaluations for a sweep over all 6 blocks. Pass 42 or more"),
        (
            200,
            "no exchange of budget lowered the loss. Pass more `--pruning.allocation.evaluations`",
        ),
    ):
        assert refine(flat, evaluations=evaluations).rates == [0.5] * 6
        assert f"{START}: {reason}" in logged(capsys)


def test_rates_that_are_worse_in_the_closing_comparison_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sweep(sweeps: searches.Sweeps, most: int) -> bool:
        before, sweeps.best = sweeps.best, (100, -100, 0, 0, 0, 0)  # away from BEST
        return sweeps.best != before

    monkeypatch.setattr(searches.Sweeps, "sweep", sweep)
    assert refine(Bowl()).rates == [0.5] * 6
    assert f"{START}: those that it found are no better on the 4 windows of the closing comparison" in logged(capsys)


def test_a_search_without_a_sweep_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trial = Bowl()
    monkeypatch.setattr(searches.time, "monotonic", lambda: 6.0 * len(trial.seen))
    refine(trial, minutes=0.5)
    assert f"{START}: no sweep came to its end. Pass more `--pruning.allocation.minutes`" in logged(capsys)
    limits = Limits([1000] * 6, [0.5] * 6, 0.5, 0.5)
    Search(Uniform()).refine([0.5] * 6, limits, trials=opened(Bowl()), key={})
    assert f"{START}: its bounds and steps allow no others" in logged(capsys)


def test_a_stopped_search_goes_on_to_the_same_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = str(tmp_path / "state.json")
    whole = refine(Bowl())
    for stop in (5, 40):
        with pytest.raises(KeyboardInterrupt):
            refine(Bowl(stop), state=state)
    told = " ".join(capsys.readouterr().err.split())
    assert "Search stopped after 45 evaluations" in told
    assert "and the same command resumes it" in told
    last = Bowl()
    found = refine(last, state=state)
    assert found == whole
    assert len(last.seen) == whole.details["evaluations"] - 45
    again = Bowl()
    assert refine(again, state=state) == whole
    assert again.seen == []


def test_a_search_that_ended_goes_on_with_more_evaluations(tmp_path: Path) -> None:
    state, more = str(tmp_path / "state.json"), Bowl()
    refine(Bowl(), state=state, evaluations=100)
    assert refine(more, state=state, evaluations=200) == refine(Bowl(), evaluations=200)
    assert len(more.seen) < 130


def test_without_a_state_nothing_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        refine(Bowl(20))
    assert "its measurements are lost; pass `--pruning.allocation.state FILE`" in " ".join(
        capsys.readouterr().err.split()
    )
