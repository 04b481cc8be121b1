"""Search: rates with a low measured loss; see ``search/sweeps.py``."""

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
from lit_prune.search.losses import MeasuredLosses
from lit_prune.search.space import Group, Point, Space
from lit_prune.search.sweeps import MOST, Sweeps, evaluations_of_sweep
from lit_prune.search.trial import NamedTrial, Trial

Loss = Literal["cross_entropy", "kl"]
IDLE = 20  # sweeps without a new measurement, after which all rates in reach are taken as measured
COMPARISON = 2  # windows of the closing comparison, in multiples of those of a sweep
BROKEN = (
    "`calibration`: the loss under the rates of `Search.start` is NaN or infinity; the weights are broken, or "
    "`model.dtype` is too small for them (try float32 or bfloat16)."
)


@final
@dataclass(frozen=True)
class Search(Allocation):
    """Starts from the rates of another allocation and searches for rates of the same mean that give a lower loss.

    The loss is measured on calibration windows. A sweep measures it with the rate of each block a little higher and a
    little lower, and solves for the exchange of budget between all blocks that lowers it most, if the changes of single
    blocks add up. Three such exchanges, of different extent, are compared with the best rates so far on other windows.
    Up to 64 blocks take part in a sweep, and the next one goes on with others. If the best rates are no better than the
    start on windows drawn for this comparison, the start is returned.

    With `level: linears` the rates are those of linears instead, so that those of one block may differ; with `level:
    parts` those of the parts of `Shrink`, so that the search finds how much each of them loses. Four sweeps change the
    linears or parts of one block together, those of one name, and those of one name in a quarter and in an eighth of
    the blocks; after one over single linears or parts they begin again.

    Args:
        start: The allocation of the initial rates; null is DLP.
        evaluations: Maximum number of passes of one calibration window through the whole model, including those of a
            stopped search that is resumed.
        minutes: Time limit of this run; null is no limit.
        step: What a sweep adds to the rate of a block, and takes from it, rounded to the granularity of the pattern,
            the slices or the parts. No exchange changes a rate by more than three times as much, or by one unit of the
            granularity where that is more.
        windows: Number of windows on which a sweep measures every block, and on which it compares its candidates; the
            closing comparison has twice as many.
        level: What gets rates of its own: the `blocks`; the `linears` of each block, for masks; or the `parts` of each
            block, for `Shrink`.
        loss: `kl`, the divergence of the pruned model's prediction from that of the unpruned one, as in EvoPress, which
            needs one more pass over the windows; or `cross_entropy` of the next token, also where `slice_head` slices
            the head.
        seed: Random seed.
        state: File with all measurements, written after every sweep and when the search is interrupted. If it
            exists, the search resumes from it; with more evaluations, a finished search continues.

    Raises:
        InputError: for settings out of range, a start that is itself a search, a state of another search, or too few
            evaluations for one sweep.
    """

    start: Allocation | None = None
    evaluations: int = 400
    minutes: float | None = None
    step: float = 0.1
    windows: int = 2
    level: Level = "blocks"
    loss: Loss = "kl"
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
        if self.windows < 1:
            raise InputError(f"`Search.windows` must be at least 1, got {self.windows}.")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"`Search.minutes` must be above 0, or null, got {self.minutes}.")
        self._check_evaluations()

    def _check_evaluations(self) -> None:
        """Raises InputError if the evaluations do not suffice for a sweep over two blocks on all windows."""
        per_window = evaluations_of_sweep(2, 1) + 2 * COMPARISON
        least, most = per_window * self.windows, self.evaluations // per_window
        if self.evaluations >= least:
            return
        if most and self.windows > type(self).windows:
            raise InputError(
                f"`Search.windows` must be at most {most} with {self.evaluations} evaluations, got {self.windows}: a "
                f"sweep over two blocks and the final comparison take {per_window} for every window. Choose fewer, or "
                f"`evaluations` of at least {least}."
            )
        fixed = evaluations_of_sweep(0, self.windows)
        raise InputError(
            f"`Search.evaluations` must be at least {least}, for a sweep over two blocks on {self.windows} windows and "
            f"the final comparison with the start, got {self.evaluations}; a sweep over n blocks takes "
            f"{evaluations_of_sweep(1, self.windows) - fixed} n + {fixed}."
        )

    @property
    def rule(self) -> Allocation:
        """The allocation of the initial rates, never None."""
        assert self.start is not None
        return self.start

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

    def planned_mean(self, sizes: Sequence[int]) -> float | None:
        """Returns the mean of the start, which the search keeps, if that is a plan."""
        return self.rule.planned_mean(sizes)

    def check_windows(self, available: int) -> None:
        """Raises InputError if there are fewer calibration windows than a sweep measures on."""
        if self.windows > available:
            raise InputError(
                f"`Search.windows` must be at most `calibration.num_samples`, {available}, got {self.windows}: choose "
                "fewer, or calibrate on more."
            )

    def check_key(self, key: Mapping[str, Any]) -> None:
        """Raises InputError if the state belongs to a search of another model, text or recipe."""
        MeasuredLosses(self.state).check_key(key)

    def _settings(self) -> dict[str, Any]:
        """The settings that determine the candidates; limits of evaluations and time only end a search."""
        names = ("step", "windows", "level", "loss", "seed")
        return {"start": repr(self.start)} | {name: getattr(self, name) for name in names}

    def refine(self, rates: Sequence[float], limits: Limits, *, trial: Trial, key: Mapping[str, Any]) -> Refined:
        """Returns the best rates that were measured, and the details of the search."""
        lower = [max(low, self.floor(limits.target)) for low in limits.lower]
        upper = [max(limits.upper, low) for low in lower]
        key = {**key, "sizes": limits.sizes}
        if self.level == "blocks":
            return self._run(Space(list(rates), limits.sizes, trial.granularity, lower, upper), trial, key)
        named = trial.by_name()
        space = _space_of_names(named, rates, lower, upper, limits.effective_target)
        found = self._run(space, named, {**key, f"sizes of {self.level}": named.sizes}, named.families())
        by_block, sizes = named.by_block(found.rates), named.by_block(named.sizes)
        means = [
            mean_rate(by_name, own_sizes) if own_sizes else rate
            for by_name, own_sizes, rate in zip(by_block, sizes, rates, strict=True)
        ]
        return Refined(means, found.details).with_named(self.level, by_block)

    def _run(
        self, space: Space, trial: Trial, key: Mapping[str, Any], together: Sequence[Sequence[Group]] = ()
    ) -> Refined:
        bounds = {"lower": list(space.lower), "upper": list(space.upper)}
        start = {"rates at the start": [round(rate, 4) for rate in space.start]}
        key = {**key, **self._settings(), **bounds, **start}
        measured = MeasuredLosses(self.state)
        measured.check_key(key)
        with counted(self.evaluations, "Searching rates") as report:
            return _Run(self, space, trial, measured, report, together).run(key)


