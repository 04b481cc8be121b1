"""Search: rates with a low measured loss; see ``search/searching.py`` and ``search/sweeps.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final, get_args

from torch import Tensor

from lit_prune.allocate.base import Allocation, Level, Refined, mean_rate
from lit_prune.allocate.budget import Limits
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.errors import InputError
from lit_prune.progress import counted, log
from lit_prune.search.losses import MeasuredLosses
from lit_prune.search.searching import BROKEN, COMPARISON, Searching
from lit_prune.search.space import Group, Space
from lit_prune.search.sweeps import evaluations_of_sweep
from lit_prune.search.trial import NamedRates, NamedTrial, Trial, Trials

Loss = Literal["cross_entropy", "kl"]


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
    parts` those of the parts of `Shrink`, so that the search finds how much each of them loses. Without `weights`, and
    unless the start is a plan for the parts, it then starts from the best of several mixtures: equal shares, or as much
    as possible from one part. Four sweeps change the linears or parts of one block together, those of one name, and
    those of one name in a quarter and in an eighth of the blocks; after one over single linears or parts they begin
    again.

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
            needs one more pass of every window; or `cross_entropy` of the next token, also where `slice_head` slices
            the head.
        tokens: Number of tokens of a window, evenly spread, whose predictions `kl` compares; null compares all. The
            head, and the softmax over the vocabulary, compute no others, which is much of a pass of a small model.
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
    tokens: int | None = 256
    seed: int = 0
    state: str | None = field(default=None, repr=False)

    searches = True

    def __post_init__(self) -> None:
        from lit_prune.allocate.dlp import DLP  # here, since no allocation imports another at module level

        object.__setattr__(self, "start", self.start or DLP())
        if self.rule.searches:
            raise InputError("`Search.start` must be an allocation that does not search itself, got Search.")
        for name, kind in (("level", Level), ("loss", Loss)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(
                    f"`Search.{name}` must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}."
                )
        if not self.rule.levels & {"blocks", self.level}:
            finer = " or ".join(sorted(self.rule.levels))
            raise InputError(
                f"`Search.start` must have one rate per block, got rates of {finer}: search with `level: linears` or "
                "`level: parts`, whichever they are of."
            )
        if not 0 < self.step < 1:
            raise InputError(f"`Search.step` must be in (0, 1), a share of a block, got {self.step}.")
        for name in ("windows", "tokens"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise InputError(f"`Search.{name}` must be at least 1, got {count}.")
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

    def named_rates(self, sizes: Sequence[Mapping[str, int]]) -> list[dict[str, float]] | None:
        """Returns the rates of linears or parts that the search starts from, if the start is a plan that has them."""
        return self.rule.named_rates(sizes)

    def planned_rates(self, blocks: int) -> list[float] | None:
        """Returns the rates of the start, whose mean the search keeps, if that is a plan."""
        return self.rule.planned_rates(blocks)

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
        settings = {"start": repr(self.start)} | {name: getattr(self, name) for name in names}
        if self.level == "parts" and "blocks" in self.rule.levels:
            settings["mixtures"] = "equal shares, or a part first"  # a state without this entry knew only the first
        # the key has the calibration text as `tokens`; a state without this entry compared all
        return settings | ({"allocation.tokens": self.tokens} if self.loss == "kl" else {})

    def refine(self, rates: Sequence[float], limits: Limits, *, trials: Trials, key: Mapping[str, Any]) -> Refined:
        """Returns the best rates that were measured, and the details of the search."""
        key = {**key, "sizes": limits.sizes}
        if self.level == "blocks":
            lower = [max(low, limits.least) for low in limits.lower]
            upper = [max(limits.upper, low) for low in lower]
            with trials.open(None) as trial:
                return self._run(Space(list(rates), limits.sizes, trial.granularity, lower, upper), trial, key)
        mixture = self._best_mixture(rates, limits, trials, key)
        start = trials.start if mixture is None else trials.mixtures[mixture]
        with trials.open(start) as trial:
            named = trial.by_name()
            space = _space_of_names(named, rates, limits, start)
            found = self._run(space, named, {**key, f"sizes of {self.level}": named.sizes}, named.families())
        by_block, sizes = named.by_block(found.rates), named.by_block(named.sizes)
        means = [
            mean_rate(by_name, own_sizes) if own_sizes else rate
            for by_name, own_sizes, rate in zip(by_block, sizes, rates, strict=True)
        ]
        details = found.details | ({} if mixture is None else {"start": mixture})
        return Refined(means, details).with_named(self.level, by_block)

    def _best_mixture(
        self, rates: Sequence[float], limits: Limits, trials: Trials, key: Mapping[str, Any]
    ) -> str | None:
        """Returns the mixture with the least loss on the windows of the closing comparison; None if there is no choice.

        The losses are in the state as soon as they are measured.
        """
        if len(trials.mixtures) < 2:
            return None
        measured, key = MeasuredLosses(self.state), {**key, **self._settings()}
        measured.check_key(key)
        try:
            for name, mixture in trials.mixtures.items():
                if name not in measured.mixtures:
                    with trials.open(mixture) as trial:
                        named = trial.by_name()
                        space = _space_of_names(named, rates, limits, mixture)
                        searching = Searching(self, space, named, MeasuredLosses(None), lambda *_: None, ())
                        measured.mixtures[name] = searching.loss_at_start()
                    measured.save(key, [])
        except KeyboardInterrupt:
            kept = measured.whereabouts if measured.mixtures else "nothing was measured"
            log(f"Search stopped before its first sweep; {kept}.")
            raise
        losses = {name: measured.mixtures[name] for name in trials.mixtures}
        best = min(losses, key=losses.__getitem__)
        if not math.isfinite(losses[best]):
            raise InputError(BROKEN)
        log(f"The search starts from {best}: loss {', '.join(f'{loss:.4f} {name}' for name, loss in losses.items())}.")
        return best

    def _run(
        self, space: Space, trial: Trial, key: Mapping[str, Any], together: Sequence[Sequence[Group]] = ()
    ) -> Refined:
        bounds = {"lower": list(space.lower), "upper": list(space.upper)}
        start = {"rates at the start": [round(rate, 4) for rate in space.start]}
        key = {**key, **self._settings(), **bounds, **start}
        measured = MeasuredLosses(self.state)
        measured.check_key(key)
        with counted(self.evaluations, "Searching rates") as report:
            return Refined(*Searching(self, space, trial, measured, report, together).run(key))


def _space_of_names(trial: NamedTrial, rates: Sequence[float], limits: Limits, start: NamedRates | None) -> Space:
    """Returns the space of the rates of all linears or parts that starts from ``start``, or ``rates`` of blocks."""
    flat = trial.split(rates) if start is None else [rate for by_name in start for rate in by_name.values()]
    low, high = trial.bounds(*limits.named_bounds)
    # a linear that an earlier cut left sparser than its block, or a part with large units, makes the others start below
    # the bound or above it
    low = [min(pair) for pair in zip(low, flat, strict=True)]
    high = [max(pair) for pair in zip(high, flat, strict=True)]
    space = Space(flat, trial.sizes, trial.granularity, low, high)
    return space.on_budget(limits.effective_target, trial.tolerance) if trial.tolerance else space
