"""Search: rates that were tried out, after EvoPress (ICML 2025, arXiv 2410.14649); see ``search/evolution.py``."""

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

IDLE = 20  # generations in a row in which nothing was left to measure: the search has seen all it can
BROKEN = (
    "`calibration`: the loss under the rates of `Search.start` is NaN or infinity; the weights are broken, or "
    "`model.dtype` is too small for them (try float32 or bfloat16)."
)


@final
@dataclass(frozen=True)
class Search(Allocation):
    """Starts from the rates of another allocation, tries others of the same mean, and keeps what lowers the loss.

    The loss is the mean cross entropy of the next token on calibration windows. A generation makes `offspring` by
    moving budget from block to block, measures each on `first` windows, and the best `survivors` and the rates they
    came from on `final` windows; the best of these goes on. What every measurement says of the blocks guides the moves.
    A search whose end is no better than its start, on `final` windows of their own, gives back the start.

    Between pruned blocks of one size at [0.5, 0.5] a step of 0.02 makes [0.48, 0.52].

    Args:
        start: The allocation that gives the rates to start from; null is DLP.
        evaluations: How often one calibration window may run through the whole model, what a stopped search had done
            counted.
        minutes: How long this run may search; null is as long as the evaluations take.
        step: What a move takes from one block and gives to another, as a share of a block of mean size; patterns and
            slices move in whole steps of theirs. A move of 0.02 of 1,000 weights is 20.
        offspring: Candidates of a generation.
        survivors: How many of them meet the rates they came from.
        first: Windows that every candidate is measured on.
        final: Windows that the survivors are measured on.
        seed: Seed of all that is drawn.
        state: File that keeps what was measured, written after every generation and when the search is stopped; a
            search that finds it there goes on from it. A larger number of evaluations continues one that had ended.

    Raises:
        InputError: for settings out of their range, a start that is a search itself, a state that does not fit; if the
            evaluations do not suffice for one generation.
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
        from lit_prune.allocate.dlp import DLP  # one leaf is the default of another: known only when it is made

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
        """The allocation that gives the rates to start from."""
        assert self.start is not None
        return self.start

    @property
    def rounds(self) -> Rounds:
        """How a generation is sifted."""
        return Rounds(self.offspring, self.survivors, self.first, self.final)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the start needs."""
        return self.rule.needs

    def score(self, weights: dict[str, Tensor], observed: BlockStatistics) -> float:
        """Returns the start's score."""
        return self.rule.score(weights, observed)

    def raw(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns the start's rates."""
        return self.rule.raw(scores, sparsity)

    def moved(self, raw: Sequence[float], amount: float) -> list[float]:
        """Returns the start's rates moved toward the budget as the start would."""
        return self.rule.moved(raw, amount)

    def floor(self, sparsity: float) -> float:
        """Returns the start's floor, which the search keeps to."""
        return self.rule.floor(sparsity)

    def check(self, sizes: Sequence[int], sparsity: float, lower: Sequence[float], upper: float) -> None:
        """Raises InputError where the start does not fit the model, or the state is of another search."""
        self.rule.check(sizes, sparsity, lower, upper)
        Measured(self.state).fit(self._settings() | {"sizes": list(sizes)})

    def _settings(self) -> dict[str, Any]:
        """The settings that what is tried hangs on; more time only makes a search go on."""
        names = ("step", "offspring", "survivors", "first", "final", "seed")
        return {"start": repr(self.start)} | {name: getattr(self, name) for name in names}

    def refine(self, rates: Sequence[float], limits: Limits, *, trial: Trial, key: Mapping[str, Any]) -> Refined:
        """Returns the best rates that were found, and how the search went."""
        lower = [max(low, self.floor(limits.target)) for low in limits.lower]
        upper = [max(limits.upper, low) for low in lower]
        space = Space(list(rates), limits.sizes, trial.grains, lower, upper, self.step)
        bounds = {"lower": lower, "upper": upper, "rates at the start": [round(rate, 4) for rate in rates]}
        key = {**key, **self._settings(), "sizes": limits.sizes, **bounds}
        measured = Measured(self.state)
        measured.fit(key)
        with counted(self.evaluations, "Searching rates") as tell:
            return _Run(self, space, trial, measured, tell).go(key)


class _Spent(Exception):
    """The evaluations or the minutes are used up."""


class _Run:
    """One search: what it may still measure, and what came of it."""

    def __init__(
        self, search: Search, space: Space, trial: Trial, measured: Measured, tell: Callable[[int, str], None]
    ) -> None:
        self.search, self.space, self.trial, self.measured, self.tell = search, space, trial, measured, tell
        self.used: set[tuple[Moved, int]] = set()
        self.limit, self.end = search.evaluations, math.inf
        windows = len(trial.tokens)
        self.evolution = Evolution(space, search.rounds, windows, self.loss, search.seed)
        self.closing = random.Random(search.seed).sample(range(windows), self.evolution.rounds.final)
        self.generations = 0

    def go(self, key: Mapping[str, Any]) -> Refined:
        """Searches to the end; when it is stopped, says what is kept."""
        try:
            before = self.loss(self.space.origin, self.closing)
            if not math.isfinite(before):
                raise InputError(BROKEN)
            self._evolve(key, before)
            after = self.loss(self.evolution.best, self.closing)
        except KeyboardInterrupt:
            log(f"Search stopped after {len(self.used)} evaluations; {self._kept()}.")
            raise
        finally:
            self._save(key)
        return self._refined(before, after)

    def _evolve(self, key: Mapping[str, Any], before: float) -> None:
        """Runs generations until evaluations or minutes are spent, but for what the closing comparison takes."""
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
        """Returns the mean loss over the predicted tokens of some windows; what was measured is not run again."""
        tokens = [self.trial.tokens[window] for window in windows]
        losses = [self._measure(moved, window) for window in windows]
        return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)

    def _measure(self, moved: Moved, window: int) -> float:
        found = (moved, window)
        if found not in self.used:
            if len(self.used) >= self.limit or time.monotonic() >= self.end:
                raise _Spent
            if found not in self.measured.losses:
                self.measured.losses[found] = self.trial.loss(self.space.rates(moved), window)
            self.used.add(found)
            self.tell(len(self.used), "")
        return self.measured.losses[found]

    def _save(self, key: Mapping[str, Any]) -> None:
        self.measured.save(key, self.space.rates(self.evolution.best))

    def _kept(self) -> str:
        if self.measured.path is None:
            return "nothing of it is kept; with `--pruning.allocation.state FILE` it could be taken up again"
        return f"{self.measured.path} keeps it, and the same command goes on from there"

    def _refined(self, before: float, after: float) -> Refined:
        better = after < before
        told = {
            "evaluations": len(self.used),
            "generations": self.generations,
            "windows": len(self.closing),
            "loss_start": before,
            "loss_end": after if better else before,
        }
        return Refined(self.space.rates(self.evolution.best if better else self.space.origin), told)
