"""A search in progress: sweeps over the blocks until its evaluations or its minutes are used up."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from lit_prune.errors import InputError
from lit_prune.progress import log
from lit_prune.search.losses import MeasuredLosses
from lit_prune.search.space import Group, Point, Space
from lit_prune.search.sweeps import MOST, Sweeps, evaluations_of_sweep
from lit_prune.search.trial import Trial

IDLE = 20  # sweeps without a new measurement, after which all rates in reach are taken as measured
COMPARISON = 2  # windows of the closing comparison, in multiples of those of a sweep
BROKEN = (
    "`calibration`: the loss under the rates of `Search.start` is NaN or infinity; the weights are broken, or "
    "`model.dtype` is too small for them (try float32 or bfloat16)."
)


class Settings(Protocol):
    """The settings of a search, see ``allocate.search.Search``."""

    @property
    def evaluations(self) -> int:
        """Most passes of one window through the whole model."""

    @property
    def minutes(self) -> float | None:
        """Time limit; None is no limit."""

    @property
    def step(self) -> float:
        """What a sweep adds to a rate, and takes from it."""

    @property
    def windows(self) -> int:
        """Number of windows on which a sweep measures."""

    @property
    def level(self) -> str:
        """What has a rate of its own: `blocks`, `linears` or `parts`."""

    @property
    def loss(self) -> str:
        """The loss: `kl` or `cross_entropy`."""

    @property
    def tokens(self) -> int | None:
        """Number of tokens of a window that `kl` compares; None compares all."""

    @property
    def seed(self) -> int:
        """Random seed."""


class _LimitReached(Exception):
    """Raised to end the search when the evaluations or the minutes are used up."""


class Searching:
    """A search in progress: its limits, its measurements and its sweeps.

    Args:
        search: The settings.
        space: The rates that can be reached.
        trial: The trial of the model.
        measured: The losses that were measured before.
        report: Function that shows the number of evaluations.
        together: Families of groups, see :class:`Sweeps`.
    """

    def __init__(
        self,
        search: Settings,
        space: Space,
        trial: Trial,
        measured: MeasuredLosses,
        report: Callable[[int, str], None],
        together: Sequence[Sequence[Group]],
    ) -> None:
        self.search, self.space, self.trial, self.measured, self.report = search, space, trial, measured, report
        self.evaluated: set[tuple[Point, int]] = set()
        self.limit, self.end = search.evaluations, math.inf
        windows = len(trial.tokens)
        trial.reuse(search.windows)
        self.sweeps = Sweeps(space, search.step, search.windows, windows, self.loss, search.seed, together)
        draw = random.Random(f"{search.seed}, comparison")  # not the windows of the first sweep
        self.comparison = draw.sample(range(windows), min(COMPARISON * search.windows, windows))
        self.swept = 0

    def run(self, key: Mapping[str, Any]) -> tuple[list[float], dict[str, Any]]:
        """Searches until a limit is reached and returns the best rates, and the details of the search.

        The losses are saved even if it is interrupted.
        """
        if self._is_short:
            log(
                f"{self.search.evaluations} evaluations do not suffice for a sweep over {self._all}: a sweep takes "
                f"some of them. {self._least} do: pass `--pruning.allocation.evaluations {self._least}` or more."
            )
        try:
            before = self.loss_at_start()
            if not math.isfinite(before):
                raise InputError(BROKEN)
            self._sweep(key)
            after = self.loss(self.sweeps.best, self.comparison)
        except KeyboardInterrupt:
            log(f"Search stopped after {len(self.evaluated)} evaluations; {self.measured.whereabouts}.")
            raise
        finally:
            self._save(key)
        return self._result(before, after)

    def _sweep(self, key: Mapping[str, Any]) -> None:
        """Runs sweeps until a limit is reached, reserving the evaluations of the final comparison."""
        begin, idle, evaluated = time.monotonic(), 0, 0
        self.limit -= len(self.comparison)
        self.end = begin + 60 * (self.search.minutes or math.inf)
        with suppress(_LimitReached):
            while idle < IDLE and (most := self._affordable()) > 1 and self.sweeps.sweep(most):
                self.swept += 1
                idle, evaluated = (idle + 1 if len(self.evaluated) == evaluated else 0), len(self.evaluated)
                self._save(key)
        self.limit, self.end = self.search.evaluations, math.inf

    def _affordable(self) -> int:
        """Returns the number of blocks, at most MOST, for whose sweep the remaining evaluations suffice."""
        left, windows = self.limit - len(self.evaluated), self.sweeps.windows
        return max((most for most in range(MOST + 1) if evaluations_of_sweep(most, windows) <= left), default=0)

    def loss_at_start(self) -> float:
        """Returns the mean loss of the start over the predicted tokens of the windows of the closing comparison."""
        return self.loss(self.space.origin, self.comparison)

    def loss(self, point: Point, windows: Sequence[int]) -> float:
        """Returns the mean loss over the predicted tokens of some windows, reusing measurements."""
        tokens = [self.trial.tokens[window] for window in windows]
        losses = [self._measure(point, window) for window in windows]
        return sum(map(math.prod, zip(losses, tokens, strict=True))) / sum(tokens)

    def _measure(self, point: Point, window: int) -> float:
        measurement = (point, window)
        if measurement not in self.evaluated:
            if len(self.evaluated) >= self.limit or time.monotonic() >= self.end:
                raise _LimitReached
            if measurement not in self.measured.losses:
                self.measured.losses[measurement] = self._loss_of(self.space.rates(point), window)
            self.evaluated.add(measurement)
            self.report(len(self.evaluated), "")
        return self.measured.losses[measurement]

    def _loss_of(self, rates: Sequence[float], window: int) -> float:
        if self.search.loss == "cross_entropy":
            return self.trial.loss(rates, window)
        return self.trial.divergence(rates, window, self.search.tokens)

    def _save(self, key: Mapping[str, Any]) -> None:
        self.measured.save(key, self.space.rates(self.sweeps.best))

    @property
    def _all(self) -> str:
        """What takes part in a sweep over single blocks, linears or parts."""
        count = len(self.space.start)
        return f"{MOST} of the {count} {self.search.level}" if count > MOST else f"all {count} {self.search.level}"

    @property
    def _least(self) -> int:
        """The evaluations of such a sweep and of the comparison of its result with the start."""
        return evaluations_of_sweep(min(len(self.space.start), MOST), self.sweeps.windows) + 2 * len(self.comparison)

    @property
    def _is_short(self) -> bool:
        return self.search.evaluations < self._least

    def _reason(self) -> str:
        """Returns why the search returns its start, and what to do about it."""
        if not self.space.movable(self.space.origin):
            return "its bounds and steps allow no others. Choose another sparsity, or a smaller `multiple`."
        if not self.swept:
            return "no sweep came to its end. Pass more `--pruning.allocation.minutes`."
        if self.sweeps.best != self.space.origin:
            return (
                f"those that it found are no better on the {len(self.comparison)} windows of the closing comparison. "
                "Pass more `--pruning.allocation.windows`, and `evaluations` in proportion."
            )
        if self._is_short:
            return f"there were too few evaluations for a sweep over {self._all}. Pass {self._least} or more."
        return (
            "no exchange of budget lowered the loss. Pass more "
            "`--pruning.allocation.evaluations`, or another `--pruning.allocation.step`."
        )

    def _result(self, before: float, after: float) -> tuple[list[float], dict[str, Any]]:
        better = after < before
        if not better:
            log(f"Search found no better rates and returns those of its start: {self._reason()}")
        details = {
            "evaluations": len(self.evaluated),
            "sweeps": self.swept,
            "windows": len(self.comparison),
            "loss_start": before,
            "loss_end": after if better else before,
        }
        return self.space.rates(self.sweeps.best if better else self.space.origin), details
