"""Search: rates with a low measured loss, after EvoPress (ICML 2025, arXiv 2410.14649); see ``search/evolution.py``."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, final, get_args

from torch import Tensor

from lit_prune.allocate.base import Allocation, Level, Refined, mean_rate, weighted_mean
from lit_prune.allocate.budget import Limits
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.errors import InputError
from lit_prune.progress import counted, log
from lit_prune.search.evolution import Evolution, Rounds
from lit_prune.search.losses import MeasuredLosses
from lit_prune.search.space import Family, Point, Space
from lit_prune.search.trial import NamedTrial, Trial

Loss = Literal["cross_entropy", "kl"]
IDLE = 20  # generations without a new measurement, after which all moves are taken as measured
BROKEN = (
    "`calibration`: the loss under the rates of `Search.start` is NaN or infinity; the weights are broken, or "
    "`model.dtype` is too small for them (try float32 or bfloat16)."
)


@final
@dataclass(frozen=True)
class Search(Allocation):
    """Starts from the rates of another allocation and searches for rates of the same mean that give a lower loss.

    The loss is the mean cross entropy of the next token on calibration windows. A generation makes `offspring` by
    moving budget between blocks, measures each on `first` windows, and combines those that are better than their
    parent. This combination, the best `survivors` and the parent are measured on `final` windows; the best of these is
    the next parent. Every measurement updates an estimate of each block's cost, which guides the moves. If the last
    parent is no better than the start on `final` windows drawn for this comparison, the start is returned.

    For two blocks of one size at [0.5, 0.5], a move of step 0.02 gives [0.48, 0.52].

    With `level: linears` budget moves between linears instead, or groups of these, so that those of one block may
    differ; with `level: parts` between the parts of `Shrink`, so that the search finds how much each of them loses.

    Args:
        start: The allocation of the initial rates; null is DLP.
        evaluations: Maximum number of passes of one calibration window through the whole model, including those of a
            stopped search that is resumed.
        minutes: Time limit of this run; null is no limit.
        step: The largest budget that a move shifts from one block to another, as a share of the smaller one, rounded to
            the granularity of the pattern, the slices or the parts; with `level: linears` or `parts` of the smaller
            linear, part or group of these. A step of 0.02 of 1,000 weights is 20 weights.
        offspring: Candidates per generation.
        survivors: Candidates that are compared with their parent.
        first: Number of windows on which every candidate is measured.
        final: Number of windows on which the survivors are measured.
        level: What gets rates of its own: the `blocks`; the `linears` of each block, for masks; or the `parts` of each
            block, for `Shrink`.
        loss: `cross_entropy` of the next token, or `kl`, the divergence of the pruned model's prediction from that of
            the unpruned one, as in EvoPress; it needs one more pass over the windows.
        seed: Random seed.
        state: File with all measurements, written after every generation and when the search is interrupted. If it
            exists, the search resumes from it; with more evaluations, a finished search continues.

    Raises:
        InputError: for settings out of range, a start that is itself a search, a state of another search, or too few
            evaluations for one generation.
    """

    start: Allocation | None = None
    evaluations: int = 400
    minutes: float | None = None
    step: float = 0.02
    offspring: int = 8
    survivors: int = 2
    first: int = 1
    final: int = 2
    level: Level = "blocks"
    loss: Loss = "cross_entropy"
    seed: int = 0
    state: str | None = field(default=None, repr=False)

    searches = True

    def __post_init__(self) -> None:
        from lit_prune.allocate.dlp import DLP  # here, since no allocation imports another at module level

        object.__setattr__(self, "start", self.start or DLP())
        if self.rule.searches:
            raise InputError("`Search.start` must be an allocation that does not search itself, got Search.")
        if "blocks" not in self.rule.levels:
            raise InputError("`Search.start` must have one rate per block, got rates of linears or parts.")
        for name, kind in (("level", Level), ("loss", Loss)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(
                    f"`Search.{name}` must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}."
                )
        if not 0 < self.step < 1:
            raise InputError(f"`Search.step` must be in (0, 1), a share of a block, got {self.step}.")
        for name, most in (("first", self.final), ("survivors", self.offspring), ("final", None), ("offspring", None)):
            value = getattr(self, name)
            if value < 1 or (most is not None and value > most):
                limit = {"first": "final", "survivors": "offspring"}.get(name)
                above = "" if most is None else f" and at most {most}, as `Search.{limit}`"
                raise InputError(f"`Search.{name}` must be at least 1{above}, got {value}.")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"`Search.minutes` must be above 0, or null, got {self.minutes}.")
        least = self.rounds.evaluations + 2 * self.final
        if self.evaluations < least:
            raise InputError(
                f"`Search.evaluations` must be at least {least}, for one generation of {self.offspring} and the final "
                f"comparison with the start, got {self.evaluations}."
            )

    @property
    def rule(self) -> Allocation:
        """The allocation of the initial rates, never None."""
        assert self.start is not None
        return self.start

    @property
    def rounds(self) -> Rounds:
        """The sizes of a generation."""
        return Rounds(self.offspring, self.survivors, self.first, self.final)

    @property
    def levels(self) -> frozenset[Level]:  # type: ignore[override]
        """What the rates are of."""
        return frozenset({self.level})

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The statistics that the start needs."""
        return self.rule.needs

    def score(self, weights: dict[str, Tensor], statistics: BlockStatistics) -> float:
        """Returns the start's score."""
        return self.rule.score(weights, statistics)

    def raw_rates(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns the start's raw rates."""
        return self.rule.raw_rates(scores, sparsity)

    def shifted_rates(self, raw_rates: Sequence[float], amount: float) -> list[float]:
        """Returns the start's rates, shifted by its own rule."""
        return self.rule.shifted_rates(raw_rates, amount)

    def floor(self, sparsity: float) -> float:
        """Returns the start's floor, which also bounds the search."""
        return self.rule.floor(sparsity)

    def check(self, sizes: Sequence[int], sparsity: float, lower: Sequence[float], upper: float) -> None:
        """Raises InputError if the start does not fit the model, or if the state belongs to another search."""
        self.rule.check(sizes, sparsity, lower, upper)
        MeasuredLosses(self.state).check_key(self._settings() | {"sizes": list(sizes)})

    def check_key(self, key: Mapping[str, Any]) -> None:
        """Raises InputError if the state belongs to a search of another model, text or recipe."""
        MeasuredLosses(self.state).check_key(key)

    def _settings(self) -> dict[str, Any]:
        """The settings that determine the candidates; limits of evaluations and time only end a search."""
        names = ("step", "offspring", "survivors", "first", "final", "level", "loss", "seed")
        return {"start": repr(self.start)} | {name: getattr(self, name) for name in names}

    def refine(self, rates: Sequence[float], limits: Limits, *, trial: Trial, key: Mapping[str, Any]) -> Refined:
        """Returns the best rates that were measured, and the details of the search."""
        lower = [max(low, self.floor(limits.target)) for low in limits.lower]
        upper = [max(limits.upper, low) for low in lower]
        key = {**key, "sizes": limits.sizes}
        if self.level == "blocks":
            return self._run(Space(list(rates), limits.sizes, trial.granularity, lower, upper, self.step), trial, key)
        named = trial.by_name()
        space = _space_of_names(named, rates, lower, upper, step=self.step, target=limits.effective_target)
        found = self._run(space, named, {**key, f"sizes of {self.level}": named.sizes}, named.families())
        by_block, sizes = named.by_block(found.rates), named.by_block(named.sizes)
        means = [
            mean_rate(by_name, own_sizes) if own_sizes else rate
            for by_name, own_sizes, rate in zip(by_block, sizes, rates, strict=True)
        ]
        return Refined(means, found.details).with_named(self.level, by_block)

    def _run(
        self, space: Space, trial: Trial, key: Mapping[str, Any], families: Sequence[Family] | None = None
    ) -> Refined:
        bounds = {"lower": list(space.lower), "upper": list(space.upper)}
        start = {"rates at the start": [round(rate, 4) for rate in space.start]}
        key = {**key, **self._settings(), **bounds, **start}
        measured = MeasuredLosses(self.state)
        measured.check_key(key)
        with counted(self.evaluations, "Searching rates") as report:
            return _Run(self, space, trial, measured, report, families).run(key)


def _space_of_names(
    trial: NamedTrial,
    rates: Sequence[float],
    lower: Sequence[float],
    upper: Sequence[float],
    *,
    step: float,
    target: float,
) -> Space:
    """Returns the space of the rates of all linears or parts, which starts from ``rates`` of the blocks."""
    start, (low, high) = trial.split(rates), trial.bounds(lower, upper)
    # a linear that an earlier cut left sparser than its block, or a part with large units, makes the others start
    # below the bound of the block or above it
    low, high = (
        [min(pair) for pair in zip(low, start, strict=True)],
        [max(pair) for pair in zip(high, start, strict=True)],
    )
    space = Space(start, trial.sizes, trial.granularity, low, high, step)
    return space.on_budget(target, trial.tolerance) if trial.tolerance else space


class _LimitReached(Exception):
    """Raised to end the search when the evaluations or the minutes are used up."""


class _Run:
    """One search: its limits, its measurements and its evolution."""

    def __init__(
        self,
        search: Search,
        space: Space,
        trial: Trial,
        measured: MeasuredLosses,
        report: Callable[[int, str], None],
        families: Sequence[Family] | None,
    ) -> None:
        self.search, self.space, self.trial, self.measured, self.report = search, space, trial, measured, report
        self.evaluated: set[tuple[Point, int]] = set()
        self.limit, self.end = search.evaluations, math.inf
        windows = len(trial.tokens)
        self.evolution = Evolution(space, search.rounds, windows, self.loss, search.seed, families)
        self.comparison = random.Random(search.seed).sample(range(windows), self.evolution.rounds.final)
        self.generations = 0

    def run(self, key: Mapping[str, Any]) -> Refined:
        """Searches until a limit is reached and returns the result; the state is saved even if it is interrupted."""
        try:
            before = self.loss(self.space.origin, self.comparison)
            if not math.isfinite(before):
                raise InputError(BROKEN)
            self._evolve(key, before)
            after = self.loss(self.evolution.best, self.comparison)
        except KeyboardInterrupt:
            log(f"Search stopped after {len(self.evaluated)} evaluations; {self._state_message()}.")
            raise
        finally:
            self._save(key)
        return self._refined(before, after)

    def _evolve(self, key: Mapping[str, Any], before: float) -> None:
        """Runs generations until a limit is reached, reserving the evaluations of the final comparison."""
        begin, idle, evaluated = time.monotonic(), 0, 0
        self.limit -= len(self.comparison)
        self.end = begin + 60 * (self.search.minutes or math.inf)
        with suppress(_LimitReached):
            while idle < IDLE and self.evolution.generation():
                self.generations += 1
                idle, evaluated = (idle + 1 if len(self.evaluated) == evaluated else 0), len(self.evaluated)
                self._save(key)
        self.limit, self.end = self.search.evaluations, math.inf

    def loss(self, point: Point, windows: Sequence[int]) -> float:
        """Returns the mean loss over the predicted tokens of some windows, reusing measurements."""
        tokens = [self.trial.tokens[window] for window in windows]
        return weighted_mean([self._measure(point, window) for window in windows], tokens)

    def _measure(self, point: Point, window: int) -> float:
        measurement = (point, window)
        if measurement not in self.evaluated:
            if len(self.evaluated) >= self.limit or time.monotonic() >= self.end:
                raise _LimitReached
            if measurement not in self.measured.losses:
                measure = self.trial.loss if self.search.loss == "cross_entropy" else self.trial.divergence
                self.measured.losses[measurement] = measure(self.space.rates(point), window)
            self.evaluated.add(measurement)
            self.report(len(self.evaluated), "")
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
            "evaluations": len(self.evaluated),
            "generations": self.generations,
            "windows": len(self.comparison),
            "loss_start": before,
            "loss_end": after if better else before,
        }
        return Refined(self.space.rates(self.evolution.best if better else self.space.origin), details)
