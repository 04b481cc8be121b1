"""Search: rates found by measuring, after EvoPress (ICML 2025, arXiv 2410.14649); see ``search/evolution.py``."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from torch import Tensor

from lit_prune.allocate.base import Allocation, Refined
from lit_prune.allocate.budget import Limits
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.errors import InputError
from lit_prune.progress import counted, log
from lit_prune.search.evolution import Evolution, Moved, Rounds, Space
from lit_prune.search.losses import Measured
from lit_prune.search.trial import Trial

IDLE = 20  # generations in a row without a new measurement, after which the search ends: all moves are measured
BROKEN = (
    "`calibration`: the loss under the rates of `Search.start` is NaN or infinity; the weights are broken, or "
    "`model.dtype` is too small for them (try float32 or bfloat16)."
)


@final
@dataclass(frozen=True)
class Search(Allocation):
    """Starts from the rates of another allocation, measures others of the same mean, and keeps those of lower loss.

    The loss is the mean cross entropy of the next token on calibration windows. A generation makes `offspring` by
    moving budget between blocks, measures each on `first` windows, and the best `survivors` and their parent on `final`
    windows; the best of these is the next parent. Every measurement updates an estimate of each block's cost, which
    guides the moves. If the last parent is no better than the start on `final` further windows, the start is returned.

    Between pruned blocks of one size at [0.5, 0.5] a step of 0.02 makes [0.48, 0.52].

    Args:
        start: The allocation that gives the initial rates; null is DLP.
        evaluations: Maximum number of passes of one calibration window through the whole model, including those of a
            stopped search that is resumed.
        minutes: Time limit of this run; null has none.
        step: The budget that a move takes from one block and gives to another, as a share of a block of mean size,
            rounded to whole steps of the pattern or the slices. A move of 0.02 of 1,000 weights is 20.
        offspring: Candidates per generation.
        survivors: Candidates that are compared with their parent.
        first: Number of windows on which every candidate is measured.
        final: Number of windows on which the survivors are measured.
        seed: Random seed.
        state: File with all measurements, written after every generation and when the search is stopped; a search that
            finds the file continues from it. A larger number of evaluations continues a search that had ended.

    Raises:
        InputError: for settings out of their range, a start that is itself a search, a state that does not fit, or
            too few evaluations for one generation.
    """

    start: Allocation | None = None
    evaluations: int = 400
    minutes: float | None = None
    step: float = 0.02
    offspring: int = 8
    survivors: int = 2
    first: int = 1
    final: int = 2
    seed: int = 0
    state: str | None = field(default=None, repr=False)

    searches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        from lit_prune.allocate.dlp import DLP  # here, since no allocation imports another at module level

        object.__setattr__(self, "start", self.start or DLP())
        if self.rule.searches:
            raise InputError("`Search.start` must be an allocation that does not search itself, got Search.")
        if not 0 < self.step < 1:
            raise InputError(f"`Search.step` must be in (0, 1), a share of a block, got {self.step}.")
        for name, most in (("first", self.final), ("survivors", self.offspring), ("final", None), ("offspring", None)):
            value = getattr(self, name)
            if value < 1 or (most is not None and value > most):
                above = "" if most is None else f" and at most {most}, of which they are some"
                raise InputError(f"`Search.{name}` must be at least 1{above}, got {value}.")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"`Search.minutes` must be above 0, or null, got {self.minutes}.")
        least = self.rounds.evaluations + 2 * self.final
        if self.evaluations < least:
            raise InputError(
                f"`Search.evaluations` must be at least {least}, which one generation of {self.offspring} takes with "
                f"the comparison of start and end, got {self.evaluations}."
            )

    @property
    def rule(self) -> Allocation:
        """The allocation that gives the initial rates."""
        assert self.start is not None
        return self.start

    @property
    def rounds(self) -> Rounds:
        """The sizes of a generation."""
        return Rounds(self.offspring, self.survivors, self.first, self.final)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The statistics that the start needs."""
        return self.rule.needs

    def score(self, weights: dict[str, Tensor], observed: BlockStatistics) -> float:
        """Returns the start's score."""
        return self.rule.score(weights, observed)

    def raw_rates(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns the start's raw rates."""
        return self.rule.raw_rates(scores, sparsity)

    def shifted_rates(self, raw_rates: Sequence[float], amount: float) -> list[float]:
        """Returns the start's rates, shifted by its own rule."""
        return self.rule.shifted_rates(raw_rates, amount)

    def floor(self, sparsity: float) -> float:
        """Returns the start's floor, which holds for the search too."""
        return self.rule.floor(sparsity)

    def check(self, sizes: Sequence[int], sparsity: float, lower: Sequence[float], upper: float) -> None:
        """Raises InputError if the start does not fit the model, or if the state belongs to another search."""
        self.rule.check(sizes, sparsity, lower, upper)
        Measured(self.state).fit(self._settings() | {"sizes": list(sizes)})

    def _settings(self) -> dict[str, Any]:
        """Returns the settings that determine the candidates; limits of evaluations and time only end a search."""
        names = ("step", "offspring", "survivors", "first", "final", "seed")
        return {"start": repr(self.start)} | {name: getattr(self, name) for name in names}

    def refine(self, rates: Sequence[float], limits: Limits, *, trial: Trial, key: Mapping[str, Any]) -> Refined:
        """Returns the best rates, and the details of the search."""
        lower = [max(low, self.floor(limits.target)) for low in limits.lower]
        upper = [max(limits.upper, low) for low in lower]
        space = Space(list(rates), limits.sizes, trial.granularity, lower, upper, self.step)
        bounds = {"lower": lower, "upper": upper, "rates at the start": [round(rate, 4) for rate in rates]}
        key = {**key, **self._settings(), "sizes": limits.sizes, **bounds}
        measured = Measured(self.state)
        measured.fit(key)
        with counted(self.evaluations, "Searching rates") as report:
            return _Run(self, space, trial, measured, report).run(key)


class _Spent(Exception):
    """Raised when the evaluations or the minutes are used up."""


class _Run:
    """The state of one search: its limits, its measurements and its population."""

    def __init__(
        self, search: Search, space: Space, trial: Trial, measured: Measured, report: Callable[[int, str], None]
    ) -> None:
        self.search, self.space, self.trial, self.measured, self.report = search, space, trial, measured, report
        self.used: set[tuple[Moved, int]] = set()
        self.limit, self.end = search.evaluations, math.inf
        windows = len(trial.tokens)
        self.evolution = Evolution(space, search.rounds, windows, self.loss, search.seed)
        self.closing = random.Random(search.seed).sample(range(windows), self.evolution.rounds.final)
        self.generations = 0

    def run(self, key: Mapping[str, Any]) -> Refined:
        """Searches until a limit is reached and returns the result; saves the state and logs it when interrupted."""
        try:
            before = self.loss(self.space.origin, self.closing)
            if not math.isfinite(before):
                raise InputError(BROKEN)
            self._evolve(key, before)
            after = self.loss(self.evolution.best, self.closing)
        except KeyboardInterrupt:
            log(f"Search stopped after {len(self.used)} evaluations; {self._state_message()}.")
            raise
        finally:
            self._save(key)
        return self._refined(before, after)

    def _evolve(self, key: Mapping[str, Any], before: float) -> None:
        """Runs generations until evaluations or minutes are used up, reserving those of the closing comparison."""
        begin, idle, used = time.monotonic(), 0, 0
        self.limit -= len(self.closing)
        self.end = begin + 60 * (self.search.minutes or math.inf)
        with suppress(_Spent):
            while idle < IDLE and self.evolution.generation():
                self.generations += 1
                idle, used = (idle + 1 if len(self.used) == used else 0), len(self.used)
                self._save(key)
        self.limit, self.end = self.search.evaluations, math.inf

    def loss(self, moved: Moved, windows: Sequence[int]) -> float:
        """Returns the mean loss over the predicted tokens of some windows, from the measurements where possible."""
        tokens = [self.trial.tokens[window] for window in windows]
        losses = [self._measure(moved, window) for window in windows]
        return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)

    def _measure(self, moved: Moved, window: int) -> float:
        measurement = (moved, window)
        if measurement not in self.used:
            if len(self.used) >= self.limit or time.monotonic() >= self.end:
                raise _Spent
            if measurement not in self.measured.losses:
                self.measured.losses[measurement] = self.trial.loss(self.space.rates(moved), window)
            self.used.add(measurement)
            self.report(len(self.used), "")
        return self.measured.losses[measurement]

    def _save(self, key: Mapping[str, Any]) -> None:
        self.measured.save(key, self.space.rates(self.evolution.best))

    def _state_message(self) -> str:
        if self.measured.path is None:
            return "its measurements are lost; pass `--pruning.allocation.state FILE` to be able to resume it"
        return f"its measurements are in {self.measured.path}, and the same command resumes it"

    def _refined(self, before: float, after: float) -> Refined:
        better = after < before
        details = {
            "evaluations": len(self.used),
            "generations": self.generations,
            "windows": len(self.closing),
            "loss_start": before,
            "loss_end": after if better else before,
        }
        return Refined(self.space.rates(self.evolution.best if better else self.space.origin), details)