def _space_of_names(
    trial: NamedTrial,
    rates: Sequence[float],
    lower: Sequence[float],
    upper: Sequence[float],
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
    space = Space(start, trial.sizes, trial.granularity, low, high)
    return space.on_budget(target, trial.tolerance) if trial.tolerance else space


class _LimitReached(Exception):
    """Raised to end the search when the evaluations or the minutes are used up."""


class _Run:
    """One search: its limits, its measurements and its sweeps."""

    def __init__(
        self,
        search: Search,
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

    def run(self, key: Mapping[str, Any]) -> Refined:
        """Searches until a limit is reached and returns the result; the state is saved even if it is interrupted."""
        if self._is_short:
            log(
                f"{self.search.evaluations} evaluations do not suffice for a sweep over {self._all}: a sweep takes "
                f"some of them. {self._least} do: pass `--pruning.allocation.evaluations {self._least}` or more."
            )
        try:
            before = self.loss(self.space.origin, self.comparison)
            if not math.isfinite(before):
                raise InputError(BROKEN)
            self._sweep(key)
            after = self.loss(self.sweeps.best, self.comparison)
        except KeyboardInterrupt:
            log(f"Search stopped after {len(self.evaluated)} evaluations; {self._state_message()}.")
            raise
        finally:
            self._save(key)
        return self._refined(before, after)

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
        self.measured.save(key, self.space.rates(self.sweeps.best))

    def _state_message(self) -> str:
        if self.measured.path is None:
            return "its measurements are lost; pass `--pruning.allocation.state FILE` to be able to resume it"
        return f"its measurements are in {self.measured.path}, and the same command resumes it"

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
            return "the bounds allow no others. Change `--pruning.min_rate` or `--pruning.max_rate`."
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

    def _refined(self, before: float, after: float) -> Refined:
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
        return Refined(self.space.rates(self.sweeps.best if better else self.space.origin), details)
